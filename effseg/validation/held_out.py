"""A finished run on cases it has not learnt from: whole volumes, on their own grids."""

from collections.abc import Sequence
from pathlib import Path

from effseg.dataset import Case, NineWaySplit, read_dataset, read_label
from effseg.errors import CheckpointError
from effseg.evaluation import CONVENTIONS, CaseScore, Scores, evaluate_case
from effseg.inference import CaseProgress, Run, load_run, predict
from effseg.io import read_volume, write_volume
from effseg.ledger import note_run
from effseg.plans import Plan
from effseg.postprocess import remove_components
from effseg.record import PLAN, RECORD, SCORES, SPLIT, TEST, VALIDATION, RunRecord
from effseg.validation.smallest import stricter
from effseg.volume import Volume

TOLERANCE_MM = 1.0


def validate(run: str | Path, *, progress: CaseProgress | None = None) -> Scores:
    """Predict and score the cases that a run held out of training.

    Where the plan's rule drops components below a volume, and all that were found rightly here are
    larger, the run's plan takes the larger volume for its rule: what is smaller was always wrong.
    The scores are those under the rule that stands in the end.

    Args:
        run: the folder of a finished run.
        progress: called with (share done, the case's name).

    Returns:
        The scores, which also lie in RUN/validation/metrics.json beside the predictions;
        the run's line in `runs.csv` has their mean.

    Raises:
        CheckpointError: if the folder is no run, or its record cannot be read.
        DataError: if the data set has moved or changed.
    """
    loaded = load_run(run)
    folder = loaded.folder / VALIDATION
    cases = held_out(loaded.folder)
    found = _predicted(loaded, cases, folder, progress)
    plan = stricter(loaded.plan, found)
    if plan is not loaded.plan:
        plan.save(loaded.folder / PLAN)
        found = [_cleaned(case, _prediction(folder, case), plan) for case in cases]
    scores = _saved(found, plan, folder)
    note_run(loaded.folder)
    return scores


def score_test_set(run: str | Path, *, progress: CaseProgress | None = None) -> Scores:
    """Predict and score the cases that a run's split keeps for testing.

    Nothing is chosen by them: the run's plan stays as it is, and so does its line in `runs.csv`.

    Args:
        run: the folder of a finished run that trained on a split.
        progress: called with (share done, the case's name).

    Returns:
        The scores, which also lie in RUN/test/metrics.json beside the predictions.

    Raises:
        CheckpointError: if the folder is no run, trained on no split, its record cannot be read,
            or a case is gone.
        DataError: if the data set has moved or changed, or the split cannot be read.
    """
    loaded = load_run(run)
    path = loaded.folder / SPLIT
    if not path.is_file():
        raise CheckpointError(
            f"{loaded.folder}: trained on no split, so it keeps no cases for testing; `effseg "
            "split` draws one and `effseg train --split` keeps to it; score other cases with "
            "`effseg predict` and `effseg evaluate`"
        )
    folder = loaded.folder / TEST
    cases = _named(loaded.folder, NineWaySplit.load(path).segmenter.test)
    return _saved(_predicted(loaded, cases, folder, progress), loaded.plan, folder)


def held_out(run: Path) -> list[Case]:
    """The cases that a run held out of training.

    Raises:
        CheckpointError: if its record cannot be read, or a case is gone.
        DataError: if the data set has moved or changed.
    """
    return _named(run, RunRecord.load(run / RECORD).validation)


def _named(run: Path, names: Sequence[str]) -> list[Case]:
    record = RunRecord.load(run / RECORD)
    by_name = {case.name: case for case in read_dataset(record.dataset).cases}
    for name in names:
        if name not in by_name:
            raise CheckpointError(
                f"{run}: case {name} is no longer in {record.dataset}; put it back, or "
                "score other cases with `effseg predict` and `effseg evaluate`"
            )
    return [by_name[name] for name in names]


def _predicted(
    run: Run, cases: Sequence[Case], folder: Path, progress: CaseProgress | None
) -> list[CaseScore]:
    found: list[CaseScore] = []
    for case in cases:
        if progress is not None:
            progress(len(found) / len(cases), case.name)
        out = _prediction(folder, case)
        found.append(_score(predict(run, case, out=out), case, out, run.plan))
    if progress is not None:
        progress(1.0, "")
    return found


def _prediction(folder: Path, case: Case) -> Path:
    return folder / f"{case.name}.nii.gz"


def _saved(found: Sequence[CaseScore], plan: Plan, folder: Path) -> Scores:
    scores = Scores(
        tolerance_mm=TOLERANCE_MM,
        ignore_label=plan.ignore_label,
        conventions=CONVENTIONS,
        cases=tuple(found),
    )
    scores.save(folder / SCORES)
    return scores


def _cleaned(case: Case, out: Path, plan: Plan) -> CaseScore:
    """Bring a prediction under the plan's rule, and score it."""
    given = read_volume(out)
    array, _ = remove_components(given.array, given.grid.voxel_mm3, plan.inference.postprocess)
    prediction = Volume(array=array, grid=given.grid)
    write_volume(prediction, out)
    return _score(prediction, case, out, plan)


def _score(prediction: Volume, case: Case, out: Path, plan: Plan) -> CaseScore:
    score = evaluate_case(
        prediction,
        read_label(case),
        case=case.name,
        labels={label.value: label.name for label in plan.labels},
        ignore_label=plan.ignore_label,
        tolerance_mm=TOLERANCE_MM,
    )
    paths = {
        "prediction": str(out.absolute()),
        "reference": str(case.label),
        "image": str(case.images[0]),
    }
    return score.model_copy(update=paths)
