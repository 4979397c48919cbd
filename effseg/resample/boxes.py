"""Resample box by box, so that working memory does not grow with the volume."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np

from effseg.resample.image import interpolate_image
from effseg.resample.label import interpolate_label
from effseg.resample.mapping import Mapping, ObliqueMapping
from effseg.types import Array, Slices3


class Interpolate(Protocol):
    """Makes a box of the target of a box of the source."""

    def __call__(
        self, voxels: Array, *, mapping: Mapping, given: Slices3, wanted: Slices3
    ) -> Array:
        """The target's voxels `wanted`, of the source's voxels `given`."""


@dataclass(frozen=True)
class Work:
    """The bytes that interpolation works with beside the source voxels it is given.

    Attributes:
        source_voxel_bytes: for each source voxel that the box needs.
        target_voxel_bytes: for each of its target voxels.
    """

    source_voxel_bytes: int
    target_voxel_bytes: int


@dataclass(frozen=True)
class Interpolation:
    """A way to interpolate, and what it works with.

    Attributes:
        interpolate: makes a box of the target.
        work: its bytes.
    """

    interpolate: Interpolate
    work: Work


# A float32 copy of the source and what its first axis leaves of it; two copies for the other axes.
IMAGE = Interpolation(interpolate_image, Work(source_voxel_bytes=8, target_voxel_bytes=8))

# A mask as bool and as float32 and what its first axis leaves of it; two for the other axes, the
# best share, what other labels leave, and the label that has it.
LABEL = Interpolation(interpolate_label, Work(source_voxel_bytes=9, target_voxel_bytes=20))


def fill_target(
    target: Array,
    source: Array,
    *,
    mapping: Mapping,
    interpolation: Interpolation,
    fill: float,
    limit_bytes: int,
) -> None:
    """Resample one channel.

    Args:
        target: (z, y, x), written whole; any strides.
        source: (z, y, x), any strides; read box by box, neighbouring boxes sharing a few voxels.
        mapping: from the source's voxels to the target's.
        interpolation: how.
        fill: what stands where the source has no field of view.
        limit_bytes: working memory beside the two arrays.
    """
    inside = mapping.inside
    if any(b.start > 0 or b.stop < n for b, n in zip(inside, target.shape, strict=True)):
        target[...] = fill
    for box in target_boxes(
        inside,
        mapping,
        interpolation.work,
        voxel_bytes=source.dtype.itemsize,
        limit_bytes=limit_bytes,
    ):
        outside = mapping.outside(box) if isinstance(mapping, ObliqueMapping) else None
        if outside is not None and outside.all():
            target[box] = fill
            continue
        given = mapping.source_box(box)
        voxels = np.ascontiguousarray(source[given], dtype=source.dtype.newbyteorder("="))
        target[box] = interpolation.interpolate(voxels, mapping=mapping, given=given, wanted=box)
        if outside is not None:
            target[box][outside] = fill


def target_boxes(
    within: Slices3, mapping: Mapping, work: Work, *, voxel_bytes: int, limit_bytes: int
) -> Iterator[Slices3]:
    """Cut a part of the target into boxes whose working memory stays below a limit."""
    size = [max(1, b.stop - b.start) for b in within]
    while max(size) > 1:
        z, y, x = size
        n_source = mapping.n_source((z, y, x))
        needed = n_source * (work.source_voxel_bytes + voxel_bytes)
        if needed + z * y * x * work.target_voxel_bytes <= limit_bytes:
            break
        axis = mapping.halve((z, y, x))
        size[axis] = math.ceil(size[axis] / 2)
    for starts in product(*(range(b.start, b.stop, n) for b, n in zip(within, size, strict=True))):
        z, y, x = (
            slice(start, min(start + n, b.stop))
            for start, n, b in zip(starts, size, within, strict=True)
        )
        yield (z, y, x)
