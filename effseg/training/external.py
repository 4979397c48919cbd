"""Other data sets that a training learns from beside its own, checked at the door."""

from collections.abc import Sequence
from pathlib import Path

from effseg.dataset import Case, Dataset, read_dataset
from effseg.dataset.cases import some
from effseg.errors import DataError, PlanError
from effseg.plans import DataConfig, ExternalData, Plan
from effseg.sources import ImageFiles


def parse_external(text: str) -> ExternalData:
    """What `DATASET:SHARE` says, such as `data/other:0.3`.

    Raises:
        PlanError: if there is no share behind the last colon, or it is not between 0 and 1.
    """
    dataset, _, share = text.rpartition(":")
    try:
        return ExternalData(dataset=dataset, share=float(share))
    except ValueError:
        raise PlanError(
            f"external data {text!r}; expected DATASET:SHARE with a share of the patches between "
            "0 and 1, such as data/other:0.3"
        ) from None


def with_external(plan: Plan, external: Sequence[ExternalData]) -> Plan:
    """The plan with more data sets mixed in.

    Raises:
        PlanError: if together they leave the data set itself no share.
    """
    if not external:
        return plan
    data = plan.data.model_copy(update={"external": (*plan.data.external, *external)})
    try:
        return plan.model_copy(update={"data": DataConfig.model_validate(data.model_dump())})
    except ValueError as error:
        total = sum(one.share for one in data.external)
        raise PlanError(
            f"external data take {total:g} of the patches; expected less than 1: give smaller "
            "shares"
        ) from error


def open_external(plan: Plan, validation: Sequence[Case]) -> tuple[tuple[Case, ...], ...]:
    """The cases of a plan's external data sets, in the plan's order; headers are read, no voxels.

    Args:
        plan: whose channels and labels they must have.
        validation: the cases that are held out, none of which may come back in by this door.

    Raises:
        DataError: if one has other channels or labels than the plan, or holds a case, a file or a
            patient that is validated on.
    """
    found = []
    for one in plan.data.external:
        dataset = read_dataset(one.dataset)
        _check_labels(dataset, plan)
        _check_channels(dataset, plan)
        _check_held_out(dataset, validation)
        found.append(dataset.cases)
    return tuple(found)


def _check_labels(dataset: Dataset, plan: Plan) -> None:
    """What the data set declares; what it does not is seen when its cases are prepared."""
    known = {label.value: label.name for label in plan.labels if label.value}
    theirs = {value: name for value, name in (dataset.labels or {}).items() if value}
    unnamed = {value: f"label_{value}" for value in known}  # of a plan whose data named none
    if theirs and (theirs.keys() != known.keys() or known not in (theirs, unnamed)):
        raise DataError(
            f"{dataset.root}: labels {theirs}; the plan has {known}: external data need the same "
            "values under the same names"
        )
    if dataset.ignore_label is not None and dataset.ignore_label != plan.ignore_label:
        raise DataError(
            f"{dataset.root}: ignore label {dataset.ignore_label}; the plan has "
            f"{plan.ignore_label}: external data need the same"
        )


def _check_channels(dataset: Dataset, plan: Plan) -> None:
    names = tuple(channel.name for channel in plan.channels)
    declared = dataset.channel_names
    unnamed = tuple(f"channel_{i}" for i in range(len(names)))  # of a plan whose data named none
    if declared is not None and (len(declared) != len(names) or names not in (declared, unnamed)):
        raise DataError(
            f"{dataset.root}: channels {declared}; the plan has {names}: external data need the "
            "same in the same order"
        )
    for case in dataset.cases:
        n_channels = ImageFiles.judged(case.images, name=case.name).n_channels
        if n_channels != len(names):
            raise DataError(
                f"{dataset.root}: {case.name} has {n_channels} channels; the plan has "
                f"{len(names)}: external data need the same"
            )


def _check_held_out(dataset: Dataset, validation: Sequence[Case]) -> None:
    names = {case.name for case in validation}
    patients = {case.patient for case in validation} - {None}
    files = {_real(path) for case in validation for path in case.images}
    back = [
        case.name
        for case in dataset.cases
        if case.name in names or case.patient in patients or files & set(map(_real, case.images))
    ]
    if back:
        raise DataError(
            f"{dataset.root}: {some(back)} held out for validation, by name, patient or file; take "
            "them out of the external data, or give other cases other names in a CSV"
        )


def _real(path: Path) -> Path:
    return path.resolve()
