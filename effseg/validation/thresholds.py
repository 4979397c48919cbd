"""Thresholds of probability and volume, chosen and judged on the cases that runs held out."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import starmap
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field

from effseg.dataset import Case, folds, read_dataset, read_label
from effseg.errors import CheckpointError, DataError, GeometryError
from effseg.evaluation import MarginCounts, best_cuts, labels_at, mean_defined, threshold_of
from effseg.evaluation.margins import NEUTRAL, Floats
from effseg.files import load_model, write_text_whole
from effseg.inference import load_run, write_margins
from effseg.io import SlabReader, read_volume
from effseg.plans import Config, Label, Plan, PostprocessConfig
from effseg.record import PLAN, RECORD, VALIDATION, RunRecord
from effseg.types import Array
from effseg.validation.held_out import held_out
from effseg.validation.smallest import CaseComponents, best_minimum, mean_dice

THRESHOLDS = "thresholds.json"
"""In the folder of a run's predictions of held-out cases."""
MOST_GROUPS = 5
"""Into which the cases of one run are dealt: each is judged by what the others say."""
PLANES = 16
"""Of a case, counted at once."""

Cuts = tuple[int, ...]


class LabelThreshold(Config):
    """What was chosen for one label, and what it brings."""

    value: int = Field(description="the integer in the label map")
    name: str
    threshold: float = Field(gt=0, lt=1, description="of probability, against the background's")
    dice_before: float | None = Field(description="mean over cases, at 0.5")
    dice_after: float | None = Field(description="of each case, at what the other groups say")


class Thresholds(Config):
    """The outcome of a choice, as it lies in RUN/validation/thresholds.json."""

    runs: tuple[str, ...]
    n_cases: int
    n_groups: int = Field(description="of cases, each judged at what the others say")
    labels: tuple[LabelThreshold, ...]
    minimum_mm3: float = Field(ge=0, description="components below are dropped")
    dice_before: float = Field(description="over labels, then cases: at 0.5, the plans' own rules")
    dice_after: float = Field(description="the same, of each case at what the other groups say")
    taken: bool = Field(description="whether the plans have them: they have where it helps")

    def save(self, path: str | Path) -> Path:
        """Write them as JSON.

        Raises:
            DataError: if they cannot be written.
        """
        return write_text_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read them.

        Raises:
            DataError: if the file is missing, is no JSON, or says something impossible.
        """
        hint = "`effseg thresholds` writes it"
        return load_model(cls, path, error=DataError, what="choice of thresholds", hint=hint)


def choose_thresholds(
    runs: str | Path | Sequence[str | Path],
    *,
    memory: str | int | None = None,
    device: str | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Thresholds:
    """Choose by held-out cases how sure and how large a find must be, for runs of one plan.

    For each foreground label the threshold with the best mean Dice over the cases is taken, and
    then the smallest volume of a component. The score they are judged by is honest: cases are
    dealt into groups, those of each run where several held out different ones, else up to five
    groups of whole patients; each group is scored at what the others say. Where that is better than
    the largest logit under the rules the plans have, what all cases say is written into the plans.
    The scores and predictions in RUN/validation stay those of the plan before.

    Each case is predicted once. A byte of margin and one of label a voxel lie on the disk
    meanwhile; counts by margin are in memory, and one case's label maps.

    Args:
        runs: folders of finished runs, each judged on the cases that it held out.
        memory: a budget such as "4GiB" for a prediction, as `effseg.inference.predict` takes it.
        device: as `effseg.inference.predict` takes it.
        progress: called with (share done, the case's name).

    Returns:
        What was chosen, which also lies in RUN/validation/thresholds.json.

    Raises:
        CheckpointError: if a folder is no run, or the runs differ in their labels.
        DataError: if there are less than two groups of cases, or the data set has moved or changed.
        MemoryBudgetError: if a prediction does not fit.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    if not folders:
        raise CheckpointError("no run; expected one or more")
    plans = [Plan.load(folder / PLAN) for folder in folders]
    for folder, plan in zip(folders, plans, strict=True):
        if plan.labels != plans[0].labels:
            raise CheckpointError(
                f"{folders[0]} and {folder} differ in labels; choose thresholds for runs of one "
                "data set, or for each by itself"
            )
    groups = _groups(folders)
    (folders[0] / VALIDATION).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folders[0] / VALIDATION, prefix=".margins-") as scratch:
        judged: list[_Judged] = []
        for folder, plan in zip(folders, plans, strict=True):
            loaded = load_run(folder)
            for case in held_out(folder):
                if progress is not None:
                    progress(len(judged) / len(groups), case.name)
                path = Path(scratch) / f"{len(judged)}.nii.gz"
                write_margins(loaded, case, path, memory=memory, device=device)
                judged.append(_Judged.counted(case, path, plan))
        chosen = _chosen(judged, np.array(groups), [str(folder) for folder in folders], plans[0])
    if progress is not None:
        progress(1.0, "")
    for folder, plan in zip(folders, plans, strict=True):
        if chosen.taken:
            _with_thresholds(plan, chosen).save(folder / PLAN)
        chosen.save(folder / VALIDATION / THRESHOLDS)
    return chosen


@dataclass(frozen=True)
class _Judged:
    """A held-out case whose margins lie on the disk.

    Attributes:
        case: itself.
        codes: the file of its margins.
        plan: of the run that held it out.
        dice: of each label at each cut.
    """

    case: Case
    codes: Path
    plan: Plan
    dice: Floats

    @classmethod
    def counted(cls, case: Case, codes: Path, plan: Plan) -> Self:
        counts = MarginCounts.none(len(plan.labels))
        reference = _reference(case, plan)
        reader = SlabReader(codes)
        if reader.grid.shape != reference.shape:
            raise GeometryError(
                f"{case.name}: image and label differ in shape, {reader.grid.shape} vs "
                f"{reference.shape} voxels; bring the label over with resample_like(...)"
            )
        for start, slab in reader.slabs(PLANES):
            counts.add(slab, reference[start : start + len(slab)])
        return cls(case, codes, plan, counts.dice())

    @property
    def rule(self) -> PostprocessConfig:
        return self.plan.inference.postprocess

    def components(self, cuts: Cuts) -> CaseComponents:
        """Of the case at some cuts."""
        codes = read_volume(self.codes)
        return CaseComponents.of(
            labels_at(codes.array, cuts),
            _reference(self.case, self.plan),
            n_labels=len(self.plan.labels),
            voxel_mm3=codes.grid.voxel_mm3,
        )


def _reference(case: Case, plan: Plan) -> Array:
    """A case's label map by index; what does not count has the index behind the last."""
    array = read_label(case).array
    n_labels = len(plan.labels)
    table = np.full(int(array.max(initial=0)) + 1, n_labels, dtype=np.min_scalar_type(n_labels))
    for index, label in enumerate(plan.labels):
        if label.value < len(table):
            table[label.value] = index
    result: Array = table[array]
    return result


def _groups(folders: Sequence[Path]) -> list[int]:
    """The group of each held-out case, run by run.

    Raises:
        DataError: if there would be less than two.
    """
    cases = [held_out(folder) for folder in folders]
    datasets = [RunRecord.load(folder / RECORD).dataset for folder in folders]
    names = [
        [(root, case.name) for case in some] for root, some in zip(datasets, cases, strict=True)
    ]
    distinct = {name for some in names for name in some}
    if len(folders) > 1 and len(distinct) == sum(map(len, names)):
        return [index for index, some in enumerate(names) for _ in some]
    if len(set(datasets)) > 1:
        raise DataError(
            "the runs held out some cases together and learnt from different data sets; choose "
            "thresholds for runs of one data set"
        )
    found = read_dataset(datasets[0])
    whole = replace(found, cases=tuple(c for c in found.cases if (datasets[0], c.name) in distinct))
    n_groups = min(MOST_GROUPS, len({case.patient or case.name for case in whole.cases}))
    if n_groups < 2:
        raise DataError(
            f"{folders[0]}: held-out cases of one patient; thresholds are judged on other patients "
            "than they are chosen by: give runs of several folds"
        )
    dealt = folds(whole, n_folds=n_groups)
    group_of = {name: index for index, fold in enumerate(dealt) for name in fold.validation}
    return [group_of[name] for some in names for _, name in some]


def _chosen(
    judged: Sequence[_Judged], groups: Array, runs: Sequence[str], plan: Plan
) -> Thresholds:
    @cache
    def components(index: int, cuts: Cuts) -> CaseComponents:
        return judged[index].components(cuts)

    def choose(indices: Iterable[int]) -> tuple[Cuts, float]:
        some = list(indices)
        cuts = best_cuts(np.stack([judged[index].dice for index in some]))
        found = [components(index, cuts) for index in some]
        return cuts, best_minimum(found, judged[some[0]].rule)

    def dice(index: int, cuts: Cuts, minimum_mm3: float | None) -> Floats:
        rule = judged[index].rule
        if minimum_mm3 is not None:
            rule = rule.model_copy(update={"minimum_mm3": minimum_mm3})
        return components(index, cuts).dice(rule)

    neutral = (NEUTRAL,) * (len(plan.labels) - 1)
    everyone = range(len(judged))
    of_others = {
        group: choose(np.flatnonzero(groups != group).tolist()) for group in set(groups.tolist())
    }
    before = [dice(index, neutral, None) for index in everyone]
    after = [dice(index, *of_others[group]) for index, group in enumerate(groups.tolist())]
    cuts, minimum_mm3 = choose(everyone)
    score_before, score_after = mean_dice(before), mean_dice(after)
    rows = zip(
        plan.labels[1:],
        cuts,
        mean_defined(np.stack(before)).tolist(),
        mean_defined(np.stack(after)).tolist(),
        strict=True,
    )

    def row(label: Label, cut: int, dice_before: float, dice_after: float) -> LabelThreshold:
        return LabelThreshold(
            value=label.value,
            name=label.name,
            threshold=threshold_of(cut),
            dice_before=None if np.isnan(dice_before) else dice_before,
            dice_after=None if np.isnan(dice_after) else dice_after,
        )

    return Thresholds(
        runs=tuple(runs),
        n_cases=len(judged),
        n_groups=len(of_others),
        labels=tuple(starmap(row, rows)),
        minimum_mm3=minimum_mm3,
        dice_before=score_before,
        dice_after=score_after,
        taken=score_after > score_before,
    )


def _with_thresholds(plan: Plan, chosen: Thresholds) -> Plan:
    why = (
        f"Dice {chosen.dice_after:.4f} in place of {chosen.dice_before:.4f} on {chosen.n_cases} "
        f"held-out cases, each at what {chosen.n_groups - 1} other groups of them say"
    )
    rule = plan.inference.postprocess.model_copy(update={"minimum_mm3": chosen.minimum_mm3})
    inference = plan.inference.model_copy(
        update={
            "thresholds": tuple(label.threshold for label in chosen.labels),
            "postprocess": rule,
        }
    )
    reasons = {**plan.reasons, "thresholds": why, "postprocess": f"with the thresholds: {why}"}
    return plan.model_copy(update={"inference": inference, "reasons": reasons})
