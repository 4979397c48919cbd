"""Bring a volume to a spacing or onto a grid: exact in world millimetres, lean, box by box.

Both functions place voxels by the world coordinates of the two grids, so that nothing shifts, not
by half a voxel and not by a hundredth of a millimetre.
"""

import math

import numpy as np

from effseg.errors import DataError, GeometryError
from effseg.resample.axis import AxisWeights
from effseg.resample.boxes import IMAGE, LABEL, fill_target
from effseg.resample.image_slabs import resample_slabs, resampling_bytes
from effseg.resample.labelling import (
    LabelSlab,
    first_needed,
    label_slabs,
    labelling_bytes,
    logits_to_labels,
    needs,
)
from effseg.resample.mapping import ObliqueMapping, Passage, SeparableMapping
from effseg.resample.maps import Maps
from effseg.resample.slabs import SLAB_PLANES, AffineHead, Slab, Slabs
from effseg.types import Array, Spacing
from effseg.volume import Grid, Volume

__all__ = [
    "SLAB_PLANES",
    "AffineHead",
    "AxisWeights",
    "LabelSlab",
    "Maps",
    "ObliqueMapping",
    "Passage",
    "SeparableMapping",
    "Slab",
    "Slabs",
    "first_needed",
    "label_slabs",
    "labelling_bytes",
    "logits_to_labels",
    "needs",
    "resample_like",
    "resample_slabs",
    "resample_to_spacing",
    "resampling_bytes",
]

_MAX_VOXELS = 2**31
_MIB = 1 << 20


def resample_to_spacing(volume: Volume, spacing: Spacing, *, label: bool = False) -> Volume:
    """Resample a volume to a spacing, over the same field of view and about the same centre.

    Args:
        volume: what to resample.
        spacing: the new spacing (z, y, x) in mm.
        label: whether the voxels are labels; see `resample_like`.

    Returns:
        The volume on `volume.grid.with_spacing(spacing)`.

    Raises:
        GeometryError: if the spacing is not three positive numbers, or the result would have more
            than 2^31 voxels.
        DataError: as `resample_like`.
    """
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise GeometryError(
            f"resample to spacing {tuple(spacing)}; expected three positive lengths in mm (z, y, x)"
        )
    z, y, x = (float(s) for s in spacing)
    return resample_like(volume, volume.grid.with_spacing((z, y, x)), label=label)


def resample_like(volume: Volume, grid: Grid, *, label: bool = False, fill: float = 0) -> Volume:
    """Resample a volume onto a grid: any spacing, axis order and direction.

    Images are interpolated linearly, in float32. Where a voxel of the grid is wider than the
    volume's, along an axis, it takes the mean of what it covers rather than a sample of it: fine
    detail becomes grey instead of false, coarse patterns. Labels are interpolated as one 0/1 image
    each, and the one with the largest share of a voxel has it; where shares are equal, the larger
    label, so that a thin structure outlives a tie with the background. No label arises that was
    not there.

    Where the two grids' axes are parallel, up to order and direction, each axis is interpolated by
    itself; otherwise all three at once, which takes several times as long. Work goes box by box:
    beside the result it needs a tenth of its bytes, but not less than 2 MiB or more than 4. A
    memory-mapped volume is read a box at a time.

    Args:
        volume: what to resample; channels are resampled one by one.
        grid: where its voxels shall lie.
        label: whether the voxels are labels.
        fill: stands where the volume has no field of view, which ends half a voxel beyond its
            outermost voxel centres. Up to there the border voxels are repeated.

    Returns:
        A volume on `grid`: float32, or for labels the type they came in. On the volume's own grid
        it is the volume's own array, shared and untouched, whatever its type.

    Raises:
        GeometryError: if the result would have more than 2^31 voxels.
        DataError: if an image is not of real numbers or holds NaN or infinite ones, if labels are
            not of an integer type or bool, or if `fill` is no such label.
    """
    _check_size(volume, grid)
    dtype = _result_type(volume.array, label=label, fill=fill)
    passage = Passage.between(volume.grid, grid)
    if passage.mapping.is_identity and passage.source_axes == passage.target_axes:
        return Volume(array=volume.array, grid=grid)
    result = np.empty((*volume.array.shape[:-3], *grid.shape), dtype=dtype)
    # Larger boxes leave the processor's cache and are given fresh pages each time.
    limit_bytes = min(max(result.nbytes // 10, 2 * _MIB), 4 * _MIB)
    sources = passage.source_axes.apply(volume.array)
    targets = passage.target_axes.apply(result)
    if volume.array.ndim == 3:
        sources, targets = sources[None], targets[None]
    for source, target in zip(sources, targets, strict=True):
        fill_target(
            target,
            source,
            mapping=passage.mapping,
            interpolation=LABEL if label else IMAGE,
            fill=fill,
            limit_bytes=limit_bytes,
        )
    return Volume(array=result, grid=grid)


def _check_size(volume: Volume, grid: Grid) -> None:
    n_voxels = volume.n_channels * grid.n_voxels
    if n_voxels > _MAX_VOXELS:
        raise GeometryError(
            f"resampling {volume.grid.shape} voxels of {volume.grid.spacing} mm to {grid.shape} "
            f"of {grid.spacing} mm makes {n_voxels:,} voxels; expected at most {_MAX_VOXELS:,}: "
            "check that both spacings are in mm, or take a coarser one or a part of the grid"
        )


def _result_type(array: Array, *, label: bool, fill: float) -> np.dtype[np.generic]:
    if not label:
        if array.dtype.kind not in "biuf":
            raise DataError(f"image of type {array.dtype}; expected real numbers")
        return np.dtype(np.float32)
    if array.dtype.kind not in "biu":
        raise DataError(
            f"label of type {array.dtype}; expected integers or bool: make sure that it holds "
            "whole numbers, and cast it with array.astype"
        )
    low, high = (0, 1) if array.dtype.kind == "b" else _limits(array)
    if not low <= fill <= high or fill != int(fill):
        raise DataError(f"fill {fill} for labels of type {array.dtype}; expected a label")
    return array.dtype.newbyteorder("=")


def _limits(array: Array) -> tuple[int, int]:
    limits = np.iinfo(array.dtype)
    return int(limits.min), int(limits.max)
