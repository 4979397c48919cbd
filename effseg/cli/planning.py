"""`effseg plan`, for one budget or for several side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effseg.cli.budgets import Compared, print_budgets
from effseg.cli.console import console
from effseg.cli.failures import NO_RESOURCES
from effseg.cli.options import (
    Augment,
    AugmentPolicy,
    DatasetPath,
    Device,
    NetworkName,
    NetworkOptions,
    NetworkSize,
    Size,
    network_options,
)
from effseg.cli.plan_tables import print_plan
from effseg.cli.progress import bar
from effseg.errors import MemoryBudgetError

if TYPE_CHECKING:
    from effseg.dataset import Dataset
    from effseg.plans import Fingerprint, Plan

PLAN = Path("plan.json")


@dataclass(frozen=True)
class Wanted:
    """What a plan is asked for beside its budget; None: what the planner takes."""

    device: str | None = None
    size: Size | None = None
    network: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    augment: AugmentPolicy | None = None


def plan(
    dataset: DatasetPath,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            help="the budget: 8GiB, 500MB, or auto: what is free. Several, 4GiB,8GiB,24GiB, are "
            "compared and nothing is written",
            metavar="SIZE[,SIZE...]",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="where the plan goes", show_default=str(PLAN))
    ] = None,
    device: Device = None,
    size: NetworkSize = None,
    network: NetworkName = None,
    options: NetworkOptions = None,
    augment: Augment = None,
) -> None:
    """Look at every case once and plan a training that fits the budget."""
    budgets = memory.split(",")
    wanted = Wanted(
        device=device,
        size=size,
        network=network,
        options=network_options(options),
        augment=augment,
    )
    if len(budgets) > 1:
        if out is not None:
            raise typer.BadParameter(
                f"--out {out} beside {len(budgets)} budgets, which are compared and not written; "
                "give one --memory to write a plan"
            )
        compare(dataset, budgets, wanted)
        return
    made = planned(dataset, memory, wanted)
    path = made.save(out or PLAN)
    print_plan(made)
    console.print(f"[green]plan[/] {path}", soft_wrap=True)


def compare(dataset: Path, budgets: Sequence[str], wanted: Wanted) -> None:
    """Plan for each budget from one look at the data, and print the plans side by side.

    Raises:
        PlanError: if a budget is no size; before anything is read.
        Exit: out of resources, if none of the budgets can be met.
    """
    from effseg.planner import fingerprint
    from effseg.plans import parse_bytes

    for budget in budgets:
        if budget.strip() != "auto":
            parse_bytes(budget)
    with bar("reading") as advance:
        facts = fingerprint(
            _read(dataset), progress=lambda done, total, name: advance(done / total, name)
        )
    compared: list[Compared] = []
    with bar("planning", len(budgets)) as advance:
        for number, budget in enumerate(budgets):
            advance(number, budget)
            try:
                made: Plan | MemoryBudgetError = _plan(facts, budget, wanted)
            except MemoryBudgetError as error:
                made = error
            compared.append(Compared(budget, made))
    print_budgets(facts.dataset, compared)
    if all(isinstance(one.outcome, MemoryBudgetError) for one in compared):
        raise typer.Exit(NO_RESOURCES)


def planned(dataset: "Path | Dataset", memory: str, wanted: Wanted) -> "Plan":
    """A plan, with a bar while the cases are read."""
    with bar("reading") as advance:
        return _plan(
            dataset,
            memory,
            wanted,
            progress=lambda done, total, name: advance(done / total, name),
        )


def _plan(
    dataset: "Path | Dataset | Fingerprint",
    memory: str,
    wanted: Wanted,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> "Plan":
    from effseg.planner import plan as make_plan

    return make_plan(
        dataset,
        memory=memory,
        size=None if wanted.size is None else wanted.size.value,
        network=wanted.network,
        network_options=wanted.options,
        device=wanted.device,
        augment="default" if wanted.augment is None else wanted.augment.value,
        progress=progress,
    )


def _read(dataset: Path) -> "Dataset":
    from effseg.dataset import read_dataset

    return read_dataset(dataset)
