"""Runs and folders of predictions, by the scores that lie in them."""

from dataclasses import dataclass
from pathlib import Path

from effseg.errors import DataError
from effseg.evaluation import Scores
from effseg.plans import Plan
from effseg.record import PLAN, RECORD, SCORES, VALIDATION, RunRecord


@dataclass(frozen=True)
class Scored:
    """What is compared.

    Attributes:
        name: as it was asked for.
        scores: of its cases.
        plan: None where it is no run.
        record: None where it is no run, or none was written.
    """

    name: str
    scores: Scores
    plan: Plan | None = None
    record: RunRecord | None = None


def read_scored(path: str | Path, *, on: str = VALIDATION) -> Scored:
    """Read the scores of a run, of a folder of predictions, or of a file of scores.

    Args:
        path: a run's folder, a folder with a `metrics.json`, or such a file.
        on: the folder in a run whose scores are meant.

    Raises:
        DataError: if there are no scores, or they cannot be read.
        PlanError: if a run's plan cannot be read.
        CheckpointError: if a run's record cannot be read.
    """
    folder = Path(path)
    if not folder.exists():
        raise DataError(f"{folder}: no such run or folder of predictions")
    if folder.is_file():
        return Scored(str(path), Scores.load(folder))
    is_run = (folder / PLAN).is_file()
    file = folder / on / SCORES if is_run else folder / SCORES
    if not file.is_file():
        hint = "score its predictions with `effseg evaluate --out` that file"
        raise DataError(f"{folder}: no {file.relative_to(folder)} in it; {hint}")
    record = folder / RECORD
    return Scored(
        name=str(path),
        scores=Scores.load(file),
        plan=Plan.load(folder / PLAN) if is_run else None,
        record=RunRecord.load(record) if is_run and record.is_file() else None,
    )
