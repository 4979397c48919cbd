"""Logits of a volume that come slab by slab, or the features they are yet to be made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np

from effseg.errors import DataError
from effseg.resample.axis import PRODUCT, Float32Array
from effseg.types import Array, Shape3

SLAB_PLANES = 8
"""The thickest slab handed on: thin beside a window, thick beside what neighbours share."""

_FEWEST_ROWS = 16
"""In a matrix product, however wide the head."""

Slab: TypeAlias = tuple[int, Float32Array]
"""Where a slab starts along its axis, and its values, (channels, z, y, x)."""


@dataclass(frozen=True, eq=False)
class AffineHead:
    """The last layer of a network where it is affine: logits = weight @ features + bias.

    Blending, averaging and linear interpolation take weights that sum to 1, so they commute with
    it: they may as well be done to the features, of which there are often fewer.

    Attributes:
        weight: (classes, features).
        bias: (classes,).
    """

    weight: Float32Array
    bias: Float32Array

    @property
    def n_classes(self) -> int:
        """How many logits it makes of a voxel's features."""
        return len(self.weight)

    def logits(self, features: Float32Array) -> Float32Array:
        """Features (features, voxels) to logits (voxels, classes)."""
        n_voxels = features.shape[1]
        result = np.empty((n_voxels, self.n_classes), dtype=np.float32)
        # a few voxels a product: BLAS then stays on the thread that asks
        step = max(_FEWEST_ROWS, PRODUCT // self.weight.size)
        whole = n_voxels - n_voxels % step
        stack = features[:, :whole].reshape(len(features), -1, step).transpose(1, 2, 0)
        np.matmul(stack, self.weight.T, out=result[:whole].reshape(-1, step, self.n_classes))
        np.matmul(features[:, whole:].T, self.weight.T, out=result[whole:])
        result += self.bias
        return result


@dataclass(frozen=True)
class Slabs:
    """The logits of a volume, or the features below its head, that come in order along one axis.

    Iterated over, they are logits.

    Attributes:
        axis: the slabs' of (z, y, x).
        shape: of the whole volume.
        parts: the slabs, from the first voxel to the last without a gap; they come once.
        head: makes logits of the features; None where logits come.
    """

    axis: int
    shape: Shape3
    parts: Iterator[Slab]
    head: AffineHead | None = None

    @classmethod
    def cut(cls, logits: Array) -> Self:
        """Logits (classes, z, y, x) that lie ready, of any real type, in thin slabs of float32.

        Raises:
            DataError: from `parts`, if a logit is not finite.
        """
        shape: Shape3 = (logits.shape[1], logits.shape[2], logits.shape[3])
        axis = int(np.argmax(shape))
        return cls(axis=axis, shape=shape, parts=_cut(logits, axis))

    def __iter__(self) -> Iterator[Slab]:
        """The slabs as logits, cut so thin that they take no more than their features.

        But never thinner than a voxel.
        """
        for start, values in self.parts:
            if self.head is None:
                yield start, values
                continue
            n_planes = values.shape[1 + self.axis]
            step = max(1, n_planes * len(values) // self.head.n_classes)
            for first in range(0, n_planes, step):
                part = planes(values, self.axis, slice(first, first + step))
                logits = self.head.logits(part.reshape(len(part), -1))
                yield start + first, logits.T.reshape(-1, *part.shape[1:])

    def whole(self) -> Float32Array:
        """All slabs side by side, (channels, z, y, x)."""
        return np.concatenate([values for _, values in self.parts], axis=1 + self.axis)


def planes(array: Float32Array, axis: int, part: slice) -> Float32Array:
    """Some planes of (channels, z, y, x) across one of the three axes; a view."""
    return array[(slice(None),) * (1 + axis) + (part,)]


def _cut(logits: Array, axis: int) -> Iterator[Slab]:
    for start in range(0, logits.shape[1 + axis], SLAB_PLANES):
        part = planes(logits, axis, slice(start, start + SLAB_PLANES))
        if not np.isfinite((part.min(), part.max())).all():
            raise DataError(
                "logits that are NaN or infinite; expected finite numbers, of which labels are made"
            )
        yield start, part.astype(np.float32, copy=False)
