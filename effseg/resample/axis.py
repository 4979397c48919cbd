"""Interpolation along one axis: which source voxels make a target voxel, and how much each counts.

A target voxel that is not wider than the source's is read off the straight line between its two
neighbours. A wider one is the mean of those lines under a triangle: linear interpolation, itself a
triangle of half-width 1, convolved with a second one. Weights so made are positive, so that nothing
overshoots, keep straight ramps straight whatever the second triangle's width, and become plain
linear interpolation without a jump as it narrows to 0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from effseg.types import Array, FloatArray

Range = tuple[int, int]
"""Half-open: start, stop."""

Float32Array = npt.NDArray[np.float32]

_SNAP = 1e-4  # voxels: where all target voxels are this close to source voxels, they are these
BORDER = 1e-4  # voxels beyond the field of view that still count as its border: rounding
_ROWS = 32  # target voxels a matrix product: wider wastes zeros, narrower wastes calls (measured)
PRODUCT = 1 << 18  # multiplications a matrix product: OpenBLAS wakes its threads above this


@dataclass(frozen=True, eq=False)
class AxisWeights:
    """The weights that take `n_source` voxels of one axis to `n_target`.

    Row i of the (n_target, n_source) matrix is non-zero on `[lows[i], highs[i])` only, and
    sums to 1. Both bounds grow with i, so a slab of target voxels needs one slab of source voxels:
    `source_range` says which, and a volume can be resampled as its slabs come.

    Attributes:
        n_source: voxels of the source along this axis.
        n_target: voxels of the target.
        lows: (n_target,) first source voxel of each target voxel.
        highs: (n_target,) one past the last.
        taps: (n_target, widest row) float32, the weights from `lows[i]` on, zeros after `highs[i]`.
        inside: the target voxels whose centres lie in the source's field of view, which reaches
            half a voxel beyond the outermost centres. Only these may be asked for.
        shift: where target voxel i is source voxel i + shift, that shift; otherwise None.
        step: source voxels from one target voxel to the next.
        smoothing: half-width of the triangle, in source voxels; 0 where nothing shrinks.
    """

    n_source: int
    n_target: int
    lows: npt.NDArray[np.int64]
    highs: npt.NDArray[np.int64]
    taps: Float32Array
    inside: Range
    shift: int | None
    step: float
    smoothing: float

    @classmethod
    def build(
        cls, n_source: int, n_target: int, *, start: float, step: float, smoothing: float
    ) -> Self:
        """The weights of target voxels centred on source positions start + step * i.

        Args:
            n_source: voxels of the source.
            n_target: voxels of the target.
            start: where target voxel 0 lies, in source voxels; voxel centres are whole numbers.
            step: source voxels from one target voxel to the next, positive.
            smoothing: half-width of the triangle in source voxels, at least 0.
        """
        at = start + step * np.arange(n_target)
        nearest = int(np.round(at[0])) + np.arange(n_target)
        copies = smoothing == 0 and bool((np.abs(at - nearest) <= _SNAP).all())
        if copies:
            at = nearest.astype(np.float64)
        lows = np.clip(np.floor(at - 1 - smoothing) + 1, 0, n_source).astype(np.int64)
        highs = np.clip(np.ceil(at + 1 + smoothing), 0, n_source).astype(np.int64)
        columns = lows[:, None] + np.arange(max(1, int((highs - lows).max())))
        taps = np.where(columns < highs[:, None], _kernel(at[:, None] - columns, smoothing), 0.0)
        # What a window would see beyond the border is left out, and the rest scaled up to 1:
        # within half a voxel of the border, plain interpolation repeats the border voxel.
        total = taps.sum(axis=1, keepdims=True)
        taps = np.divide(taps, total, out=np.zeros_like(taps), where=total > 0)
        seen = np.flatnonzero((at >= -0.5 - BORDER) & (at <= n_source - 0.5 + BORDER))
        return cls(
            n_source=n_source,
            n_target=n_target,
            lows=lows,
            highs=highs,
            taps=taps.astype(np.float32),
            inside=(int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, 0),
            shift=int(nearest[0]) if copies else None,
            step=step,
            smoothing=smoothing,
        )

    @property
    def reach(self) -> int:
        """How far, in source voxels, a target voxel looks to each side."""
        return math.ceil(1 + self.smoothing)

    def source_range(self, start: int, stop: int) -> Range:
        """The source voxels that target voxels [start, stop) need; (0, 0) where they need none."""
        start, stop = max(start, self.inside[0]), min(stop, self.inside[1])
        if start >= stop:
            return (0, 0)
        return (int(self.lows[start]), int(self.highs[stop - 1]))

    def target_range(self, start: int, stop: int) -> Range:
        """The target voxels that source voxels [start, stop) have a part in; (0, 0) for none."""
        first = max(self.inside[0], int(np.searchsorted(self.highs, start, side="right")))
        last = min(self.inside[1], int(np.searchsorted(self.lows, stop, side="left")))
        return (first, last) if first < last else (0, 0)

    def ready(self, stop: int) -> int:
        """How many target voxels need no source voxel from `stop` on, counted from the first."""
        if stop >= self.n_source:
            return self.n_target
        return int(np.searchsorted(self.highs[: self.inside[1]], stop, side="right"))

    def matrix(self, rows: Range, columns: Range) -> Float32Array:
        """The dense block of the weights, (rows, columns): target voxels by source voxels."""
        index = self.lows[slice(*rows), None] + np.arange(self.taps.shape[1]) - columns[0]
        taps = self.taps[slice(*rows)]
        valid = (index >= 0) & (index < columns[1] - columns[0]) & (taps != 0)
        block = np.zeros((rows[1] - rows[0], columns[1] - columns[0]), dtype=np.float32)
        block[np.nonzero(valid)[0], index[valid]] = taps[valid]
        return block

    def apply(self, array: Float32Array, axis: int, *, rows: Range, columns: Range) -> Float32Array:
        """Interpolate along one axis.

        Args:
            array: float32, holds source voxels `columns` along `axis`; the source is taken to be
                zero elsewhere.
            axis: which of the array's axes.
            rows: the target voxels wanted.
            columns: the source voxels given.

        Returns:
            The array with target voxels `rows` along `axis`; a view of it where target voxels are
            source voxels.
        """
        if self.shift is not None:
            return _shifted(array, axis, rows[0] + self.shift - columns[0], rows[1] - rows[0])
        shape = array.shape
        result = np.empty((*shape[:axis], rows[1] - rows[0], *shape[axis + 1 :]), dtype=np.float32)
        # (voxels before, this axis, voxels after): each block of rows is a dense, small product,
        # which beats gathering two neighbours a voxel and serves windows of any width.
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        given = array.reshape(before, shape[axis], after)
        wanted = result.reshape(before, rows[1] - rows[0], after)
        for start, stop in self._blocks(rows):
            part = slice(start - rows[0], stop - rows[0])
            low, high = self.source_range(start, stop)
            low, high = max(low, columns[0]), min(high, columns[1])
            if low >= high:
                wanted[:, part] = 0
                continue
            weights = self.matrix((start, stop), (low, high))
            window = given[:, low - columns[0] : high - columns[0]]
            _multiply(weights, window, out=wanted[:, part])
        return result

    def _blocks(self, rows: Range) -> Iterator[Range]:
        n_rows = max(8, int(_ROWS / max(1.0, self.step)))
        for start in range(rows[0], rows[1], n_rows):
            yield start, min(start + n_rows, rows[1])


def _multiply(weights: Float32Array, given: Float32Array, *, out: Float32Array) -> None:
    """`weights @ given` for each of a stack of matrices, in small products.

    Products of this size stay in the processor's cache, and BLAS runs them on the thread that
    asks: waking others costs more than they save, and stalls where the processor is shared.
    """
    n = max(1, PRODUCT // weights.size)
    if given.shape[2] == 1:  # the last axis: the stack's rows are the columns
        for start in range(0, given.shape[0], n):
            part = slice(start, start + n)
            np.matmul(given[part, :, 0], weights.T, out=out[part, :, 0])
        return
    for start in range(0, given.shape[2], n):
        part = slice(start, start + n)
        np.matmul(weights, given[:, :, part], out=out[:, :, part])


def _kernel(distance: FloatArray, smoothing: float) -> FloatArray:
    """A triangle of half-width 1 convolved with one of half-width `smoothing` and of area 1.

    A triangle is the second difference of |x| / 2, the fundamental solution of the second
    derivative; so two of them convolved are both second differences of that of the fourth,
    |x|^3 / 12.
    """
    if smoothing == 0:
        return (1 - np.abs(distance)).clip(0.0)
    total = np.zeros_like(distance)
    for shift, sign in ((-1.0, 1.0), (0.0, -2.0), (1.0, 1.0)):
        for wider, weight in ((-smoothing, 1.0), (0.0, -2.0), (smoothing, 1.0)):
            total += sign * weight * np.abs(distance + shift + wider) ** 3
    return total.clip(0.0) / (12 * smoothing**2)


def _shifted(array: Array, axis: int, first: int, n: int) -> Float32Array:
    """`array[first : first + n]` along an axis, with zeros where that reaches beyond it."""
    low, high = max(first, 0), min(first + n, array.shape[axis])
    lead = (slice(None),) * axis
    if (low, high) == (first, first + n):
        return array[(*lead, slice(low, high))]
    shape = (*array.shape[:axis], n, *array.shape[axis + 1 :])
    result = np.zeros(shape, dtype=np.float32)
    if low < high:
        result[(*lead, slice(low - first, high - first))] = array[(*lead, slice(low, high))]
    return result
