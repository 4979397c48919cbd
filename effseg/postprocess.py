"""Connected components of a label map, and the removal of those too small to be believed.

Pure functions of arrays. Components are 26-connected (voxels that share a face, an edge or a
corner) and never cross from one label to another; all labels are found in one pass of cc3d.

Memory: everything works on a copy of the box around the foreground, where cc3d takes about 4 bytes
a voxel, its component map included (2 bytes a voxel; 4 above 65 535 provisional components). Beside
it stands what is returned: a component map of the whole, or the cleaned copy of the label map.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import cc3d
import numpy as np

from effseg.errors import DataError
from effseg.plans import PostprocessConfig
from effseg.types import Array, FloatArray, Slices3

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
class Component:
    """One 26-connected region of one label.

    Attributes:
        label: the label map's value in it.
        n_voxels: its size.
        volume_mm3: its volume.
        box: the smallest box around it, (z, y, x).
        centroid_index: mean voxel index (z, y, x) of its voxels, fractional.
    """

    label: int
    n_voxels: int
    volume_mm3: float
    box: Slices3
    centroid_index: tuple[float, float, float]


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


def foreground_box(labels: Array) -> Slices3 | None:
    """The smallest box (z, y, x) that holds every voxel other than 0; None where there is none."""
    box = [slice(0, n) for n in labels.shape]
    for axis in range(3):
        # Each axis is searched inside what the axes before it left over.
        others = tuple(other for other in range(3) if other != axis)
        hits = np.flatnonzero(labels[tuple(box)].any(axis=others))
        if hits.size == 0:
            return None
        box[axis] = slice(int(hits[0]), int(hits[-1]) + 1)
    return (box[0], box[1], box[2])


def label_components(labels: Array, voxel_mm3: float) -> tuple[Array, tuple[Component, ...]]:
    """Number the 26-connected components of every label at once.

    Args:
        labels: integer or bool, (z, y, x); 0 is background, every other value a label.
        voxel_mm3: the volume of one voxel.

    Returns:
        The component map, unsigned integers of the same shape: 0 background, i + 1 where
        component i lies; and the components, in the map's order. Without foreground: zeros and an
        empty tuple.

    Raises:
        DataError: if the array is not three-dimensional or holds no integers.
    """
    _check_labels(labels)
    box = foreground_box(labels)
    if box is None:
        return np.zeros(labels.shape, dtype=np.uint16), ()
    part, table = _components(labels[box])
    starts = np.array([side.start for side in box])
    boxes, centroids = table.boxes + starts[:, None], table.centroids + starts
    if part.shape == labels.shape:
        components = part
    else:
        components = np.zeros(labels.shape, dtype=part.dtype)
        components[box] = part
    return components, tuple(
        Component(
            label=int(label),
            n_voxels=int(n),
            volume_mm3=int(n) * voxel_mm3,
            box=(slice(*bounds[0]), slice(*bounds[1]), slice(*bounds[2])),
            centroid_index=(centroid[0], centroid[1], centroid[2]),
        )
        for label, n, bounds, centroid in zip(
            table.labels, table.n_voxels, boxes.tolist(), centroids.tolist(), strict=True
        )
    )


def remove_components(
    labels: Array, voxel_mm3: float, config: PostprocessConfig
) -> tuple[Array, tuple[Removal, ...]]:
    """Make background of the components that are too small.

    A component goes when its volume is smaller than `config.fraction_of_largest` of the largest
    component of its own label, or smaller than `config.minimum_mm3`. One of exactly the limit
    stays. The largest is taken before anything is removed.

    Args:
        labels: integer or bool, (z, y, x); not modified.
        voxel_mm3: the volume of one voxel.
        config: the rules; with neither set nothing is removed.

    Returns:
        A cleaned copy, same type and shape, and what each rule took, ordered by label. Without
        foreground: a copy and no removals.

    Raises:
        DataError: if the array is not three-dimensional or holds no integers.
    """
    _check_labels(labels)
    cleaned = labels.copy()
    if config.fraction_of_largest is None and config.minimum_mm3 == 0:
        return cleaned, ()
    box = foreground_box(labels)
    if box is None:
        return cleaned, ()
    components, table = _components(labels[box])
    removals: list[Removal] = []
    drop = np.zeros(len(table.labels) + 1, dtype=bool)
    for label in np.unique(table.labels):
        members = np.flatnonzero(table.labels == label)
        for rule, limit_mm3, small in _rules(table.n_voxels[members], voxel_mm3, config):
            taken = members[small & ~drop[members + 1]]
            if taken.size:
                drop[taken + 1] = True
                removals.append(
                    Removal(
                        label=int(label),
                        n_components=int(taken.size),
                        volume_mm3=int(table.n_voxels[taken].sum()) * voxel_mm3,
                        rule=rule,
                        limit_mm3=limit_mm3,
                    )
                )
    if removals:
        # Plane by plane: indexing widens its index to 8 bytes a voxel.
        for plane, numbers in zip(cleaned[box], components, strict=True):
            plane[drop[numbers]] = 0
    return cleaned, tuple(removals)


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


@dataclass(frozen=True)
class _Table:
    """Row i tells of component i + 1."""

    labels: Array
    n_voxels: Array
    boxes: Array  # (n, 3, 2): first and one past the last index along (z, y, x)
    centroids: FloatArray


def _components(labels: Array) -> tuple[Array, _Table]:
    # cc3d copies what is not contiguous, refuses foreign byte orders and read-only arrays, and
    # miscounts views one voxel wide along two axes, such as a crop around a column (4.1.1).
    native = np.require(labels, labels.dtype.newbyteorder("="), requirements=["C", "W"])
    components, n = cc3d.connected_components(native, connectivity=26, return_N=True)
    statistics = cc3d.statistics(components, no_slice_conversion=True)
    values = np.zeros(n + 1, dtype=native.dtype)
    for numbers, plane in zip(components, native, strict=True):
        values[numbers] = plane
    boxes = statistics["bounding_boxes"][1:].astype(np.int64).reshape(n, 3, 2)
    boxes[..., 1] += 1
    return components, _Table(
        labels=values[1:],
        n_voxels=statistics["voxel_counts"][1:].astype(np.int64),
        boxes=boxes,
        centroids=statistics["centroids"][1:],
    )


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


def _check_labels(labels: Array) -> None:
    if labels.ndim != 3 or labels.dtype.kind not in "biu":
        raise DataError(
            f"label map of type {labels.dtype} and shape {labels.shape}; expected integers "
            "(z, y, x): take the argmax of probabilities first"
        )


__all__ = [
    "DEFAULT_FRACTION",
    "Component",
    "Removal",
    "describe",
    "foreground_box",
    "label_components",
    "remove_components",
]
