"""The components of a whole label map.

Pure functions of arrays; all labels are found in one pass of cc3d.

Memory: everything works on a copy of the box around the foreground, where cc3d takes about 4 bytes
a voxel, its component map included (2 bytes a voxel; 4 above 65 535 provisional components). Beside
it stands what is returned: a component map of the whole, or the cleaned copy of the label map.
"""

import cc3d
import numpy as np

from effseg.errors import DataError
from effseg.plans import PostprocessConfig
from effseg.postprocess.rules import Removal, judge
from effseg.postprocess.table import Component, ComponentTable
from effseg.types import Array, Slices3


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
        component i lies; and the components, in the map's order, which is that of their first
        voxels. Without foreground: zeros and an empty tuple.

    Raises:
        DataError: if the array is not three-dimensional or holds no integers.
    """
    check_labels(labels)
    box = foreground_box(labels)
    if box is None:
        return np.zeros(labels.shape, dtype=np.uint16), ()
    part, table = _table(labels[box])
    if part.shape == labels.shape:
        components = part
    else:
        components = np.zeros(labels.shape, dtype=part.dtype)
        components[box] = part
    corner = (box[0].start, box[1].start, box[2].start)
    return components, table.shifted(corner).components(voxel_mm3)


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
    check_labels(labels)
    cleaned = labels.copy()
    if config.fraction_of_largest is None and config.minimum_mm3 == 0:
        return cleaned, ()
    box = foreground_box(labels)
    if box is None:
        return cleaned, ()
    components, table = _table(labels[box])
    drop, removals = judge(table.labels, table.n_voxels, voxel_mm3=voxel_mm3, config=config)
    if removals:
        dropped = np.concatenate([[False], drop])
        # Plane by plane: indexing widens its index to 8 bytes a voxel.
        for plane, numbers in zip(cleaned[box], components, strict=True):
            plane[dropped[numbers]] = 0
    return cleaned, removals


def number_components(labels: Array) -> Array:
    """The component map of `labels` alone; numbers rise with the components' first voxels."""
    numbers: Array = cc3d.connected_components(_fit_for_cc3d(labels), connectivity=26)
    return numbers


def check_labels(labels: Array) -> None:
    """Refuse what is no label map.

    Raises:
        DataError: if the array is not three-dimensional or holds no integers.
    """
    if labels.ndim != 3 or labels.dtype.kind not in "biu":
        raise DataError(
            f"label map of type {labels.dtype} and shape {labels.shape}; expected integers "
            "(z, y, x): take the argmax of probabilities first"
        )


def _fit_for_cc3d(labels: Array) -> Array:
    # cc3d copies what is not contiguous, refuses foreign byte orders and read-only arrays, and
    # miscounts views one voxel wide along two axes, such as a crop around a column; of bool it runs
    # out of numbers in a single row (4.1.1).
    native = np.require(labels, labels.dtype.newbyteorder("="), requirements=["C", "W"])
    return native.view(np.uint8) if native.dtype == bool else native


def _table(labels: Array) -> tuple[Array, ComponentTable]:
    native = _fit_for_cc3d(labels)
    components = number_components(native)
    statistics = cc3d.statistics(components, no_slice_conversion=True)
    n_voxels = statistics["voxel_counts"][1:].astype(np.int64)
    values = np.zeros(n_voxels.size + 1, dtype=native.dtype)
    for numbers, plane in zip(components, native, strict=True):
        values[numbers] = plane
    boxes = statistics["bounding_boxes"][1:].astype(np.int64).reshape(-1, 3, 2)
    return components, ComponentTable(
        ids=np.arange(n_voxels.size),
        labels=values[1:],
        n_voxels=n_voxels,
        starts=boxes[..., 0],
        stops=boxes[..., 1] + 1,
        # A centroid is a sum of whole numbers over a count: rounding restores the sum.
        index_sums=np.rint(statistics["centroids"][1:] * n_voxels[:, None]).astype(np.int64),
        probability_sums=None,
    )
