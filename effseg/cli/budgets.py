"""Budgets side by side: a column each, with what training within it would be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Column, Table

from effseg.cli.console import console, plain
from effseg.errors import MemoryBudgetError

if TYPE_CHECKING:
    from effseg.plans import Plan

UNMET = "cannot be met"


@dataclass(frozen=True)
class Compared:
    """A budget as it was asked for, and the plan for it or why there is none."""

    budget: str
    outcome: "Plan | MemoryBudgetError"


def print_budgets(dataset: str, compared: Sequence[Compared]) -> None:
    """A table of the plans; the column of a budget that cannot be met says why."""
    columns = [describe(one.outcome) for one in compared]
    headings = (Column(one.budget.strip(), overflow="fold") for one in compared)
    table = Table("", *headings, title=f"budgets for {dataset}")
    rows = dict.fromkeys(name for column in columns for name in column)
    for row in sorted(rows, key=lambda name: name == UNMET):  # the reasons last, others as they are
        table.add_row(row, *(plain(column.get(row, "-")) for column in columns))
    console.print(table)


def describe(outcome: "Plan | MemoryBudgetError") -> dict[str, str]:
    """A plan in a few words, by what they are about; what failed says why."""
    from effseg.plans import format_bytes, format_shape

    if isinstance(outcome, MemoryBudgetError):
        return {UNMET: str(outcome)}
    memory, network = outcome.memory, outcome.network
    sides = (n * step for n, step in zip(outcome.patch_size, outcome.spacing, strict=True))
    return {
        "budget": format_bytes(memory.budget_bytes),
        "patch": format_shape(outcome.patch_size),
        "batch": str(outcome.batch_size),
        "context, voxels": f"{math.prod(outcome.patch_size):,}",
        "context, mm": " x ".join(f"{side:.0f}" for side in sides),
        "network": network.words,
        "precision": outcome.precision,
        "policies": _policies(outcome),
        "predicted peak": format_bytes(memory.peak_bytes),
        "of the budget": f"{memory.peak_bytes / memory.budget_bytes:.0%}",
        "seconds a step": _seconds(outcome),
    }


def _policies(made: "Plan") -> str:
    """How the features are kept, and at how many stages otherwise."""
    counts: dict[str, int] = {}
    for policy in made.policies.values():
        counts[policy] = counts.get(policy, 0) + 1
    counted = (f"{policy} {n}" for policy, n in counts.items() if policy != "keep")
    return ", ".join((made.network.memory, *counted))


def _seconds(made: "Plan") -> str:
    taken = (other.seconds for other in made.alternatives if other.taken)
    seconds = next((value for value in taken if value is not None), None)
    return "-" if seconds is None else f"{seconds:.3g}"
