"""One student of several trained runs: their knowledge at the cost of one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from effseg.dataset import Case, Dataset
from effseg.errors import CheckpointError, DataError, MemoryBudgetError, PlanError
from effseg.files import name_places
from effseg.planner import check_plan
from effseg.plans import Plan
from effseg.record import PLAN, RECORD, RunRecord
from effseg.training.callbacks import TrainingState
from effseg.training.choices import with_choices
from effseg.training.fit import train

logger = logging.getLogger("effseg")


def distill(
    teachers: Sequence[str | Path],
    dataset: Dataset | str | Path,
    *,
    out: str | Path,
    plan: Plan | str | Path | None = None,
    unannotated: Sequence[Case] = (),
    temperature: float = 2.0,
    weight: float = 0.5,
    minutes: float | None = None,
    epochs: int | None = None,
    fold: int | None = None,
    device: str | None = None,
    seed: int | None = None,
    preparing: Callable[[int, int], None] | None = None,
    progress: Callable[[TrainingState], None] | None = None,
) -> Path:
    """Train a student on labels and on what trained runs say, of scans without labels too.

    A training like any other, and a run like any other in the end, with one more part in the loss:
    the cross-entropy against the mean of the teachers' probabilities at a temperature (Hinton et
    al. 2015, arXiv:1503.02531). Each step asks the teachers about its own patches. It takes one
    teacher's weights more, and two bytes a class and voxel of the batch; the plan's peak counts
    both. Where that is more than the plan's budget, samples of a batch go one after the other, with
    two forwards a step; what does not fit even so is refused.

    Args:
        teachers: folders of runs of the student's channels, labels and spacing.
        dataset: annotated cases.
        out: the student's folder, new.
        plan: of the student; None: the first teacher's.
        unannotated: scans without labels, of which a patch is as likely as of any annotated case.
        temperature: above 0.
        weight: of the teachers' part in the loss, 0 to 1; of unannotated scans only that counts.
        minutes: as `train` takes it.
        epochs: as `train` takes it.
        fold: as `train` takes it; None: the first teacher's.
        device: as `train` takes it.
        seed: as `train` takes it.
        preparing: as `train` takes it.
        progress: as `train` takes it.

    Returns:
        The run's folder, as `train` fills it.

    Raises:
        CheckpointError: if a teacher is no run or does not fit the student.
        DataError: if a scan cannot be read, two have one name, or as `train`.
        MemoryBudgetError: if student and teachers do not fit the plan's budget.
        PlanError: if a choice is out of range, or as `train`.
    """
    folders = [Path(teacher) for teacher in teachers]
    if not folders:
        raise CheckpointError("no teacher; expected one run or more")
    records = [RunRecord.load(folder / RECORD) for folder in folders]
    if plan is None:
        plan = Plan.load(folders[0] / PLAN)
    elif not isinstance(plan, Plan):
        plan = Plan.load(plan)
    plan = with_teachers(
        plan, folders, unannotated=unannotated, temperature=temperature, weight=weight
    )
    plan = with_choices(plan, minutes=None, epochs=None, device=device, seed=None)
    out = train(
        fitting(plan),
        dataset,
        out=out,
        minutes=minutes,
        epochs=epochs,
        fold=records[0].fold or 0 if fold is None else fold,
        device=device,
        seed=seed,
        preparing=preparing,
        progress=progress,
    )
    warn_of_leaks(RunRecord.load(out / RECORD), dict(zip(folders, records, strict=True)))
    return out


def fitting(plan: Plan) -> Plan:
    """A student's plan; with samples one after the other where it only fits its budget so.

    Raises:
        MemoryBudgetError: if it does not fit.
    """
    try:
        return check_plan(plan)
    except MemoryBudgetError as error:
        if plan.sample_by_sample or plan.batch_size == 1:
            raise
        try:
            split = check_plan(plan.model_copy(update={"sample_by_sample": True}))
        except PlanError:  # a network that needs its batch whole
            raise error from None
        logger.warning("%s; samples go one after the other, with two forwards a step", error)
        return split


def with_teachers(
    plan: Plan,
    teachers: Sequence[Path],
    *,
    unannotated: Sequence[Case],
    temperature: float,
    weight: float,
) -> Plan:
    """A plan whose training learns from teachers.

    Where scans have no label the plan gets an ignore label, if it has none: one above its labels.

    Raises:
        DataError: if two scans have one name.
        PlanError: if a choice is out of range.
    """
    scans: dict[str, tuple[str, ...]] = {}
    for case in unannotated:
        if case.name in scans:
            raise DataError(f"two scans are named {case.name}; rename one, or leave it out")
        scans[case.name] = tuple(str(Path(image).absolute()) for image in case.images)
    content = plan.model_dump()
    # what one run learnt from no other does: a student of a student has its own teachers
    content["training"]["distillation"] = {
        "teachers": [str(folder.absolute()) for folder in teachers],
        "temperature": temperature,
        "weight": weight,
        "unannotated": scans,
    }
    if scans and plan.ignore_label is None:
        content["ignore_label"] = 1 + max(label.value for label in plan.labels)
    # how its cut was chosen is the teacher's matter
    content["inference"]["thresholds"] = ()
    content["reasons"].pop("thresholds", None)
    content["reasons"]["temperature"] = (
        f"what {len(teachers)} runs say of each patch is {weight:.0%} of the loss"
        + (f"; {len(scans)} scans without labels are learnt from too" if scans else "")
    )
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        raise PlanError(name_places(error, what="plan")) from error


def warn_of_leaks(student: RunRecord, teachers: Mapping[Path, RunRecord]) -> None:
    """Say where the student's validation is flattered: its teachers know the cases."""
    held_out = set(student.validation)
    for folder, record in teachers.items():
        known = held_out & set(record.train)
        if known and record.dataset == student.dataset:
            logger.warning(
                "%s learnt from %d of the %d cases that the student holds out: its validation says "
                "too much; score it on cases that nobody learnt from, or teach by runs of one fold",
                folder,
                len(known),
                len(held_out),
            )
