"""`effseg adversarial`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from effseg.cli.console import console, errors, plain
from effseg.cli.evaluation import print_scores
from effseg.cli.options import DatasetPath, Device, Memory
from effseg.cli.plan_tables import print_plan
from effseg.cli.progress import bar
from effseg.cli.splitting import UNANNOTATED, annotated_part, scans_in

if TYPE_CHECKING:
    from effseg.dataset import Dataset, NineWaySplit
    from effseg.plans import Plan


def adversarial(
    dataset: DatasetPath,
    out: Annotated[Path, typer.Option("--out", help="the run's folder", metavar="RUN")],
    split: Annotated[
        Path | None, typer.Option("--split", help="the nine sets, by `effseg split`")
    ] = None,
    unannotated: Annotated[
        Path | None,
        typer.Option("--unannotated", help=f"{UNANNOTATED}; else: DATASET's", metavar="FOLDER"),
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="a plan.json")] = None,
    memory: Memory = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="at most; else: as the stages need")
    ] = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option("--seed", help="of weights and patches")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with RUN, with its own plan and split")
    ] = False,
) -> None:
    """Train against a discriminator, on few labels and many scans; validate, write the report."""
    if resume and (plan is not None or memory is not None or split is not None):
        raise typer.BadParameter("--resume takes RUN's own plan and split; leave yours out")
    if not resume and ((plan is None) == (memory is None) or split is None):
        raise typer.BadParameter("give --split SPLIT, and --plan PLAN or --memory SIZE")
    from effseg import training
    from effseg.dataset import NineWaySplit, read_dataset

    found = read_dataset(dataset)
    scans = None if unannotated is None else scans_in(unannotated, like=found)
    made: Plan | Path | None = plan
    drawn = None if split is None else NineWaySplit.load(split)
    if memory is not None:
        assert drawn is not None
        made = planned_pair(found, drawn, memory, device=device)
        print_plan(made)
    with contest_bars() as (preparing, progress):
        run = training.train_adversarially(
            made,
            found,
            split=drawn,
            unannotated=scans,
            out=out,
            minutes=minutes,
            device=device,
            seed=seed,
            resume=resume,
            preparing=preparing,
            progress=progress,
        )
    from effseg.record import RECORD, RunRecord
    from effseg.report import write_report
    from effseg.validation import validate

    record = RunRecord.load(run / RECORD)
    for note in record.notes:
        console.print(plain(note), soft_wrap=True)
    with bar("validating") as advance:
        scores = validate(run, progress=advance)
    print_scores(scores)
    console.print(f"[green]run[/] {run}, ended by {record.stopped_by}", soft_wrap=True)
    console.print(f"[green]report[/] {write_report(run).resolve()}", soft_wrap=True)


def planned_pair(
    dataset: "Dataset", split: "NineWaySplit", memory: str, *, device: str | None
) -> "Plan":
    """A plan with room for the discriminator, from the cases that are learnt from or chosen by.

    What the others' labels say is not looked at, though they may be there.
    """
    from effseg.memory import parse_budget
    from effseg.planner import fingerprint
    from effseg.planner import plan as make_plan
    from effseg.planner.machine import choose_device
    from effseg.plans import AdversarialConfig
    from effseg.training import plan_pair

    with bar("reading") as advance:
        facts = fingerprint(
            annotated_part(dataset, split),
            progress=lambda done, total, name: advance(done / total, name),
        )
    budget, _ = parse_budget(memory, choose_device(device)[0])
    parts = {"adversarial": AdversarialConfig()}
    with bar("planning"):
        return plan_pair(
            lambda n_bytes: make_plan(facts, memory=n_bytes, device=device).model_copy(
                update=parts
            ),
            budget,
        )


@contextmanager
def contest_bars() -> Iterator[tuple[Callable[[int, int], None], Callable[..., None]]]:
    """Bars for preparing the cases and for the stage under way."""
    from effseg.training import ContestState

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
    ]
    with Progress(*columns, console=errors) as bars:
        preparing = bars.add_task("preparing", total=None, state="")
        training = bars.add_task("training", total=None, state="")

        def prepared(done: int, total: int) -> None:
            bars.update(preparing, completed=done, total=total)

        def trained(state: ContestState) -> None:
            score = "" if state.score is None else f", now {state.score:.3f}"
            bars.update(
                training,
                description=state.stage,
                completed=state.step,
                total=state.limit,
                state=f"loss {state.loss:.3f}, until {state.criterion}{score}",
            )

        yield prepared, trained
