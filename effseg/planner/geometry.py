"""Spacing, stages and patches: what follows from the sizes and spacings of the cases."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from effseg.plans import Fingerprint, total_stride
from effseg.types import Shape3, Spacing

ANISOTROPY = 3.0
"""From this ratio of spacings on, the coarse axis is planned for its finer cases."""
SHORTEST = 4
"""The coarsest stage keeps at least so many voxels along an axis that was downsampled."""
MOST_STAGES = 6


@dataclass(frozen=True)
class Stages:
    """Strides and kernels of a U-Net for one patch.

    Attributes:
        strides: into each stage, the first (1, 1, 1).
        kernels: of each stage.
    """

    strides: tuple[Shape3, ...]
    kernels: tuple[Shape3, ...]

    @property
    def total_stride(self) -> Shape3:
        """Voxels per voxel of the coarsest stage."""
        return total_stride(self.strides)


def target_spacing(fingerprint: Fingerprint) -> tuple[Spacing, str]:
    """The spacing to train at, and why.

    The median of each axis. Where one axis is coarser than the others by a factor of 3, the 10th
    percentile of that axis, but never finer than the others: the thin-slice cases keep their
    detail. The rule is nnU-Net's (Isensee et al., Nature Methods 2021).
    """
    spacings = np.asarray(fingerprint.spacings)
    median = np.median(spacings, axis=0)
    coarse = int(np.argmax(median))
    others = np.delete(median, coarse)
    shapes = np.median(np.asarray(fingerprint.shapes), axis=0)
    thick = median[coarse] > ANISOTROPY * others.max()
    flat = shapes[coarse] * ANISOTROPY < np.delete(shapes, coarse).min()
    if thick and flat:
        fine = max(float(np.percentile(spacings[:, coarse], 10)), float(others.max()))
        why = (
            f"median per axis; axis {'zyx'[coarse]} is {median[coarse] / others.max():.1f} times "
            f"coarser than the others, so its 10th percentile, {fine:.3g} mm"
        )
        median[coarse] = fine
    else:
        why = "median per axis"
    z, y, x = (round(float(value), 6) for value in median)
    return (z, y, x), f"{why}; the {fingerprint.n_cases} cases lie between " + _range(spacings)


def median_shape(fingerprint: Fingerprint, spacing: Spacing) -> Shape3:
    """The median size of the cases once they are at `spacing`, voxels."""
    sizes = np.asarray(fingerprint.shapes) * np.asarray(fingerprint.spacings) / np.asarray(spacing)
    z, y, x = (max(1, round(float(n))) for n in np.median(sizes, axis=0))
    return (z, y, x)


def stages_for(patch: Shape3, spacing: Spacing) -> Stages:
    """Downsample while it pays: an axis as long as it has voxels and is not coarser than others.

    An axis is halved while at least `SHORTEST` voxels remain and its spacing is below twice the
    finest of the axes that can still be halved; its kernel is 3 from where its spacing is below
    twice the finest of all, else 1.
    """
    strides: list[Shape3] = [(1, 1, 1)]
    kernels: list[Shape3] = []
    sizes, gaps = [float(n) for n in patch], [float(s) for s in spacing]
    wide = [False] * 3
    while True:
        wide = [was or gap < 2 * min(gaps) for was, gap in zip(wide, gaps, strict=True)]
        kz, ky, kx = (3 if is_wide else 1 for is_wide in wide)
        kernels.append((kz, ky, kx))
        able = [axis for axis in range(3) if sizes[axis] >= 2 * SHORTEST]
        finest = min((gaps[axis] for axis in able), default=0.0)
        halved = [axis in able and gaps[axis] < 2 * finest for axis in range(3)]
        if not any(halved) or len(strides) == MOST_STAGES:
            return Stages(strides=tuple(strides), kernels=tuple(kernels))
        z, y, x = (2 if half else 1 for half in halved)
        strides.append((z, y, x))
        for axis, step in enumerate((z, y, x)):
            sizes[axis], gaps[axis] = math.ceil(sizes[axis] / step), gaps[axis] * step


def shrinking_patches(median: Shape3, spacing: Spacing) -> Iterator[tuple[Shape3, Stages]]:
    """Patches from the whole median case down to the smallest worth training on.

    Each is a multiple of its network's total stride, the first the one nearest to the median case:
    rounding up would spend up to half of every step on padding. The next one gives up one step of
    the axis that is longest in mm, so patches approach equal lengths in mm.
    """
    wanted = list(median)
    seen: set[Shape3] = set()
    while True:
        stages = stages_for((wanted[0], wanted[1], wanted[2]), spacing)
        stride = stages.total_stride
        z, y, x = (max(1, math.floor(n / s + 0.5)) * s for n, s in zip(wanted, stride, strict=True))
        if (z, y, x) not in seen:
            seen.add((z, y, x))
            yield (z, y, x), stages
        lengths = [
            n * gap if n > 2 * SHORTEST else 0.0 for n, gap in zip((z, y, x), spacing, strict=True)
        ]
        if not any(lengths):
            return
        axis = int(np.argmax(lengths))
        wanted = [z, y, x]
        wanted[axis] = max(2 * SHORTEST, wanted[axis] - max(stride[axis], 4))


def patches_of_stride(median: Shape3, spacing: Spacing, stride: int) -> Iterator[Shape3]:
    """Patches from the median case down, each length a multiple of one stride.

    As `shrinking_patches`, for a network whose stages are its own; at least two strides long where
    the case is.
    """
    most = [max(1, math.floor(n / stride + 0.5)) for n in median]
    step = max(1, SHORTEST // stride)
    while True:
        z, y, x = (n * stride for n in most)
        yield (z, y, x)
        lengths = [n * gap if n > 2 * step else 0.0 for n, gap in zip(most, spacing, strict=True)]
        if not any(lengths):
            return
        most[int(np.argmax(lengths))] -= step


def _range(spacings: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    if np.allclose(low, high):
        return "equal spacings"
    return (
        " and ".join("(" + ", ".join(f"{v:.3g}" for v in row) + ")" for row in (low, high)) + " mm"
    )
