"""A finished run on the cases it held out: whole volumes, on their own grids."""

from collections.abc import Callable
from pathlib import Path

from effseg.dataset import read_dataset, read_label
from effseg.errors import CheckpointError
from effseg.evaluation import CONVENTIONS, CaseScore, Scores, evaluate_case
from effseg.inference import load_run, predict
from effseg.record import RECORD, SCORES, VALIDATION, RunRecord

TOLERANCE_MM = 1.0


def validate(run: str | Path, *, progress: Callable[[float, str], None] | None = None) -> Scores:
    """Predict and score the cases that a run held out of training.

    Args:
        run: the folder of a finished run.
        progress: called with (share done, the case's name).

    Returns:
        The scores, which also lie in RUN/validation/metrics.json beside the predictions.

    Raises:
        CheckpointError: if the folder is no run, or its record cannot be read.
        DataError: if the data set has moved or changed.
    """
    loaded = load_run(run)
    plan, folder = loaded.plan, loaded.folder / VALIDATION
    record = RunRecord.load(loaded.folder / RECORD)
    names = record.validation
    dataset = read_dataset(record.dataset)
    by_name = {case.name: case for case in dataset.cases}
    labels = {label.value: label.name for label in plan.labels}
    cases: list[CaseScore] = []
    for done, name in enumerate(names):
        if progress is not None:
            progress(done / len(names), name)
        if name not in by_name:
            raise CheckpointError(
                f"{loaded.folder}: case {name} is no longer in {record.dataset}; put it back, or "
                "score other cases with `effseg predict` and `effseg evaluate`"
            )
        case = by_name[name]
        out = folder / f"{name}.nii.gz"
        prediction = predict(loaded, case, out=out)
        score = evaluate_case(
            prediction,
            read_label(case),
            case=name,
            labels=labels,
            ignore_label=plan.ignore_label,
            tolerance_mm=TOLERANCE_MM,
        )
        cases.append(
            score.model_copy(
                update={
                    "prediction": str(out.absolute()),
                    "reference": str(case.label),
                    "image": str(case.images[0]),
                }
            )
        )
    if progress is not None:
        progress(1.0, "")
    scores = Scores(
        tolerance_mm=TOLERANCE_MM,
        ignore_label=plan.ignore_label,
        conventions=CONVENTIONS,
        cases=tuple(cases),
    )
    scores.save(folder / SCORES)
    return scores
