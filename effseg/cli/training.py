"""`effseg train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effseg.cli.console import console, plain
from effseg.cli.evaluation import print_scores
from effseg.cli.options import (
    Augment,
    Device,
    Memory,
    NetworkName,
    NetworkOptions,
    NetworkSize,
    OptionalDataset,
    network_options,
)
from effseg.cli.plan_tables import print_plan
from effseg.cli.planning import Wanted, planned
from effseg.cli.progress import bar, training_bars
from effseg.cli.splitting import annotated_part
from effseg.errors import PlanError

if TYPE_CHECKING:
    from effseg.plans import Plan


def train(
    context: typer.Context,
    dataset: OptionalDataset = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="the run's folder, new", metavar="RUN")
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="a plan.json")] = None,
    memory: Memory = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="of training")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="in place of minutes")] = None,
    fold: Annotated[int, typer.Option("--fold", help="which fifth is held out, from 0")] = 0,
    device: Device = None,
    devices: Annotated[int, typer.Option("--devices", help="processes that share the work")] = 1,
    seed: Annotated[int | None, typer.Option("--seed", help="of weights and patches")] = None,
    size: NetworkSize = None,
    network: NetworkName = None,
    options: NetworkOptions = None,
    augment: Augment = None,
    external: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="another data set of the same channels and labels, and its share of the patches: "
            "other:0.3; never validated on; repeat",
            metavar="DATASET:SHARE",
        ),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option(
            "--split", help="hold out as a split by `effseg split` says, in place of a fold"
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option("--init-from", help="start from a run's weights, or a file of them"),
    ] = None,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="try learning rates first and take the best")
    ] = False,
    parent: Annotated[
        Path | None,
        typer.Option(
            "--parent",
            help="the run this one is a change of, for runs.csv; else: the newest earlier one",
            metavar="RUN",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="go on with a run that was cut off", metavar="RUN"),
    ] = None,
) -> None:
    """Train as planned, validate the held-out fifth, write the report.

    `touch RUN/stop` ends a training after the step in hand, with all it learnt; so does Ctrl-C.
    """
    if resume is not None:
        _finish(_resumed(context, resume))
        return
    if dataset is None or out is None:
        raise typer.BadParameter("give DATASET and --out RUN, or --resume RUN")
    if (plan is None) == (memory is None):
        raise typer.BadParameter("give --plan PLAN or --memory SIZE, one of the two")
    wanted = Wanted(
        device=device,
        size=size,
        network=network,
        options=network_options(options),
        augment=augment,
    )
    given = {"--size": size, "--network": network, "--network-option": options}
    if plan is not None and any(given.values()):
        name = next(name for name, value in given.items() if value)
        raise typer.BadParameter(f"{name} is for plans that are made here; a --plan has its own")
    from effseg import training
    from effseg.dataset import NineWaySplit, read_dataset

    mixed = [training.parse_external(text) for text in external or ()]
    found = read_dataset(dataset)
    drawn = None if split is None else NineWaySplit.load(split)
    if drawn is not None:  # the others are not looked at, for a plan neither
        found = annotated_part(found, drawn)
    if plan is not None:
        made = _loaded(plan, device)
    else:
        assert memory is not None
        made = planned(found, memory, wanted)
    print_plan(made)
    with training_bars(len(found.cases)) as (preparing, progress):
        run = training.train(
            made if plan is None else plan,  # by its file it is called by its file
            found,
            out=out,
            minutes=minutes,
            epochs=epochs,
            fold=fold,
            device=device,
            devices=devices,
            seed=seed,
            augment=None if augment is None else augment.value,
            preparing=preparing,
            progress=progress,
            find_lr=find_lr,
            init_from=init_from,
            parent=parent,
            external=mixed,
            split=drawn,
        )
    _finish(run)


def _resumed(context: typer.Context, run: Path) -> Path:
    """A run that was cut off, trained to its end."""
    given = [name for name in context.params if _is_given(context, name) and name != "resume"]
    if given:
        raise typer.BadParameter(
            f"--resume goes on as the run was begun; leave {', '.join(given)} out"
        )
    from effseg.record import PLAN, RECORD, SPLIT, RunRecord

    record = RunRecord.load(run / RECORD)
    from effseg import training
    from effseg.dataset import NineWaySplit, read_dataset

    found = read_dataset(record.dataset)
    drawn = NineWaySplit.load(run / SPLIT) if (run / SPLIT).is_file() else None
    if drawn is not None:
        found = annotated_part(found, drawn)
    with training_bars(len(found.cases)) as (preparing, progress):
        return training.train(
            run / PLAN,
            found,
            out=run,
            fold=record.fold or 0,
            devices=record.n_devices or 1,
            split=drawn,
            resume=True,
            preparing=preparing,
            progress=progress,
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _finish(run: Path) -> None:
    """What changed on the way, the scores of the held-out cases, and the report."""
    from effseg.ledger import RUNS, read_line
    from effseg.record import RECORD, RunRecord

    for change in RunRecord.load(run / RECORD).changes:
        console.print(f"epoch {change.epoch}: {plain(change.what)}", soft_wrap=True)
    from effseg.report import write_report
    from effseg.validation import validate

    with bar("validating") as advance:
        scores = validate(run, progress=advance)
    print_scores(scores)
    console.print(f"[green]run[/] {run}", soft_wrap=True)
    line = read_line(run)
    if line is not None:
        against = f"against {line['parent']}: " if line["parent"] else ""
        said = plain(f"{against}{line['changes']}")
        console.print(f"[green]line[/] {run.parent / RUNS}: {said}", soft_wrap=True)
    console.print(f"[green]report[/] {write_report(run).resolve()}", soft_wrap=True)


def _loaded(path: Path, device: str | None) -> "Plan":
    """A plan from its file, whose device is here unless another one is asked for."""
    from effseg.devices import is_present
    from effseg.plans import Plan

    made = Plan.load(path)
    if device is None and not is_present(made.device):
        raise PlanError(
            f"{path}: device: {made.device!r} is not in this machine; name one that is, or give "
            "--device cpu"
        )
    return made
