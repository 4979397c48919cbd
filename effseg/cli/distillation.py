"""`effseg distill`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effseg.cli.console import console
from effseg.cli.evaluation import print_scores
from effseg.cli.options import Device, Memory
from effseg.cli.progress import bar, training_bars

if TYPE_CHECKING:
    from effseg.plans import Plan


def distill(
    runs: Annotated[list[Path], typer.Argument(help="the teachers", metavar="RUN...")],
    dataset: Annotated[
        Path, typer.Option("--data", help="annotated cases, as train takes them", metavar="DATASET")
    ],
    out: Annotated[Path, typer.Option("--out", help="the student's folder, new", metavar="RUN")],
    unannotated: Annotated[
        list[Path] | None,
        typer.Option("--unannotated", help="images without labels, or folders of some; repeat"),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="the student's; else: the first teacher's")
    ] = None,
    memory: Memory = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="of the teachers' probabilities")
    ] = 2.0,
    weight: Annotated[
        float, typer.Option("--weight", help="of the teachers' part in the loss, 0 to 1")
    ] = 0.5,
    minutes: Annotated[float | None, typer.Option("--minutes", help="of training")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="in place of minutes")] = None,
    fold: Annotated[
        int | None, typer.Option("--fold", help="which is held out; else: the first teacher's")
    ] = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option("--seed", help="of weights and patches")] = None,
) -> None:
    """Train one student on labels and on what several runs say, validate it, write the report."""
    from effseg import training
    from effseg.dataset import read_dataset
    from effseg.inference import find_images
    from effseg.report import write_report
    from effseg.validation import validate

    found = read_dataset(dataset)
    made = _plan_of(plan or runs[0] / "plan.json", memory)
    scans = find_images(unannotated or (), n_channels=len(made.channels)).values()
    with training_bars(len(found.cases) + len(scans)) as (preparing, progress):
        run = training.distill(
            runs,
            found,
            out=out,
            plan=made,
            unannotated=list(scans),
            temperature=temperature,
            weight=weight,
            minutes=minutes,
            epochs=epochs,
            fold=fold,
            device=device,
            seed=seed,
            preparing=preparing,
            progress=progress,
        )
    with bar("validating") as advance:
        scores = validate(run, progress=advance)
    print_scores(scores)
    console.print(f"[green]run[/] {run}", soft_wrap=True)
    console.print(f"[green]report[/] {write_report(run).resolve()}", soft_wrap=True)


def _plan_of(path: Path, memory: str | None) -> "Plan":
    """The student's plan, with a budget of its own where one is asked for."""
    from effseg.memory import parse_budget
    from effseg.plans import Plan

    made = Plan.load(path)
    if memory is None:
        return made
    budget, _ = parse_budget(memory, made.device)
    return made.model_copy(
        update={"memory": made.memory.model_copy(update={"budget_bytes": budget})}
    )
