"""The line of a run: what it is made of, and which run it is held against."""

import logging
import os
from pathlib import Path

from effseg.errors import CheckpointError, EffsegError
from effseg.evaluation import Scores, mean_interval
from effseg.ledger.changes import list_changes
from effseg.ledger.table import COLUMNS, RunTable, put_line
from effseg.plans import Plan
from effseg.record import PLAN, RECORD, SCORES, VALIDATION, RunRecord

RUNS = "runs.csv"
"""Beside the runs' folders."""

FIRST = "the first run on these data here"
SAME = "nothing: the same plan, data and seed"

logger = logging.getLogger("effseg")


def add_run(run: str | Path, *, parent: str | Path | None = None) -> Path:
    """Add a run's line to `runs.csv` beside its folder, or bring the line up to what is there now.

    Cells of a person's own, `conclusion` and added columns, stay as they are.

    Args:
        run: the folder of a run that has ended; its score may still be missing.
        parent: the run whose differences are told. None: the one that the line already names, or
            else the newest earlier run on the same data set in the same folder.

    Returns:
        The table's file.

    Raises:
        CheckpointError: if run or parent is no run.
        PlanError: if the run's plan cannot be read.
        DataError: if the table or the scores cannot be read, or the table cannot be written.
    """
    folder = Path(run).absolute()
    path = folder.parent / RUNS
    record, plan = RunRecord.load(folder / RECORD), Plan.load(folder / PLAN)
    started = "" if record.started is None else record.started.isoformat(" ")
    if parent is not None:
        check_parent(parent)
        origin: Path | None = Path(parent).absolute()
    else:
        told = _told_parent(path, folder.name, started)
        origin = folder.parent / told if told else _newest_before(folder, record)
    line = {
        "run": folder.name,
        "started": started,
        "data": Path(record.dataset).name,
        "minutes": _number(record.minutes, 1),
        "steps": _number(record.steps, 0),
        "stopped_by": record.stopped_by,
        **_score(folder, record),
    }
    if record.memory is not None:
        line |= {
            "peak_mib": _mebi(record.memory.measured_peak_bytes),
            "predicted_mib": _mebi(record.memory.predicted_peak_bytes),
            "budget_mib": _mebi(record.memory.budget_bytes),
        }
    if origin is None:
        line |= {"parent": "", "changes": FIRST}
    elif (origin / PLAN).is_file():  # else it has gone: what was told of it stays
        line |= {
            "parent": Path(os.path.relpath(origin, folder.parent)).as_posix(),
            "changes": _changes(origin, plan, record),
        }
    put_line(path, line)
    return path


def note_run(run: str | Path, *, parent: str | Path | None = None) -> None:
    """As `add_run`, at the end of a training: what stands in the way of a line is a warning."""
    try:
        add_run(run, parent=parent)
    except EffsegError as error:
        logger.warning("no line in the table of runs: %s", error)


def check_parent(parent: str | Path) -> None:
    """Refuse what is no run, before a training begins that is to be held against it.

    Raises:
        CheckpointError: if it has no plan or no record.
    """
    for name in (PLAN, RECORD):
        if not (Path(parent) / name).is_file():
            raise CheckpointError(
                f"{parent}: no {name}, so it is no run to compare with; name the folder of an "
                "earlier `effseg train --out`"
            )


def read_line(run: str | Path) -> dict[str, str] | None:
    """A run's line by column; None where no table has one, or it cannot be read."""
    folder = Path(run).absolute()
    try:
        table = RunTable.read(folder.parent / RUNS)
        record = RunRecord.load(folder / RECORD)
    except EffsegError:
        return None
    row = table.find(folder.name, "" if record.started is None else record.started.isoformat(" "))
    if row is None:
        return None
    return dict.fromkeys(COLUMNS, "") | dict(zip(table.header, row, strict=False))


def _told_parent(path: Path, run: str, started: str) -> str:
    table = RunTable.read(path)
    row = table.find(run, started)
    return "" if row is None else table.cell(row, "parent")


def _newest_before(folder: Path, record: RunRecord) -> Path | None:
    """The run beside this one that began last before it, on the same data."""
    if record.started is None:
        return None
    best: tuple[float, Path] | None = None
    for path in sorted(folder.parent.glob(f"*/{RECORD}")):
        if path.parent == folder or not path.with_name(PLAN).is_file():
            continue
        try:
            other = RunRecord.load(path)
        except CheckpointError:
            continue  # a damaged neighbour is no reason to lose this run's line
        if other.started is None or other.dataset != record.dataset:
            continue
        began = other.started.timestamp()
        if began < record.started.timestamp() and (best is None or began >= best[0]):
            best = (began, path.parent)
    return None if best is None else best[1]


def _changes(origin: Path, plan: Plan, record: RunRecord) -> str:
    try:
        parent = Plan.load(origin / PLAN)
        before = RunRecord.load(origin / RECORD) if (origin / RECORD).is_file() else None
    except EffsegError as error:  # of another version, say: the rest of the line is true
        return f"cannot be told: {error}"
    return "; ".join(list_changes((parent, before), (plan, record))) or SAME


def _score(folder: Path, record: RunRecord) -> dict[str, str]:
    path = folder / VALIDATION / SCORES
    scores = Scores.load(path) if path.is_file() else None
    values = [] if scores is None else [case.mean("dice") for case in scores.cases]
    known = [value for value in values if value is not None]
    if known:
        interval = mean_interval(known)
        return {
            "score": _number(sum(known) / len(known), 4),
            "score_low": "" if interval is None else _number(interval.low, 4),
            "score_high": "" if interval is None else _number(interval.high, 4),
            "score_of": f"mean Dice of {len(known)} validation case{'s' if len(known) > 1 else ''}",
        }
    best = None if record.best_score is None or record.best_score < 0 else record.best_score
    return {
        "score": _number(best, 4),
        "score_low": "",
        "score_high": "",
        "score_of": "" if best is None else "best Dice of validation patches",
    }


def _number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def _mebi(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 2**20:.0f}"
