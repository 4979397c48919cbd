"""What a call chooses of a training: its plan, and which cases it learns from."""

import logging
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from effseg.dataset import Dataset, Fold, NineWaySplit, check_there, folds, read_dataset
from effseg.errors import DataError, PlanError
from effseg.files import name_places
from effseg.planner.recipe import with_class_weights
from effseg.plans import Plan, Policy

logger = logging.getLogger("effseg")

N_FOLDS = 5


def opened(plan: Plan | str | Path, dataset: Dataset | str | Path) -> tuple[Plan, Dataset]:
    """A plan and a data set, given as such or as files; class weights are numbers then."""
    return (
        with_class_weights(plan if isinstance(plan, Plan) else Plan.load(plan)),
        dataset if isinstance(dataset, Dataset) else read_dataset(dataset),
    )


def with_choices(
    plan: Plan,
    *,
    minutes: float | None,
    epochs: int | None,
    device: str | None,
    seed: int | None,
    augment: Policy | None = None,
    init_from: str | Path | None = None,
) -> Plan:
    """The plan with a call's own choices in place of its own.

    Raises:
        PlanError: if a choice cannot work; the message names each that cannot.
    """
    content = plan.model_dump()
    if minutes is not None or epochs is not None:
        content["training"] |= {"minutes": minutes, "epochs": epochs}
    if seed is not None:
        content["training"]["seed"] = seed
    if augment is not None:
        content["training"]["augment"] = plan.training.augment.as_content(augment)
    if device is not None:
        content["device"] = device
    if init_from is not None:
        content["training"]["start"]["init_from"] = str(Path(init_from).resolve())
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        raise PlanError(name_places(error, what="plan")) from error


def choose_fold(dataset: Dataset, fold: int, *, loads: Mapping[str, float] | None = None) -> Fold:
    """The cases of one of five folds, or of fewer where there are fewer cases.

    A single case is learnt from and validated on, with a warning: the score then says nothing about
    other cases.

    Args:
        dataset: whose cases are dealt.
        fold: from 0.
        loads: of each case by name, to stratify by; None: not.

    Raises:
        DataError: if there is no labelled case, or one has no load.
        PlanError: if there is no such fold.
    """
    n_cases = len(dataset.cases)
    if n_cases == 0:
        raise DataError(f"{dataset.root}: no labelled case; training needs one at least")
    if n_cases == 1:
        logger.warning("%s has one case: it is validated on what it learns from", dataset.root)
        only = (dataset.cases[0].name,)
        return Fold(train=only, validation=only)
    n_folds = min(N_FOLDS, n_cases)
    if not 0 <= fold < n_folds:
        raise PlanError(f"fold {fold}; there are {n_folds}, counted from 0")
    return folds(dataset, n_folds=n_folds, loads=loads)[fold]


def chosen_cases(
    plan: Plan, dataset: Dataset, fold: int, split: NineWaySplit | None = None
) -> Fold:
    """The cases to learn from and those that are held out: by a fold, or by a split.

    Raises:
        DataError: as `choose_fold` says, or if a case of the split is not in the data set.
        PlanError: as `choose_fold` says, or if both a fold and a split are named.
    """
    if split is None:
        loads = plan.fingerprint.foreground_mm3 if plan.data.stratified else None
        return choose_fold(dataset, fold, loads=loads)
    if fold != 0:
        raise PlanError(f"fold {fold} and a split, which says what is held out; give one of both")
    ours = split.segmenter
    check_there((*ours.train, *ours.validation), dataset.cases, of=split.dataset)
    return Fold(train=ours.train, validation=ours.validation)
