"""How one grid's voxels are made of another's: along each axis apart, or across all three.

Both mappings answer the same questions, so that images and labels are resampled box by box
without knowing which they have: what a box of the target needs of the source, what a box of the
source has a part in, how many source voxels a box of some size needs, and what comes out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from effseg.resample.axis import BORDER, AxisWeights, Float32Array, Range
from effseg.types import FloatArray, Shape3, Slices3
from effseg.volume import AxisOrder, Grid

_STRAIGHT = 1e-3  # source voxels by which ignoring a tilt may displace the target's corners
_WIDER = 1e-4  # source voxels: a target voxel wider by less is as wide
_DIGITS = 9  # of steps and starts: the same grids in another axis order give the same bits
_SLAB = (8, 32, 64)  # thinner than this, boxes reread more of their neighbours than they gain


@dataclass(frozen=True)
class SeparableMapping:
    """Between grids with parallel axes: one set of weights an axis.

    Attributes:
        axes: the weights along (z, y, x).
        shape: the target's.
    """

    axes: tuple[AxisWeights, AxisWeights, AxisWeights]
    shape: Shape3

    @property
    def inside(self) -> Slices3:
        """The target voxels that lie in the source's field of view; may be empty."""
        z, y, x = (slice(*weights.inside) for weights in self.axes)
        return (z, y, x)

    @property
    def is_identity(self) -> bool:
        """Whether the target's voxels are the source's, one by one."""
        return all(w.shift == 0 and w.n_source == w.n_target for w in self.axes)

    def n_source(self, size: Shape3) -> int:
        """How many source voxels a target box of this size needs, at most."""
        return math.prod(
            min(w.n_source, math.ceil(n * w.step) + 2 * w.reach)
            for n, w in zip(size, self.axes, strict=True)
        )

    def halve(self, size: Shape3) -> int:
        """The axis along which to halve a box: slabs first, which read a file in its order."""
        for axis, least in enumerate(_SLAB):
            if size[axis] > least:
                return axis
        return int(np.argmax(size))

    def source_box(self, box: Slices3) -> Slices3:
        """The source voxels that the target voxels of `box` need."""
        return _box(w.source_range(b.start, b.stop) for w, b in zip(self.axes, box, strict=True))

    def target_box(self, box: Slices3) -> Slices3:
        """The target voxels that the source voxels of `box` have a part in."""
        return _box(w.target_range(b.start, b.stop) for w, b in zip(self.axes, box, strict=True))

    def apply(self, array: Float32Array, *, given: Slices3, wanted: Slices3) -> Float32Array:
        """Target voxels `wanted` of source voxels `given`; the source is zero elsewhere."""
        sizes = [(_length(w), _length(g)) for w, g in zip(wanted, given, strict=True)]
        # The axis that shrinks most comes first: the others then have less to do.
        for axis in sorted(range(3), key=lambda axis: sizes[axis][0] / sizes[axis][1]):
            array = self.axes[axis].apply(
                array, axis, rows=_range(wanted[axis]), columns=_range(given[axis])
            )
        return array


@dataclass(frozen=True)
class ObliqueMapping:
    """Between grids that are turned against each other: trilinear, smoothed where it shrinks.

    Smoothing runs along the source's axes, each by the extent of a target voxel along it.

    Attributes:
        matrix: (3, 3), target steps to source voxels.
        start: (3,), where target voxel (0, 0, 0) lies in source voxels.
        smoothing: weights from the source's axes to themselves.
        shape: the target's.
    """

    matrix: FloatArray
    start: FloatArray
    smoothing: tuple[AxisWeights, AxisWeights, AxisWeights]
    shape: Shape3

    @property
    def inside(self) -> Slices3:
        """All of the target: which voxels lie outside is told box by box."""
        z, y, x = (slice(0, n) for n in self.shape)
        return (z, y, x)

    @property
    def is_identity(self) -> bool:
        """Never: an untilted mapping is separable."""
        return False

    def outside(self, box: Slices3) -> npt.NDArray[np.bool_] | None:
        """Which voxels of the box lie beyond the source's field of view; None for none of them."""
        low, high = self._extent(box)
        ends = np.asarray([w.n_source for w in self.smoothing]) - 0.5 + BORDER
        if (low >= -0.5 - BORDER).all() and (high <= ends).all():
            return None
        steps = np.ogrid[box]
        beyond = np.zeros([_length(b) for b in box], dtype=np.bool_)
        for row, start, end in zip(self.matrix, self.start, ends, strict=True):
            at = start + row[0] * steps[0] + row[1] * steps[1] + row[2] * steps[2]
            beyond |= (at < -0.5 - BORDER) | (at > end)
        return beyond

    def n_source(self, size: Shape3) -> int:
        """How many source voxels a target box of this size needs, at most."""
        extent = np.abs(self.matrix) @ np.asarray(size)
        return math.prod(
            min(w.n_source, math.ceil(n) + 2 + 2 * w.reach)
            for n, w in zip(extent, self.smoothing, strict=True)
        )

    def halve(self, size: Shape3) -> int:
        """The axis along which to halve a box: towards a cube, whose source box is tightest."""
        return int(np.argmax(size))

    def source_box(self, box: Slices3) -> Slices3:
        """The source voxels that the target voxels of `box` need."""
        corners = self._corners(box)
        return _box(
            w.source_range(c.start, c.stop) for w, c in zip(self.smoothing, corners, strict=True)
        )

    def target_box(self, box: Slices3) -> Slices3:
        """The target voxels that the source voxels of `box` have a part in, and a few more."""
        reached = _box(
            w.target_range(b.start, b.stop) for w, b in zip(self.smoothing, box, strict=True)
        )
        ends = np.asarray(list(product(*((r.start - 1.5, r.stop + 0.5) for r in reached))))
        at = (ends - self.start) @ np.linalg.inv(self.matrix).T
        low = np.clip(np.floor(at.min(axis=0)), 0, self.shape).astype(int)
        high = np.clip(np.ceil(at.max(axis=0)) + 1, 0, self.shape).astype(int)
        return _box(zip(low.tolist(), high.tolist(), strict=True))

    def apply(self, array: Float32Array, *, given: Slices3, wanted: Slices3) -> Float32Array:
        """Target voxels `wanted` of source voxels `given`; the source is zero elsewhere."""
        corners = self._corners(wanted)
        for axis, weights in enumerate(self.smoothing):
            array = weights.apply(
                array, axis, rows=_range(corners[axis]), columns=_range(given[axis])
            )
        first = np.asarray([b.start for b in wanted])
        result: Float32Array = ndimage.affine_transform(
            array,
            self.matrix,
            offset=self.matrix @ first + self.start - [c.start for c in corners],
            output_shape=tuple(_length(b) for b in wanted),
            output=np.float32,
            order=1,
            mode="nearest",
            prefilter=False,
        )
        return result

    def _extent(self, box: Slices3) -> tuple[FloatArray, FloatArray]:
        """The lowest and highest source position of the box's voxels, along each source axis."""
        ends = np.asarray(list(product(*((b.start, b.stop - 1) for b in box))))
        at = ends @ self.matrix.T + self.start
        return at.min(axis=0), at.max(axis=0)

    def _corners(self, box: Slices3) -> Slices3:
        """The source voxels between which the box's voxels are interpolated; at least one."""
        low, high = self._extent(box)
        last = np.asarray([w.n_source for w in self.smoothing]) - 1
        first = np.clip(np.floor(low), 0, last).astype(int)
        stop = np.clip(np.floor(high) + 1, 0, last).astype(int) + 1
        return _box(zip(first.tolist(), stop.tolist(), strict=True))


Mapping = SeparableMapping | ObliqueMapping


@dataclass(frozen=True)
class Passage:
    """The way from one grid to another, worked out in one axis order whatever the two have.

    Array axes are first put into the order in which the target runs along +z, +y, +x, so that the
    same voxels stored in another order go through the same sums and give the same bits.

    Attributes:
        source_axes: brings the source's array into that order.
        target_axes: brings the target's array into it.
        mapping: between the two so ordered.
    """

    source_axes: AxisOrder
    target_axes: AxisOrder
    mapping: Mapping

    @classmethod
    def between(cls, source: Grid, target: Grid) -> "Passage":
        """The way from `source` to `target`."""
        target_axes = target.canonical_axes()
        ordered = target.reordered(target_axes)
        source_axes = _matching_axes(source, ordered)
        mapping = _mapping(source.reordered(source_axes), ordered)
        return cls(source_axes=source_axes, target_axes=target_axes, mapping=mapping)

    @classmethod
    def along(cls, source: Grid, target: Grid) -> "Passage":
        """The same in the order the source is stored in, for one that comes slab by slab."""
        stored = AxisOrder(order=(0, 1, 2), flips=(False, False, False))
        target_axes = _matching_axes(target, source)
        mapping = _mapping(source, target.reordered(target_axes))
        return cls(source_axes=stored, target_axes=target_axes, mapping=mapping)


def _mapping(source: Grid, target: Grid) -> Mapping:
    matrix = np.linalg.solve(source.affine[:3, :3], target.affine[:3, :3])
    half = (np.asarray(target.shape) - 1) / 2
    centre = source.world_to_index(target.index_to_world(half))
    tilt = np.abs(matrix - np.diag(np.diag(matrix))) @ half
    sizes = tuple(zip(source.shape, target.shape, strict=True))
    if (tilt <= _STRAIGHT).all() and (np.diag(matrix) > 0).all():
        # About the centre: what tilt and rounding there are is shared by both ends.
        steps = np.round(np.diag(matrix), _DIGITS)
        starts = np.round(centre - np.diag(matrix) * half, _DIGITS)
        z, y, x = (
            AxisWeights.build(n, m, start=start, step=step, smoothing=_smoothing(step))
            for (n, m), start, step in zip(sizes, starts.tolist(), steps.tolist(), strict=True)
        )
        return SeparableMapping(axes=(z, y, x), shape=target.shape)
    z, y, x = (
        AxisWeights.build(n, n, start=0.0, step=1.0, smoothing=_smoothing_before(width))
        for n, width in zip(source.shape, np.linalg.norm(matrix, axis=1).tolist(), strict=True)
    )
    return ObliqueMapping(
        matrix=np.round(matrix, _DIGITS),
        start=np.round(centre - matrix @ half, _DIGITS),
        smoothing=(z, y, x),
        shape=target.shape,
    )


def _smoothing(width: float) -> float:
    """The half-width s of the smoothing triangle for a target voxel `width` source voxels wide.

    Variances add under convolution, and a triangle of half-width w has w^2 / 6. With 1 + s^2 =
    width^2, interpolation and smoothing together are as wide as the one triangle of half-width
    `width` under which Pillow and torch resize with anti-aliasing.
    """
    return math.sqrt(width**2 - 1) if width > 1 + _WIDER else 0.0


def _smoothing_before(width: float) -> float:
    """The same where the smoothed voxels, not the triangles, are interpolated afterwards.

    Smoothing from voxel to voxel, the weights at whole distances have the variance s / 3 for
    s <= 1 and (1 + s^2) / 6 from there on; linear interpolation then adds 1 / 6.
    """
    if width <= 1 + _WIDER:
        return 0.0
    return (width**2 - 1) / 2 if width**2 <= 3 else math.sqrt(width**2 - 2)


def _matching_axes(source: Grid, target: Grid) -> AxisOrder:
    """The order in which the source's axes run along the target's as nearly as they can."""
    turn = np.asarray(target.direction).T @ np.asarray(source.direction)
    order = max(permutations(range(3)), key=lambda p: sum(abs(turn[i, p[i]]) for i in range(3)))
    z, y, x = (bool(turn[i, order[i]] < 0) for i in range(3))
    return AxisOrder(order=(order[0], order[1], order[2]), flips=(z, y, x))


def _box(ranges: Iterable[Range]) -> Slices3:
    z, y, x = (slice(start, stop) for start, stop in ranges)
    return (z, y, x)


def _range(part: slice) -> Range:
    return (part.start, part.stop)


def _length(part: slice) -> int:
    return int(part.stop - part.start)
