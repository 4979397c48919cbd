"""`effseg plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effseg.cli.console import console
from effseg.cli.options import DatasetPath, Device
from effseg.cli.plan_tables import print_plan
from effseg.cli.progress import bar

if TYPE_CHECKING:
    from effseg.dataset import Dataset
    from effseg.plans import Plan


def plan(
    dataset: DatasetPath,
    memory: Annotated[str, typer.Option("--memory", help="the budget, e.g. 8GiB or 500MB")],
    out: Annotated[Path, typer.Option("--out", help="where the plan goes")] = Path("plan.json"),
    device: Device = None,
) -> None:
    """Look at every case once and plan a training that fits the budget."""
    made = planned(dataset, memory, device)
    made.save(out)
    print_plan(made)
    console.print(f"[green]plan[/] {out}", soft_wrap=True)


def planned(dataset: "Path | Dataset", memory: str, device: str | None) -> "Plan":
    """A plan, with a bar while the cases are read."""
    from effseg.planner import plan as make_plan

    with bar("reading") as advance:
        return make_plan(
            dataset,
            memory=memory,
            device=device,
            progress=lambda done, total, name: advance(done / total, name),
        )
