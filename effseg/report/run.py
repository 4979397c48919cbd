"""What lies in a run folder, read for the page: plan, record, curves and scores."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from effseg.errors import CheckpointError
from effseg.evaluation import Scores
from effseg.ledger import read_line
from effseg.plans import Plan
from effseg.record import METRICS, PLAN, RATES, RECORD, SCORES, TEST, VALIDATION, RunRecord

Columns = Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        folder: where it lies.
        plan: its plan.
        record: `run.json`; None while the run has not ended.
        columns: `metrics.csv` by column, None for an empty cell; empty without the file.
        rates: `learning_rates.csv` likewise.
        scores: each `NAME/metrics.json` by NAME, `test` and `validation` first.
        line: its line in `runs.csv` by column; None where there is none.
    """

    folder: Path
    plan: Plan
    record: RunRecord | None
    columns: Columns
    rates: Columns
    scores: Mapping[str, Scores]
    line: Mapping[str, str] | None


def read_run(folder: str | Path) -> Run:
    """Read a run folder; everything but the plan may be missing.

    Raises:
        CheckpointError: if there is no folder or no plan in it, or a record is damaged.
        PlanError: if the plan cannot be read.
        DataError: if scores cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a run that effseg train wrote")
    if not (folder / PLAN).is_file():
        raise CheckpointError(
            f"{folder}: holds no {PLAN}, so it is no run; expected the folder that "
            "effseg train --out named"
        )
    record = folder / RECORD
    return Run(
        folder=folder,
        plan=Plan.load(folder / PLAN),
        record=RunRecord.load(record) if record.is_file() else None,
        columns=_read_columns(folder / METRICS),
        rates=_read_columns(folder / RATES),
        scores={
            path.parent.name: Scores.load(path)
            for path in sorted(folder.glob(f"*/{SCORES}"), key=_rank)
        },
        line=read_line(folder),
    )


def _rank(path: Path) -> tuple[int, str]:
    """Unseen cases speak first."""
    name = path.parent.name
    return ({TEST: 0, VALIDATION: 1}.get(name, 2), name)


def _read_columns(path: Path) -> Columns:
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{path}: cannot be read as CSV ({error})") from error
    names = [name for name in (rows[0] if rows else ()) if name]
    return {
        name: tuple(_cell(path, line, name, row[name]) for line, row in enumerate(rows, start=2))
        for name in names
    }


def _cell(path: Path, line: int, name: str, text: str | None) -> float | None:
    """A number, or None for an empty cell; NaN stays, so that the page can tell of it."""
    if text is None or not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise CheckpointError(
            f"{path}: line {line}, column {name}: {text!r}; expected a number or nothing"
        ) from None


def finite(values: tuple[float | None, ...]) -> list[tuple[int, float]]:
    """The rows that hold a finite number, with it."""
    return [(i, v) for i, v in enumerate(values) if v is not None and math.isfinite(v)]
