"""Which windows cover a volume, in which order, and how they are blended: index arithmetic only."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby, product
from typing import Self

import numpy as np
import numpy.typing as npt

from effseg.errors import PlanError
from effseg.types import Shape3, Slices3

SMALLEST_WEIGHT = 1e-3


def window_starts(length: int, window: int, *, overlap: float) -> tuple[int, ...]:
    """Evenly spaced starts of the fewest windows that cover an axis.

    Args:
        length: of the axis in voxels, at least `window`.
        window: in voxels.
        overlap: the least share of a window that its neighbour covers, 0 <= overlap < 1.

    Returns:
        Starts in order; the first is 0, the last `length - window`.

    Raises:
        PlanError: if the window is longer than the axis, or the overlap out of range.
    """
    if not 1 <= window <= length:
        raise PlanError(f"a window of {window} voxels on an axis of {length}; pad the axis first")
    if not 0 <= overlap < 1:
        raise PlanError(f"overlap {overlap}; expected 0 <= overlap < 1")
    step = max(1.0, window * (1 - overlap))
    n_windows = int(np.ceil((length - window) / step)) + 1
    return tuple(round(start) for start in np.linspace(0, length - window, n_windows))


def windows(shape: Shape3, window: Shape3, *, overlap: float) -> tuple[Slices3, ...]:
    """The windows that cover a volume, those of the first axis slowest."""
    starts = [window_starts(n, w, overlap=overlap) for n, w in zip(shape, window, strict=True)]
    return tuple(
        (slice(z, z + window[0]), slice(y, y + window[1]), slice(x, x + window[2]))
        for z, y, x in product(*starts)
    )


def gaussian_weights(window: Shape3) -> npt.NDArray[np.float32]:
    """Blending weights: a Gaussian of a deviation of one eighth of the window, largest 1.

    Never below 1e-3, so that a voxel which only a window's corner covers keeps its digits.
    """
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in window]
    weights = np.asarray(reduce(np.multiply.outer, axes))
    bounded = np.maximum(weights / weights.max(), SMALLEST_WEIGHT)
    return np.asarray(bounded, dtype=np.float32)


def padding(shape: Shape3, smallest: Shape3) -> tuple[tuple[int, int], ...]:
    """Voxels to add before and after each axis so that none is shorter than `smallest`."""
    short = [max(0, want - n) for n, want in zip(shape, smallest, strict=True)]
    return tuple((missing // 2, missing - missing // 2) for missing in short)


def padded_shape(shape: Shape3, smallest: Shape3) -> Shape3:
    """The shape with that padding: no axis shorter than `smallest`."""
    z, y, x = (max(n, want) for n, want in zip(shape, smallest, strict=True))
    return (z, y, x)


@dataclass(frozen=True)
class Layer:
    """The windows that start at one place of the axis they are swept along.

    Attributes:
        windows: in order.
        start: where on that axis they start; before it the volume is finished already.
        stop: up to where it is finished once they are blended: where the next layer starts.
    """

    windows: tuple[Slices3, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Sweep:
    """The windows of a volume in an order that finishes it from one end to the other.

    At any time only a stretch as long as a window is under way: what lies before it no later window
    touches, what lies behind it none has touched yet.

    Attributes:
        axis: along which the windows are swept.
        shape: of the volume.
        window: voxels (z, y, x).
        layers: all windows, each once.
        backwards: whether positions along the axis are counted from the volume's end.
    """

    axis: int
    shape: Shape3
    window: Shape3
    layers: tuple[Layer, ...]
    backwards: bool = False

    @classmethod
    def over(
        cls,
        shape: Shape3,
        window: Shape3,
        *,
        overlap: float,
        axis: int | None = None,
        backwards: bool = False,
    ) -> Self:
        """Plan the sweep; other arguments and errors as of `window_starts`, for three axes.

        Args:
            shape: of the volume.
            window: voxels (z, y, x).
            overlap: as of `window_starts`.
            axis: to sweep along; None: the one along which the stretch is smallest, the first of
                equals.
            backwards: sweep the same windows from the axis' end to its start.
        """
        axis = sweep_axis(shape, window) if axis is None else axis
        boxes = list(windows(shape, window, overlap=overlap))
        if backwards:
            boxes = [mirrored(box, axis, shape[axis]) for box in boxes]
        boxes.sort(key=lambda box: _start(box, axis))
        grouped = [tuple(group) for _, group in groupby(boxes, key=lambda box: _start(box, axis))]
        starts = [_start(group[0], axis) for group in grouped]
        stops = [*starts[1:], shape[axis]]
        layers = tuple(Layer(*layer) for layer in zip(grouped, starts, stops, strict=True))
        return cls(axis=axis, shape=shape, window=window, layers=layers, backwards=backwards)

    def reaching(self, position: int) -> Self:
        """The sweep without the layers that lie before a position and do not reach it."""
        length = self.window[self.axis]
        return replace(
            self, layers=tuple(one for one in self.layers if one.start + length > position)
        )

    @property
    def n_windows(self) -> int:
        """How many windows there are."""
        return sum(len(layer.windows) for layer in self.layers)

    @property
    def frontier(self) -> Shape3:
        """The shape of what is under way at once: as long as a window, as wide as the volume."""
        return frontier(self.shape, self.window, self.axis)


def sweep_axis(shape: Shape3, window: Shape3) -> int:
    """The axis along which a stretch as long as a window holds the fewest voxels."""
    return min(range(3), key=lambda axis: math.prod(frontier(shape, window, axis)))


def frontier(shape: Shape3, window: Shape3, axis: int) -> Shape3:
    """The volume's shape, cut to the window's length along an axis."""
    z, y, x = (w if i == axis else n for i, (n, w) in enumerate(zip(shape, window, strict=True)))
    return (z, y, x)


def mirrored(box: Slices3, axis: int, length: int) -> Slices3:
    """The box where positions along an axis of this length are counted from its end."""
    z, y, x = (
        slice(length - part.stop, length - part.start) if i == axis else part
        for i, part in enumerate(box)
    )
    return (z, y, x)


def ring_parts(start: int, stop: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Where a stretch of an axis lies in a ring that holds position p at place p modulo its length.

    Args:
        start: of the stretch.
        stop: its end, at most `length` further.
        length: of the ring.

    Yields:
        (positions, counted from `start`, places in the ring): two parts where the stretch runs over
        the ring's end, otherwise one.
    """
    at = start
    while at < stop:
        place = at % length
        n = min(stop - at, length - place)
        yield slice(at - start, at - start + n), slice(place, place + n)
        at += n


def _start(box: Slices3, axis: int) -> int:
    start: int = box[axis].start
    return start
