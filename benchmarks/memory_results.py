"""The memory suite's rows on disk: a table, the same as JSON, and a plot."""

import csv
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
PLOTTED = {
    "R1": "R1: dense U-Net, 1.7 M",
    "R2": "R2: dense U-Net, 0.5 M",
    "effseg": "effseg's own, batch 2",
}
"""Networks with a panel of their own, and its title."""
COLOURS = {"plain": "#7a7a7a", "shared": "#c2410c"}
OTHER_COLOUR = "#1d4e89"


@dataclass
class Row:
    """A case and what was found.

    Attributes:
        network: its name.
        scheme: what is stored and what is recomputed.
        n_parameters: of the network.
        seconds: of one training step, the median.
        ratio: to the plain step of the same network in the same run.
        batch: samples of the step that was timed.
        side: voxels along each axis of its patch.
        measured_mib: its peak.
        traced_batch: samples of the step that was traced.
        peak_gib: traced at 128^3 in bfloat16, by CUDA's rules.
        saved_gib: likewise.
        peak_u: of one dense block, in units of one channel's bytes.
        saved_u: likewise.
    """

    network: str
    scheme: str
    n_parameters: int
    seconds: float = 0.0
    ratio: float | None = None
    batch: int = 0
    side: int = 0
    measured_mib: float | None = None
    traced_batch: int | None = None
    peak_gib: float | None = None
    saved_gib: float | None = None
    peak_u: float | None = None
    saved_u: float | None = None

    def counted(self) -> dict[str, float | None]:
        """What stands beside the seconds."""
        names = ("ratio", "measured_mib", "peak_gib", "saved_gib", "peak_u", "saved_u")
        return {name: getattr(self, name) for name in names}


def write_results(rows: Sequence[Row], *, device: torch.device) -> None:
    """Write memory.csv, memory.json and memory.svg."""
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    table = [{name: _rounded(value) for name, value in asdict(row).items()} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "memory.csv").open("w", newline="", encoding="utf-8") as file:
        columns = [field.name for field in fields(Row)] + list(machine)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | machine for row in table)
    text = json.dumps({"machine": machine, "rows": table}, indent=1)
    (RESULTS / "memory.json").write_text(text + "\n", encoding="utf-8")
    plot(rows, RESULTS / "memory.svg", machine=machine)


def plot(rows: Sequence[Row], path: Path, *, machine: dict[str, Any]) -> None:
    """Memory against time, one point a scheme."""
    with mpl.rc_context({"svg.hashsalt": "effseg", "font.size": 9, "svg.fonttype": "none"}):
        figure, panels = pyplot.subplots(1, len(PLOTTED), figsize=(10, 3.4), layout="constrained")
        for axes, (network, title) in zip(panels, PLOTTED.items(), strict=True):
            points = [
                (row.scheme, row.ratio, row.peak_gib)
                for row in rows
                if row.network == network and row.ratio is not None and row.peak_gib is not None
            ]
            for scheme, ratio, peak_gib in points:
                axes.scatter(ratio, peak_gib, color=COLOURS.get(scheme, OTHER_COLOUR), zorder=3)
                axes.annotate(
                    f"{scheme} {peak_gib:.1f}",
                    (ratio, peak_gib),
                    (5, 4),
                    textcoords="offset points",
                )
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlabel("time, plain = 1")
            axes.margins(x=0.35, y=0.15)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("peak at 128$^3$, bfloat16, GiB")
        figure.supxlabel(f"bytes traced; seconds on {machine['device']}", fontsize=7, color="#555")
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
