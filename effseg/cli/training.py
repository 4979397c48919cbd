"""`effseg train`."""

from pathlib import Path
from typing import Annotated

import typer

from effseg.cli.console import console
from effseg.cli.evaluation import print_scores
from effseg.cli.options import DatasetPath, Device, Memory
from effseg.cli.plan_tables import print_plan
from effseg.cli.planning import planned
from effseg.cli.progress import bar, training_bars


def train(
    dataset: DatasetPath,
    out: Annotated[Path, typer.Option("--out", help="the run's folder, new", metavar="RUN")],
    plan: Annotated[Path | None, typer.Option("--plan", help="a plan.json")] = None,
    memory: Memory = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="of training")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="in place of minutes")] = None,
    fold: Annotated[int, typer.Option("--fold", help="which fifth is held out, from 0")] = 0,
    device: Device = None,
    devices: Annotated[int, typer.Option("--devices", help="processes that share the work")] = 1,
    seed: Annotated[int | None, typer.Option("--seed", help="of weights and patches")] = None,
) -> None:
    """Train as planned, validate the held-out fifth, write the report."""
    from effseg import training
    from effseg.dataset import read_dataset
    from effseg.plans import Plan

    if (plan is None) == (memory is None):
        raise typer.BadParameter("give --plan PLAN or --memory SIZE, one of the two")
    found = read_dataset(dataset)
    if plan is not None:
        made = Plan.load(plan)
    else:
        assert memory is not None
        made = planned(found, memory, device)
    print_plan(made)
    with training_bars(len(found.cases)) as (preparing, progress):
        run = training.train(
            made,
            found,
            out=out,
            minutes=minutes,
            epochs=epochs,
            fold=fold,
            device=device,
            devices=devices,
            seed=seed,
            preparing=preparing,
            progress=progress,
        )
    from effseg.report import write_report
    from effseg.validation import validate

    with bar("validating") as advance:
        scores = validate(run, progress=advance)
    print_scores(scores)
    console.print(f"[green]run[/] {run}", soft_wrap=True)
    console.print(f"[green]report[/] {write_report(run).resolve()}", soft_wrap=True)
