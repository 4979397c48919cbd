"""How small a component may be before it is noise, by the cases that were held out.

Two questions, two answers. After a training, `stricter` drops only what is smaller than every true
find: nothing right is lost. Where thresholds are chosen, `best_minimum` takes the volume with the
best Dice, which may cost a find that is small.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effseg.evaluation import CaseScore, mean_defined
from effseg.evaluation.margins import Counts, Floats
from effseg.plans import Plan, PostprocessConfig
from effseg.postprocess import judge, label_components
from effseg.types import Array

FEWEST_FINDS = 10
"""True finds below which their smallest says nothing of how small a true one gets."""
SAFE_SHARE = 0.8
"""Of the smallest true find: another's may be smaller still."""
MOST_CANDIDATES = 64
"""Volumes that are tried, spread evenly over the components there are."""


def stricter(plan: Plan, found: list[CaseScore]) -> Plan:
    """A plan that drops what is smaller than any true find; the same one where it already does.

    Args:
        plan: one without a smallest volume in its rule is left as it is.
        found: the scores of its predictions.
    """
    rule = plan.inference.postprocess
    finds = [
        lesion.found_mm3
        for case in found
        for score in case.lesions
        for lesion in score.lesions
        if lesion.detected
    ]
    if rule.minimum_mm3 == 0 or len(finds) < FEWEST_FINDS:
        return plan
    limit = SAFE_SHARE * min(finds)
    if limit <= rule.minimum_mm3:
        return plan
    why = (
        f"the smallest of {len(finds)} components found rightly on validation has "
        f"{min(finds):.3g} mm3; below {SAFE_SHARE:.0%} of that is noise"
    )
    inference = plan.inference.model_copy(
        update={"postprocess": rule.model_copy(update={"minimum_mm3": limit})}
    )
    return plan.model_copy(
        update={"inference": inference, "reasons": {**plan.reasons, "postprocess": why}}
    )


@dataclass(frozen=True)
class CaseComponents:
    """The components of a predicted case, and how right they are; labels by their index.

    Attributes:
        labels: of each component.
        n_voxels: of each, its size.
        n_counted: of these, voxels that the reference does not ignore.
        n_hits: of these, voxels whose reference is the component's label.
        reference: voxels of each label in the reference, background first.
        voxel_mm3: of a voxel.
    """

    labels: Array
    n_voxels: Counts
    n_counted: Counts
    n_hits: Counts
    reference: Counts
    voxel_mm3: float

    @classmethod
    def of(
        cls, prediction: Array, reference: Array, *, n_labels: int, voxel_mm3: float
    ) -> "CaseComponents":
        """Find them.

        Args:
            prediction: labels by index, (z, y, x).
            reference: likewise; other values mark voxels that do not count.
            n_labels: background among them.
            voxel_mm3: of a voxel.
        """
        numbers, components = label_components(prediction, voxel_mm3)
        n = len(components) + 1
        size, counted, hits = (np.zeros(n, np.int64) for _ in range(3))
        for plane, guess, true in zip(numbers, prediction, reference, strict=True):
            size += np.bincount(plane.ravel(), minlength=n)
            counted += np.bincount(plane[true < n_labels], minlength=n)
            hits += np.bincount(plane[true == guess], minlength=n)
        of_label = [np.count_nonzero(reference == index) for index in range(n_labels)]
        return cls(
            labels=np.array([component.label for component in components], dtype=np.int64),
            n_voxels=size[1:],
            n_counted=counted[1:],
            n_hits=hits[1:],
            reference=np.array(of_label, dtype=np.int64),
            voxel_mm3=voxel_mm3,
        )

    def dice(self, rule: PostprocessConfig) -> Floats:
        """Of each foreground label under a rule; NaN where neither side has the label."""
        drop, _ = judge(self.labels, self.n_voxels, voxel_mm3=self.voxel_mm3, config=rule)
        n = len(self.reference)
        predicted, hits = (
            np.bincount(self.labels[~drop], weights=counts[~drop], minlength=n)[1:]
            for counts in (self.n_counted, self.n_hits)
        )
        either = predicted + self.reference[1:]
        dice: Floats = np.where(either > 0, 2 * hits / np.maximum(either, 1), np.nan)
        return dice


def mean_dice(dice: Sequence[Floats]) -> float:
    """Of cases: the mean over labels, then over cases, where defined, as scores have it."""
    of_cases = mean_defined(np.stack(dice).T)
    return float(mean_defined(of_cases))


def best_minimum(cases: Sequence[CaseComponents], rule: PostprocessConfig) -> float:
    """The smallest volume, mm3, with the best mean Dice; of equal ones the rule's own, or least.

    Args:
        cases: to be judged by.
        rule: the rest of it stands.
    """
    volumes = np.unique(np.concatenate([case.n_voxels * case.voxel_mm3 for case in cases]))
    if len(volumes) > MOST_CANDIDATES:
        volumes = volumes[np.linspace(0, len(volumes) - 1, MOST_CANDIDATES).round().astype(int)]
    candidates = [rule.minimum_mm3, 0.0, *volumes.tolist()]

    def score(minimum_mm3: float) -> float:
        tried = rule.model_copy(update={"minimum_mm3": minimum_mm3})
        return float(np.nan_to_num(mean_dice([case.dice(tried) for case in cases]), nan=0.0))

    scores = [score(candidate) for candidate in candidates]
    return float(candidates[int(np.argmax(scores))])  # the first of equal ones
