"""What prediction takes, beside its goals and beside other tools: bytes, labels and seconds.

    effseg benchmark --suite inference

`value` is what a row says, `goal` what it shall be. Each number comes from a fresh process; bytes
are its peak of resident memory above what it held with the input loaded. Peers run where they are
installed, else their rows are skipped by name: MONAI is, `pip install "effseg[bench]"`, or `pip
install torchio konfai`, brings the others. A complete run leaves its rows in
`benchmarks/results/inference.csv`.
"""

import csv
import multiprocessing
import platform
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_components
import numpy as np
import pytest
import torch
from inference_cases import (
    Case,
    Measured,
    against_in_memory,
    blend,
    blend_in_turns,
    export,
    streamed_components,
    whole_body,
)
from pytest_benchmark.fixture import BenchmarkFixture

from effseg.types import Array, Shape3

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
PER_VALUE = "B / class / voxel"


@dataclass(frozen=True)
class Row:
    """A number and what it shall be.

    Attributes:
        value: the number.
        unit: its unit.
        at_most: the goal; None where there is none, as for peers.
        at_least: likewise.
        seconds: that the measured call took.
        note: what else was counted.
    """

    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    seconds: float | None = None
    note: str = ""

    def cells(self) -> dict[str, Any]:
        """What a table shows of it."""
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        goals = [f">= {low:g}"] * (self.at_least is not None)
        goals += [f"<= {high:g}"] * (self.at_most is not None)
        return {
            "value": float(f"{self.value:.4g}"),
            "unit": self.unit,
            "goal": ", ".join(goals),
            "met": ("yes" if low <= self.value <= high else "no") if goals else "",
            "seconds": "" if self.seconds is None else round(self.seconds, 2),
            "note": self.note,
        }


@cache
def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a process of its own; asked a second time, what it gave."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def blended(case: Case, *, tool: str = "effseg", at_most: float | None = None) -> Row:
    """Bytes for each class and voxel."""
    found: Measured = fresh(blend, tool, case)
    return Row(
        found.peak_bytes / case.values,
        PER_VALUE,
        at_most,
        seconds=found.seconds,
        note=f"{found.peak_bytes / MIB:.0f} MiB",
    )


def peak_ratio(case: Case, base: Case, *, at_most: float) -> Row:
    """The peak of a case over that of another, each the least of two: malloc's own goes up only."""
    more, less = (
        min((fresh(blend, "effseg", one), fresh(blend_again, "effseg", one)), key=_peak)
        for one in (case, base)
    )
    note = f"{more.peak_bytes / MIB:.0f} over {less.peak_bytes / MIB:.0f} MiB"
    return Row(more.peak_bytes / less.peak_bytes, "x", at_most, seconds=more.seconds, note=note)


def blend_again(tool: str, case: Case) -> Measured:
    """`blend`, under another name, that `fresh` may ask twice."""
    return blend(tool, case)


def same_labels(case: Case) -> Row:
    """Labels, with 8 mirrors and 2 folds, that are not those of the in-memory path."""
    found: Measured = fresh(against_in_memory, case, 2)
    return _different(found, int(np.prod(case.shape)))


def time_over_monai(case: Case, *, rounds: int) -> Row:
    """Seconds over MONAI's, both with the same windows one by one, in turns."""
    seconds = fresh(blend_in_turns, ("effseg", "monai"), case, rounds)
    ours, theirs = (statistics.median(of_tool) for of_tool in seconds)
    return Row(ours / theirs, "x", 1.05, seconds=ours, note=f"MONAI {theirs:.1f} s")


def export_bytes(n_classes: int, source: int, target: int, *, tool: str = "effseg") -> Row:
    """Bytes for each class and voxel of the finer grid."""
    found: Measured = fresh(export, tool, n_classes, source, target)
    at_most = 0.35 if tool == "effseg" else None
    value = found.peak_bytes / (n_classes * target**3)
    return Row(value, PER_VALUE, at_most, seconds=found.seconds)


def export_speed(n_classes: int, source: int, target: int) -> Row:
    """How many times faster than nnU-Net's way."""
    ours, theirs = (
        fresh(export, tool, n_classes, source, target).seconds for tool in ("effseg", "nnU-Net")
    )
    return Row(theirs / ours, "x", at_least=3, note=f"{ours:.2f} against {theirs:.2f} s")


def export_labels(n_classes: int, source: int, target: int) -> Row:
    """Labels that are not those of logits interpolated in float32."""
    return _different(fresh(export, "effseg", n_classes, source, target), target**3)


def component_speed(make: Callable[[], Array]) -> Row:
    """Voxels a second of streamed components, and of cc3d's numbers alone."""
    n_voxels = make().size
    ours, cc3d = (
        n_voxels / fresh(bench_components.best_seconds, by, make) / 1e6
        for by in (bench_components.by_stream, bench_components.by_cc3d)
    )
    return Row(ours, "Mvoxel/s", at_least=150, note=f"whole cc3d {cc3d:.0f}")


def component_memory(shape: Shape3, n_labels: int, thickness: int) -> Row:
    """Bytes for each voxel of a slab, of components found, judged and removed slab by slab."""
    found: Measured = fresh(streamed_components, shape, n_labels, thickness)
    value = found.peak_bytes / (thickness * shape[1] * shape[2])
    note = f"{found.peak_bytes / MIB:.0f} MiB, slabs of {thickness}"
    return Row(value, "B / slab voxel", 12, seconds=found.seconds, note=note)


WHOLE_BODY = ((600, 512, 512), 118, 96, 1.5, (1.0, 0.75, 0.75))


def whole_body_memory(*arguments: Any) -> Row:
    """All that the process held at its peak."""
    found: Measured = fresh(whole_body, *arguments)
    note = f"{found.peak_bytes / MIB:.0f} MiB above imports and weights"
    return Row(found.process_bytes / 2**30, "GiB", 4, seconds=found.seconds, note=note)


def whole_body_forecast(*arguments: Any) -> Row:
    """The measured peak over the predicted one."""
    found: Measured = fresh(whole_body, *arguments)
    note = f"{found.peak_bytes / MIB:.0f} over {found.predicted_bytes / MIB:.0f} MiB"
    return Row(found.peak_bytes / found.predicted_bytes, "x", 1.15, 0.85, note=note)


def _peak(found: Measured) -> int:
    return found.peak_bytes


def _different(found: Measured, n_voxels: int) -> Row:
    note = f"{found.n_ties} of {n_voxels} voxels are ties"
    return Row(found.n_different, "labels", 0, note=note)


LOGITS, HEAD = Case(), Case(n_features=16)
MANY = Case(n_classes=118, n_features=32, features=True)
FILE = replace(HEAD, on_disk=True)
SMALL = Case(shape=(96, 80, 72), window=(48, 48, 48))
EXPORT = (25, 128, 192)
ROWS: dict[str, Callable[[], Row]] = {
    "C=25 480x160x160, logits": partial(blended, LOGITS, at_most=1.2),
    "the same, 16-feature head": partial(blended, HEAD, at_most=0.8),
    "the same, MONAI": partial(blended, LOGITS, tool="monai"),
    "the same, TorchIO": partial(blended, LOGITS, tool="torchio"),
    "the same, KonfAI": partial(blended, LOGITS, tool="konfai"),
    "C=118 over C=2, 32 features": partial(
        peak_ratio, MANY, replace(MANY, n_classes=2), at_most=1.05
    ),
    "length 960 over 480, to disk": partial(
        peak_ratio, replace(FILE, shape=(960, 160, 160)), FILE, at_most=1.02
    ),
    "8 mirrors, 2 folds, logits": partial(same_labels, SMALL),
    "8 mirrors, 2 folds, features": partial(same_labels, replace(SMALL, n_features=8)),
    "export C=25 128^3 -> 192^3": partial(export_bytes, *EXPORT),
    "the same, nnU-Net's way": partial(export_bytes, *EXPORT, tool="nnU-Net"),
    "the same, nnU-Net's over ours": partial(export_speed, *EXPORT),
    "the same, against float32": partial(export_labels, *EXPORT),
    "components, organs": partial(component_speed, bench_components.organs),
    "components, nodules": partial(component_speed, bench_components.nodules),
    "components, 600x512x512 C=118": partial(component_memory, (600, 512, 512), 118, 16),
    "600x512x512 C=118 to .nii.gz": partial(whole_body_memory, *WHOLE_BODY),
    "the same, over its forecast": partial(whole_body_forecast, *WHOLE_BODY),
    "time over MONAI's": partial(time_over_monai, LOGITS, rounds=8),
}
NEEDS = {"the same, TorchIO": "torchio", "the same, KonfAI": "konfai"}


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[dict[str, Row]]:
    """What was found, by name; written down in the end, if nothing is missing."""
    found: dict[str, Row] = {}
    yield found
    wanted = {name for name in ROWS if not _lacks(name)}
    if found.keys() == wanted and request.config.getoption("benchmark_enable"):
        write_rows(found, RESULTS / "inference.csv")


@pytest.mark.parametrize("name", ROWS)
def test_row(benchmark: BenchmarkFixture, name: str, rows: dict[str, Row]) -> None:
    """A row of the table."""
    if _lacks(name):
        pytest.skip(f"{NEEDS[name]} is not installed")
    rows[name] = benchmark.pedantic(ROWS[name])
    benchmark.extra_info |= rows[name].cells()


def write_rows(rows: dict[str, Row], path: Path) -> None:
    """One line a row, and the machine they were made on."""
    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = [{"row": name} | row.cells() | machine for name, row in rows.items()]
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _lacks(name: str) -> bool:
    return name in NEEDS and find_spec(NEEDS[name]) is None
