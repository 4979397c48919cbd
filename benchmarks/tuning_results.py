"""The tuning suite's rows: what they say, which is the worst, and the table on disk."""

import csv
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from bench_inference import Row as Goal
from pydantic import TypeAdapter

from effseg.files import written_whole

MOST_ERROR, LEAST_USE, MOST_SEARCH_SECONDS = 5.0, 92.0, 30.0
"""Percent of the measured peak, percent of the budget, seconds."""


@dataclass(frozen=True)
class Row:
    """A network under a budget: what was promised, what came.

    Attributes:
        network: its name.
        budget_mib: that was given.
        n_parameters: of the network.
        patch: voxels; empty where the search refused.
        batch: samples.
        policies: how many stages are recomputed or offloaded.
        precision: of the step.
        heap: what becomes of freed memory.
        predicted_mib: the peak that the search told.
        measured_mib: the one that came.
        error_percent: of the predicted peak, below zero where it promised too little.
        used_percent: of the budget, measured.
        over: whether the measured peak is above the budget.
        search_seconds: of its wall clock.
        search_mib: by how much the process grew in the search; a step tried out would show.
        step_seconds: the median.
        steps: that were taken.
        refusal: what the search said where nothing fits.
    """

    network: str
    budget_mib: float
    n_parameters: int
    patch: str = ""
    batch: int | None = None
    policies: int | None = None
    precision: str = ""
    heap: str = ""
    predicted_mib: float | None = None
    measured_mib: float | None = None
    error_percent: float | None = None
    used_percent: float | None = None
    over: bool | None = None
    search_seconds: float | None = None
    search_mib: float | None = None
    step_seconds: float | None = None
    steps: int = 0
    refusal: str = ""

    @property
    def name(self) -> str:
        """The network and its budget."""
        return f"{self.network} in {self.budget_mib:g} MiB"

    def goal(self) -> Goal:
        """What a table shows of it."""
        if self.error_percent is None:
            return Goal(math.nan, "% error", MOST_ERROR, -MOST_ERROR, note=self.refusal)
        note = (
            f"{self.used_percent:.0f} % used{', over' if self.over else ''}: {self.batch} of "
            f"{self.patch}, {self.policies} policies, {self.steps} steps; searched "
            f"{self.search_seconds:.1f} s"
        )
        return Goal(self.error_percent, "% error", MOST_ERROR, -MOST_ERROR, self.step_seconds, note)


def worst_error(rows: Sequence[Row]) -> Goal:
    """Of a prediction."""
    row = max(rows, key=lambda row: abs(row.error_percent or 0))
    return Goal(row.error_percent or 0, "%", MOST_ERROR, -MOST_ERROR, note=row.name)


def least_use(rows: Sequence[Row]) -> Goal:
    """Of a budget; a search that refuses uses none."""
    row = min(rows, key=lambda row: row.used_percent or 0)
    return Goal(row.used_percent or 0, "%", at_least=LEAST_USE, note=row.name)


def runs_over(rows: Sequence[Row]) -> Goal:
    """Their budget."""
    over = [row.name for row in rows if row.over]
    fewest = min((row.steps for row in rows if row.steps), default=0)
    note = ", ".join([f"{fewest} steps at least", *over])
    return Goal(len(over), f"of {len(rows)}", 0, note=note)


def refusals(rows: Sequence[Row]) -> Goal:
    """Searches that found nothing."""
    names = [row.name for row in rows if row.refusal]
    return Goal(len(names), f"of {len(rows)}", 0, note=", ".join(names))


def slowest_search(rows: Sequence[Row]) -> Goal:
    """Of them all."""
    row = max(rows, key=lambda row: row.search_seconds or 0)
    return Goal(row.search_seconds or 0, "s", MOST_SEARCH_SECONDS, note=row.name)


WORST: dict[str, Callable[[Sequence[Row]], Goal]] = {
    "worst error of a prediction": worst_error,
    "least use of a budget": least_use,
    "runs over their budget": runs_over,
    "searches that refused": refusals,
    "slowest search": slowest_search,
}


def put_row(row: Row, path: Path) -> None:
    """Write a row into a table, in the place of the one of its network and budget.

    It comes with the machine it was made on.
    """
    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    lines = {(line["network"], line["budget_mib"]): line for line in _read(path)}
    new = {name: "" if value is None else str(value) for name, value in asdict(row).items()}
    lines[new["network"], new["budget_mib"]] = new | machine
    path.parent.mkdir(exist_ok=True)
    with (
        written_whole(path) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        columns = [field.name for field in fields(Row)] + list(machine)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines.values())


def read_rows(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file."""
    names = {field.name for field in fields(Row)}
    of_table = TypeAdapter(list[Row])
    return of_table.validate_python(
        # what is empty is what a row begins with
        [
            {name: cell for name, cell in line.items() if name in names and cell}
            for line in _read(path)
        ]
    )


def rounded(value: float) -> float:
    """Four digits say it all."""
    return float(f"{value:.4g}")


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
