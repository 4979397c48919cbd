"""`effseg plan`, for one budget or for several side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effseg.cli.budgets import Compared, print_budgets
from effseg.cli.console import console
from effseg.cli.failures import NO_RESOURCES
from effseg.cli.options import Augment, AugmentPolicy, DatasetPath, Device, NetworkSize, Size
from effseg.cli.plan_tables import print_plan
from effseg.cli.progress import bar
from effseg.errors import MemoryBudgetError

if TYPE_CHECKING:
    from effseg.dataset import Dataset
    from effseg.plans import Fingerprint, Plan

PLAN = Path("plan.json")


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
    augment: Augment = None,
) -> None:
    """Look at every case once and plan a training that fits the budget."""
    budgets = memory.split(",")
    if len(budgets) > 1:
        if out is not None:
            raise typer.BadParameter(
                f"--out {out} beside {len(budgets)} budgets, which are compared and not written; "
                "give one --memory to write a plan"
            )
        compare(dataset, budgets, device=device, size=size, augment=augment)
        return
    made = planned(dataset, memory, device=device, size=size, augment=augment)
    path = made.save(out or PLAN)
    print_plan(made)
    console.print(f"[green]plan[/] {path}", soft_wrap=True)


def compare(
    dataset: Path,
    budgets: Sequence[str],
    *,
    device: str | None,
    size: Size | None,
    augment: AugmentPolicy | None,
) -> None:
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
                made: Plan | MemoryBudgetError = _plan(
                    facts, budget, device=device, size=size, augment=augment
                )
            except MemoryBudgetError as error:
                made = error
            compared.append(Compared(budget, made))
    print_budgets(facts.dataset, compared)
    if all(isinstance(one.outcome, MemoryBudgetError) for one in compared):
        raise typer.Exit(NO_RESOURCES)


def planned(
    dataset: "Path | Dataset",
    memory: str,
    *,
    device: str | None,
    size: Size | None,
    augment: AugmentPolicy | None,
) -> "Plan":
    """A plan, with a bar while the cases are read."""
    with bar("reading") as advance:
        return _plan(
            dataset,
            memory,
            device=device,
            size=size,
            augment=augment,
            progress=lambda done, total, name: advance(done / total, name),
        )


def _plan(
    dataset: "Path | Dataset | Fingerprint",
    memory: str,
    *,
    device: str | None,
    size: Size | None,
    augment: AugmentPolicy | None,
    progress: Callable[[int, int, str], None] | None = None,
) -> "Plan":
    from effseg.planner import plan as make_plan

    chosen = None if size is None else size.value
    return make_plan(
        dataset,
        memory=memory,
        device=device,
        size=chosen,
        augment="default" if augment is None else augment.value,
        progress=progress,
    )


def _read(dataset: Path) -> "Dataset":
    from effseg.dataset import read_dataset

    return read_dataset(dataset)
