"""A finished run on the cases it held out: whole volumes, on their own grids."""

from collections.abc import Callable
from pathlib import Path

from effseg.dataset import Case, read_dataset, read_label
from effseg.errors import CheckpointError
from effseg.evaluation import CONVENTIONS, CaseScore, Scores, evaluate_case
from effseg.inference import load_run, predict
from effseg.io import read_volume, write_volume
from effseg.ledger import note_run
from effseg.plans import Plan
from effseg.postprocess import remove_components
from effseg.record import PLAN, RECORD, SCORES, VALIDATION, RunRecord
from effseg.validation.smallest import stricter
from effseg.volume import Volume

TOLERANCE_MM = 1.0


def validate(run: str | Path, *, progress: Callable[[float, str], None] | None = None) -> Scores:
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
    outs = [folder / f"{case.name}.nii.gz" for case in cases]
    found: list[CaseScore] = []
    for case, out in zip(cases, outs, strict=True):
        if progress is not None:
            progress(len(found) / len(cases), case.name)
        found.append(_score(predict(loaded, case, out=out), case, out, loaded.plan))
    plan = stricter(loaded.plan, found)
    if plan is not loaded.plan:
        plan.save(loaded.folder / PLAN)
        found = [_cleaned(case, out, plan) for case, out in zip(cases, outs, strict=True)]
    if progress is not None:
        progress(1.0, "")
    scores = Scores(
        tolerance_mm=TOLERANCE_MM,
        ignore_label=plan.ignore_label,
        conventions=CONVENTIONS,
        cases=tuple(found),
    )
    scores.save(folder / SCORES)
    note_run(loaded.folder)
    return scores


def held_out(run: Path) -> list[Case]:
    """The cases that a run held out of training.

    Raises:
        CheckpointError: if its record cannot be read, or a case is gone.
        DataError: if the data set has moved or changed.
    """
    record = RunRecord.load(run / RECORD)
    by_name = {case.name: case for case in read_dataset(record.dataset).cases}
    for name in record.validation:
        if name not in by_name:
            raise CheckpointError(
                f"{run}: case {name} is no longer in {record.dataset}; put it back, or "
                "score other cases with `effseg predict` and `effseg evaluate`"
            )
    return [by_name[name] for name in record.validation]


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
