"""Which components are removed, and why. A rule sees labels and sizes, never voxels."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from effseg.plans import PostprocessConfig
from effseg.types import Array

DEFAULT_FRACTION = 1 / 3
"""Where one target is expected, a component below a third of its label's largest is noise.

A share and not a volume, so that one rule serves organs and lesions of any size; a third, so that
a target falsely cut in two or even three equal parts is kept, while the specks that a sliding
window leaves behind go. Where a label has several true targets of different size in one image
(metastases beside a primary) the rule would drop real ones: leave it off there and use
`minimum_mm3`.
"""

VOLUME_TOLERANCE = 1e-6
"""Relative: volumes are known no better than spacings are stored, in float32 by NIfTI."""

Rule = Literal["fraction_of_largest", "minimum_mm3"]


@dataclass(frozen=True)
class Removal:
    """What one rule took from one label.

    Attributes:
        label: the label map's value.
        n_components: how many components became background.
        volume_mm3: their volume together.
        rule: which rule they fell under; one that falls under both counts for the first.
        limit_mm3: the volume below which the rule removed components of this label.
    """

    label: int
    n_components: int
    volume_mm3: float
    rule: Rule
    limit_mm3: float


def judge(
    labels: Array, n_voxels: Array, *, voxel_mm3: float, config: PostprocessConfig
) -> tuple[Array, tuple[Removal, ...]]:
    """Decide which of all the components of an image go.

    Args:
        labels: one entry a component, the label map's value.
        n_voxels: one entry a component, its size.
        voxel_mm3: the volume of one voxel.
        config: the rules.

    Returns:
        Which components go, bool, and what each rule took, ordered by label.
    """
    removals: list[Removal] = []
    drop = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        for rule, limit_mm3, small in _rules(n_voxels[members], voxel_mm3, config):
            taken = members[small & ~drop[members]]
            if taken.size:
                drop[taken] = True
                removals.append(
                    Removal(
                        label=int(label),
                        n_components=int(taken.size),
                        volume_mm3=int(n_voxels[taken].sum()) * voxel_mm3,
                        rule=rule,
                        limit_mm3=limit_mm3,
                    )
                )
    return drop, tuple(removals)


def describe(config: PostprocessConfig, removals: Iterable[Removal]) -> str:
    """Say in one line which rule stood and what it removed, for logs and reports."""
    rules = []
    if config.fraction_of_largest is not None:
        share = f"{config.fraction_of_largest:.3g}"
        rules.append(f"smaller than {share} of the largest of their label")
    if config.minimum_mm3 > 0:
        rules.append(f"smaller than {config.minimum_mm3:g} mm3")
    if not rules:
        return "components of every size are kept"
    taken = "; ".join(
        f"label {removal.label}: {removal.n_components} below {removal.limit_mm3:.4g} mm3 "
        f"({removal.rule}), {removal.volume_mm3:.4g} mm3 together"
        for removal in removals
    )
    return f"components {' or '.join(rules)} become background; removed: {taken or 'none'}"


def _rules(
    n_voxels: Array, voxel_mm3: float, config: PostprocessConfig
) -> Iterable[tuple[Rule, float, Array]]:
    """Each rule of the config: its name, its limit, and which of one label's components it hits."""
    if config.fraction_of_largest is not None:
        largest = int(n_voxels.max())
        # The quotient, not the product: 55 / 100 rounds to the same number as the literal 0.55,
        # 0.55 * 100 to one above 55.
        small = n_voxels / largest < config.fraction_of_largest
        yield "fraction_of_largest", config.fraction_of_largest * largest * voxel_mm3, small
    if config.minimum_mm3 > 0:
        limit = config.minimum_mm3 * (1 - VOLUME_TOLERANCE)
        yield "minimum_mm3", config.minimum_mm3, n_voxels * voxel_mm3 < limit
