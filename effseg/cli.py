"""The command line: one verb for each thing the library does.

Exit codes: 0 done, 1 usage, 2 bad input, 3 out of resources, 4 internal.
"""

import errno
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from effseg import __version__
from effseg.errors import DataError, EffsegError

if TYPE_CHECKING:  # the verbs import what they need: `effseg --help` waits for no torch
    from effseg.dataset import Dataset
    from effseg.evaluation import Scores
    from effseg.inference import CaseResult
    from effseg.plans import Plan

USAGE, BAD_INPUT, NO_RESOURCES, INTERNAL, STOPPED = 1, 2, 3, 4, 130

# typer carries click's exceptions, in newer versions as its own copy: take the class from typer
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

SCORE_COLUMNS = {
    "name": "label",
    "dice": "Dice",
    "surface_dice": "surface",
    "hd95_mm": "HD95 mm",
    "assd_mm": "ASSD mm",
    "sensitivity": "lesions found",
    "false_positives_per_case": "false a case",
}

app = typer.Typer(
    name="effseg",
    help="Trains and runs 3-D segmentation networks inside a memory budget that you name.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
errors = Console(stderr=True)

DatasetPath = Annotated[
    Path,
    typer.Argument(
        help="nnU-Net raw or MSD folder, a folder with images/ and labels/, or a CSV of "
        "image,label[,patient]",
        metavar="DATASET",
    ),
]
Memory = Annotated[
    str | None, typer.Option("--memory", help="the budget, e.g. 8GiB or 500MB", metavar="SIZE")
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:1", metavar="DEVICE")
]


class Suite(StrEnum):
    """The benchmark suites."""

    resample = "resample"
    memory = "memory"
    head_loss = "head_loss"
    inference = "inference"


@app.callback(invoke_without_command=True)
def settings(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say what is done")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Set up logging for every verb."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_path=False, show_time=False)],
        force=True,
    )
    if version:
        console.print(f"effseg {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.print(context.get_help())


@app.command()
def check(dataset: DatasetPath) -> None:
    """Audit geometry, labels and duplicates; exit 2 and a table if something is wrong."""
    from effseg.dataset import audit, read_dataset

    found = read_dataset(dataset)
    with _bar("reading") as advance:
        report = audit(found, progress=lambda done, total, name: advance(done / total, name))
    if report.findings:
        table = Table("case", "severity", "what", title=f"{found.name}: {len(report.findings)}")
        for finding in report.findings:
            colour = "red" if finding.severity == "error" else "yellow"
            table.add_row(
                finding.case or "(all)", f"[{colour}]{finding.severity}[/]", _plain(finding.what)
            )
        console.print(table)
    values = ", ".join(f"{value} ({n:,})" for value, n in sorted(report.labels.items()))
    console.print(f"{found.name}: {report.n_cases} cases, labels (voxels): {values}")
    if not report.ok:
        raise typer.Exit(BAD_INPUT)
    console.print("[green]ready to plan[/]")


@app.command()
def plan(
    dataset: DatasetPath,
    memory: Annotated[str, typer.Option("--memory", help="the budget, e.g. 8GiB or 500MB")],
    out: Annotated[Path, typer.Option("--out", help="where the plan goes")] = Path("plan.json"),
    device: Device = None,
) -> None:
    """Look at every case once and plan a training that fits the budget."""
    made = _planned(dataset, memory, device)
    made.save(out)
    _print_plan(made)
    console.print(f"[green]plan[/] {out}", soft_wrap=True)


@app.command()
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
        made = _planned(found, memory, device)
    _print_plan(made)
    with _training_bars(len(found.cases)) as (preparing, progress):
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

    with _bar("validating") as advance:
        scores = validate(run, progress=advance)
    _print_scores(scores)
    console.print(f"[green]run[/] {run}", soft_wrap=True)
    console.print(f"[green]report[/] {write_report(run).resolve()}", soft_wrap=True)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="a run's folder", metavar="RUN")],
    inputs: Annotated[
        list[Path],
        typer.Argument(help="images, folders of images, DICOM folders or zips", metavar="INPUT..."),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder for the label maps")],
    memory: Memory = None,
    tta: Annotated[bool, typer.Option("--tta", help="average over the 8 mirrors")] = False,
    device: Device = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard", help="only the i-th of n shares of the cases, from 1/n to n/n", metavar="i/n"
        ),
    ] = None,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="keep label maps that are there; else: replace them"),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with cases where a run was stopped")
    ] = False,
    skip_constant: Annotated[
        bool, typer.Option("--skip-constant", help="pass windows of one value, air, only once")
    ] = False,
    coarse: Annotated[
        Path | None,
        typer.Option("--coarse", help="a run that finds the region to label", metavar="RUN"),
    ] = None,
    probabilities: Annotated[
        list[int] | None,
        typer.Option("--probabilities", help="a label whose probability is written too; repeat"),
    ] = None,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="write how unsure each voxel is too, in nats")
    ] = False,
) -> None:
    """Label images on their own grids; a case that fails is named and the others go on."""
    from effseg.inference import CaseResult, find_images, load_run, predict_cases, shard_of
    from effseg.memory import PeakResident
    from effseg.plans import format_bytes

    loaded = load_run(run)
    rough = None if coarse is None else load_run(coarse)
    cases = list(find_images(inputs, n_channels=len(loaded.plan.channels)).values())
    n_all = len(cases)
    if shard is not None:
        cases = shard_of(cases, shard)
        console.print(f"shard {shard}: {len(cases) or 'none'} of {n_all} cases")
    results: list[CaseResult] = []
    codes: list[int] = []

    def report(result: CaseResult) -> None:
        results.append(result)
        if result.error is not None:
            message, code = _explained(result.error)
            codes.append(code)
            errors.print(f"[red]failed[/] {_plain(result.name)}: {message}", soft_wrap=True)

    resident = PeakResident().start()
    try:
        with _bar("labelling", len(cases)) as advance:
            predict_cases(
                loaded,
                cases,
                out=out,
                memory=memory,
                tta=tta,
                device=device,
                skip_existing=skip_existing,
                resume=resume,
                skip_constant=skip_constant,
                coarse=rough,
                probabilities=probabilities or (),
                entropy=entropy,
                progress=advance,
                report=report,
            )
    finally:
        peak = format_bytes(resident.stop())
        if results:
            console.print(
                f"{_plain(_counted(results, len(cases)))}; label maps in {_plain(str(out))}; "
                f"peak memory {peak} above what the imports hold",
                soft_wrap=True,
            )
    if codes:
        raise typer.Exit(max(codes))


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="folder or file", metavar="PREDICTIONS")],
    references: Annotated[Path, typer.Argument(help="folder or file", metavar="REFERENCES")],
    out: Annotated[Path, typer.Option("--out", help="where the scores go")] = Path("metrics.json"),
    images: Annotated[
        Path | None, typer.Option("--images", help="folder of the images, for a report")
    ] = None,
    tolerance_mm: Annotated[
        float, typer.Option("--tolerance-mm", help="of the surface Dice")
    ] = 1.0,
    ignore_label: Annotated[
        int | None, typer.Option("--ignore-label", help="left out of the score")
    ] = None,
) -> None:
    """Score label maps against references, in mm, per case, label and lesion."""
    from effseg.evaluation import evaluate as evaluate_all

    with _bar("scoring") as advance:
        scores = evaluate_all(
            predictions,
            references,
            out=out,
            images=images,
            tolerance_mm=tolerance_mm,
            ignore_label=ignore_label,
            progress=lambda done, total: advance(done / max(total, 1), ""),
        )
    _print_scores(scores)
    console.print(f"[green]scores[/] {out}", soft_wrap=True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run's folder", metavar="RUN")]) -> None:
    """Write one self-contained HTML page about a run."""
    from effseg.report import write_report

    console.print(f"[green]report[/] {write_report(run).resolve()}", soft_wrap=True)


@app.command()
def benchmark(
    suite: Annotated[Suite, typer.Option("--suite", help="which suite")] = Suite.memory,
) -> None:
    """Run a benchmark suite of a source checkout: one table, bytes beside seconds."""
    import json
    import subprocess
    import tempfile

    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    script = folder / f"bench_{suite.value}.py"
    if not script.is_file():
        raise DataError(
            f"{script}: not there; the benchmarks come with the source: clone the repository and "
            "install it with `pip install -e .`"
        )
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "record.json"
        command = [sys.executable, "-m", "pytest", str(script), "--benchmark-enable", "--quiet"]
        command += [f"--benchmark-json={record}", "--benchmark-disable-gc", "--benchmark-quiet"]
        command += ["-W", "ignore", "-rs"]
        code = subprocess.call(command, cwd=folder.parent)  # noqa: S603 - our own file
        if code != 0:
            raise typer.Exit(INTERNAL)
        runs = json.loads(record.read_text(encoding="utf-8"))["benchmarks"]
    _print_benchmarks(suite.value, runs)


def main() -> None:
    """Run the command line; every failure is one line and an exit code."""
    try:
        code = app(standalone_mode=False)
        if code == STOPPED:  # what newer typers make of an interrupt; older ones abort
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        errors.print("stopped")
        sys.exit(STOPPED)
    except UsageError as error:
        message = getattr(error, "format_message", error.__str__)()
        errors.print(f"[red]usage[/] {_plain(message)}", soft_wrap=True)
        errors.print("`effseg --help` lists the verbs, `effseg VERB --help` their options")
        sys.exit(USAGE)
    except Exception as error:
        message, code = _explained(error)
        kind = "" if code == INTERNAL else "[red]error[/] "
        errors.print(f"{kind}{message}", soft_wrap=True)
        sys.exit(code)


def _explained(error: Exception) -> tuple[str, int]:
    """A failure in one line of markup, and its exit code."""
    if isinstance(error, EffsegError):
        return _plain(str(error)), error.exit_code
    if isinstance(error, OSError):  # what the system refuses, a read-only folder say, is no bug
        return _plain(str(error)), NO_RESOURCES if error.errno == errno.ENOSPC else BAD_INPUT
    if _is_out_of_memory(error):
        return "out of memory; give a smaller --memory, which plans for less", NO_RESOURCES
    said = " ".join(f"{type(error).__name__}: {error}".split())
    path = _write_traceback(error)
    return f"[red]bug[/] of effseg, please report it with {path}: {_plain(said)}", INTERNAL


def _is_out_of_memory(error: Exception) -> bool:
    """Python says so by a class; torch by words in a RuntimeError, one phrase a device."""
    if isinstance(error, MemoryError):
        return True
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _write_traceback(error: Exception) -> str:
    """A file with an exception's traceback."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="effseg-traceback-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return file.name


def _planned(dataset: "Path | Dataset", memory: str, device: str | None) -> "Plan":
    from effseg.planner import plan as make_plan

    with _bar("reading") as advance:
        return make_plan(
            dataset,
            memory=memory,
            device=device,
            progress=lambda done, total, name: advance(done / total, name),
        )


def _print_plan(made: "Plan") -> None:
    from effseg.plans import format_shape

    table = Table("choice", "value", "because", title=f"plan for {made.dataset}")
    values = {
        "device": made.device,
        "precision": made.precision,
        "spacing": " x ".join(f"{s:.3g}" for s in made.spacing) + " mm",
        "patch_size": format_shape(made.patch_size),
        "batch_size": str(made.batch_size),
        "recompute": made.network.memory,
        "augment": "flip " + (" ".join(made.training.augment.flip_axes) or "none"),
    }
    for choice, why in made.reasons.items():
        table.add_row(choice, values.get(choice, ""), _plain(why))
    console.print(table)


def _print_scores(scores: "Scores") -> None:
    rows = scores.summary()
    if not rows:
        return
    table = Table(title=f"{len(scores.cases)} cases, surface Dice at {scores.tolerance_mm:g} mm")
    for heading in SCORE_COLUMNS.values():
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in SCORE_COLUMNS))
    console.print(table)


def _counted(results: "Sequence[CaseResult]", n_cases: int) -> str:
    """How many cases went which way, and the names of those that failed."""
    failed = [result.name for result in results if result.error is not None]
    kept = sum(result.kept for result in results)
    said = f"{len(results) - len(failed) - kept} predicted"
    if kept:
        said += f", {kept} kept as they were"
    said += f", {len(failed)} failed"
    if failed:
        said += f" ({', '.join(failed)})"
    if len(results) < n_cases:
        said += f", {n_cases - len(results)} not begun"
    return said


def _print_benchmarks(suite: str, runs: list[dict[str, Any]]) -> None:
    """One row a benchmark: the median of its seconds beside what it counted."""
    counted = list(dict.fromkeys(key for run in runs for key in run["extra_info"]))
    numbers = (Column(name, no_wrap=True) for name in ("median s", *counted))
    names = Column("benchmark", overflow="fold", min_width=24)
    table = Table(names, *numbers, title=f"suite {suite}")
    for run in runs:
        cells = (_cell(run["extra_info"].get(key)) for key in counted)
        name = _plain(run["param"] or run["name"])
        table.add_row(name, f"{run['stats']['median']:.4f}", *cells)
    console.print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def _bar(what: str, total: int | None = None) -> Iterator[Callable[[float, str], None]]:
    """A progress bar; the function moves it to (done, of `total` or of 1) and names the item."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if total is not None else TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}"),
    ]
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, total=total or 1, item="")

        def advance(done: float, item: str) -> None:
            bar.update(task, completed=done, item=item)

        yield advance


@contextmanager
def _training_bars(
    n_cases: int,
) -> Iterator[tuple[Callable[[int, int], None], Callable[..., None]]]:
    """Bars for preparing the cases and for training: loss, Dice and the time left."""
    from effseg.training import TrainingState

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
    ]
    with Progress(*columns, console=errors) as bar:
        preparing = bar.add_task("preparing", total=n_cases, state="")
        training = bar.add_task("training", total=1.0, state="")

        def prepared(done: int, total: int) -> None:
            bar.update(preparing, completed=done, total=total)

        def trained(state: TrainingState) -> None:
            left = f"{int(state.seconds_left) // 60}:{int(state.seconds_left) % 60:02d}"
            dice = "" if state.dice is None else f", Dice {state.dice:.3f}"
            bar.update(
                training,
                completed=state.fraction,
                state=f"epoch {state.epoch}, loss {state.loss:.3f}{dice}, {left} left",
            )

        yield prepared, trained


if __name__ == "__main__":
    main()
