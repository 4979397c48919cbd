"""Runs, the folds of one, and folders of predictions, by the scores that lie in them."""

from collections.abc import Sequence
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
        plan: of a run, or of the first of several; None where it is none.
        record: None where it is no single run, or none was written.
    """

    name: str
    scores: Scores
    plan: Plan | None = None
    record: RunRecord | None = None


def read_scored(path: str | Path, *, on: str = VALIDATION) -> Scored:
    """Read the scores of a run, of a folder of runs or of predictions, or of a file of scores.

    Args:
        path: a run's folder; one that holds the runs of several folds, whose cases are taken
            together; a folder with a `metrics.json`, or such a file.
        on: the folder in a run whose scores are meant.

    Raises:
        DataError: if there are no scores, they cannot be read, or runs of one folder scored the
            same case or scored differently.
        PlanError: if a run's plan cannot be read.
        CheckpointError: if a run's record cannot be read.
    """
    folder = Path(path)
    if not folder.exists():
        raise DataError(f"{folder}: no such run or folder of predictions")
    if folder.is_file():
        return Scored(str(path), Scores.load(folder))
    is_run = (folder / PLAN).is_file()
    folds = [plan.parent for plan in sorted(folder.glob(f"*/{PLAN}"))]
    if folds and not is_run and not (folder / SCORES).is_file():
        return _together(str(path), [read_scored(fold, on=on) for fold in folds])
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


def _together(name: str, folds: Sequence[Scored]) -> Scored:
    """The runs of several folds as one evaluation."""
    first, seen = folds[0], dict[str, str]()
    for fold in folds:
        for what in ("tolerance_mm", "ignore_label"):
            ours, theirs = (getattr(one.scores, what) for one in (first, fold))
            if ours != theirs:
                raise DataError(
                    f"{first.name} was scored with {what} {ours} and {fold.name} with {theirs}; "
                    "score both alike"
                )
        for case in fold.scores.cases:
            if case.case in seen:
                raise DataError(
                    f"case {case.case} is scored in {seen[case.case]} and in {fold.name}; expected "
                    f"runs of different folds in {name}: compare others one by one"
                )
            seen[case.case] = fold.name
    cases = tuple(case for fold in folds for case in fold.scores.cases)
    return Scored(name, first.scores.model_copy(update={"cases": cases}), plan=first.plan)
