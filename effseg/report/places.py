"""Where a case is worth looking at: the voxel to cut through, and the box to show."""

from typing import Literal, TypeAlias

import numpy as np
from scipy import ndimage

from effseg.types import Array, Shape3, Slices3, Spacing
from effseg.volume import Grid

Point: TypeAlias = tuple[float, float, float]
"""Of the world, (z, y, x) in mm."""

CONTEXT, LEAST_CONTEXT_MM = 0.3, 12.0
"""Shown around what is labelled: this share of its extent on each side, and never less."""

DENSE_MM = 5.0
"""Errors are dense where many lie in a cube of this edge."""


def nearest_voxel(grid: Grid, point: Point) -> Shape3:
    """The voxel next to a point."""
    index = np.rint(grid.world_to_index(np.asarray(point))).astype(int)
    z, y, x = np.clip(index, 0, np.asarray(grid.shape) - 1).tolist()
    return z, y, x


def find_place(
    truth: Array,
    wrong: Array,
    spacing: Spacing,
    *,
    through: Literal["error", "centre"],
    most: str,
) -> tuple[Shape3, str]:
    """The voxel through which to cut, and words for it.

    Args:
        truth: the reference, (z, y, x).
        wrong: bool, what is looked for.
        spacing: mm, (z, y, x).
        through: where `wrong` is densest, or the reference's centre; where there is no such place
            the other, or the middle of the volume.
        most: of what there is most where `wrong` is densest, in words.
    """
    if wrong.any() and (through == "error" or not truth.any()):
        size = [max(1, 2 * round(DENSE_MM / s / 2) + 1) for s in spacing]
        near = _around(wrong)
        density = ndimage.uniform_filter(wrong[near].astype(np.float32), size=size, mode="constant")
        found = np.unravel_index(np.argmax(density * wrong[near]), density.shape)
        z, y, x = (int(i) + part.start for i, part in zip(found, near, strict=True))
        return (z, y, x), f"planes where {most}"
    if truth.any():
        return _centre(truth > 0), "planes through the centre of the reference"
    z, y, x = (n // 2 for n in truth.shape)
    return (z, y, x), "planes through the middle: nothing is labelled"


def _centre(mask: Array) -> Shape3:
    """A set voxel next to the centre, which of a curved shape may lie outside it."""
    sums = (mask.sum(axis=(1, 2)), mask.sum(axis=(0, 2)), mask.sum(axis=(0, 1)))
    middle = [float(n @ np.arange(n.size)) / float(n.sum()) for n in sums]
    (filled,) = np.nonzero(sums[0])
    z = int(filled[np.abs(filled - middle[0]).argmin()])
    plane = np.argwhere(mask[z])
    y, x = plane[((plane - middle[1:]) ** 2).sum(axis=1).argmin()].tolist()
    return z, y, x


def _around(mask: Array) -> Slices3:
    """The bounding box of what is set; the whole array where nothing is."""
    found = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        (at,) = np.nonzero(mask.any(axis=others))
        found.append(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, mask.shape[axis]))
    return (found[0], found[1], found[2])


def shown_box(mask: Array, spacing: Spacing) -> Slices3:
    """What is shown: the bounding box and context around it, inside the volume."""
    parts = []
    for part, n, step in zip(_around(mask), mask.shape, spacing, strict=True):
        extent_mm = (part.stop - part.start) * step
        margin = round(max(CONTEXT * extent_mm, LEAST_CONTEXT_MM) / step)
        parts.append(slice(max(0, part.start - margin), min(n, part.stop + margin)))
    return (parts[0], parts[1], parts[2])
