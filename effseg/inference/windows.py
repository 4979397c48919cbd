"""An image cut into windows, a stretch of it at a time."""

import numpy as np
import numpy.typing as npt

from effseg.sources import ArraySource, ImageSource, Planes
from effseg.tiling import Sweep, padded_shape, padding, ring_parts
from effseg.types import Shape3, Slices3


class SweptImage:
    """The stretch of an image that a sweep has under way, float32.

    An image that lies in memory as float32 is read where it lies; of any other, position p of the
    swept axis lies at place p modulo the window's length. No axis is shorter than a window: what is
    missing is each channel's minimum, and made window by window.

    Args:
        source: the image; backwards along the swept axis, where the sweep runs so.
        sweep: over the padded image, or what is left of it.

    Attributes:
        inside: where the image lies in the padded one.
    """

    def __init__(self, source: ImageSource, sweep: Sweep) -> None:
        self.window = sweep.window
        self.axis = sweep.axis
        self.inside = inside_padded(source.shape, sweep)
        self._length = source.shape[self.axis]
        padded = padded_shape(source.shape, sweep.window) != source.shape
        self._minima = minima(source, sweep.axis) if padded else None
        self._whole = source.whole if isinstance(source, ArraySource) else None
        if self._whole is None:
            shape = [source.n_channels, *source.shape]
            shape[1 + self.axis] = min(self._length, sweep.window[self.axis])
            self._ring = np.empty(shape, dtype=np.float32)
            start = max(0, sweep.layers[0].start - self.inside[self.axis].start)
            self._slabs = source.slabs(self.axis, start=start)
            self._pending: Planes | None = None
            self._loaded = start

    @property
    def n_channels(self) -> int:
        """How many channels a window has."""
        return len(self._ring if self._whole is None else self._whole)

    def load(self, stop: int) -> None:
        """Read on up to a position of the padded image; what lies a window before it is let go."""
        if self._whole is not None:
            return
        stop = min(self._length, stop - self.inside[self.axis].start)
        while self._loaded < stop:
            start, planes = self._pending or next(self._slabs)
            last = min(stop, start + planes.shape[1 + self.axis])
            self._put(planes, start, last)
            rest = planes[self._along(slice(last - start, None))]
            self._pending = (last, rest) if rest.shape[1 + self.axis] else None
            self._loaded = last

    def given(self, box: Slices3) -> Slices3:
        """What of a box of the padded image lies in the image, counted from its first voxel."""
        z, y, x = (
            slice(max(b.start, i.start) - i.start, min(b.stop, i.stop) - i.start)
            for b, i in zip(box, self.inside, strict=True)
        )
        return (z, y, x)

    def crop(self, box: Slices3) -> npt.NDArray[np.float32]:
        """One window of the padded image, (C, *window)."""
        given = list(self.given(box))
        if self._minima is None and self._whole is not None:
            return self._whole[(slice(None), *given)]
        result = np.empty((self.n_channels, *self.window), dtype=np.float32)
        if self._minima is not None:
            result[...] = self._minima[:, None, None, None]
        lies = [
            slice(g.start + i.start - b.start, g.stop + i.start - b.start)
            for g, i, b in zip(given, self.inside, box, strict=True)
        ]
        inner = result[(slice(None), *lies)]
        if self._whole is not None:
            inner[...] = self._whole[(slice(None), *given)]
            return result
        along = given[self.axis]
        for part, places in ring_parts(along.start, along.stop, self._ring.shape[1 + self.axis]):
            given[self.axis] = places
            inner[self._along(part)] = self._ring[(slice(None), *given)]
        return result

    def _put(self, planes: npt.NDArray[np.float32], start: int, stop: int) -> None:
        for part, places in ring_parts(start, stop, self._ring.shape[1 + self.axis]):
            self._ring[self._along(places)] = planes[self._along(part)]

    def _along(self, part: slice) -> tuple[slice, ...]:
        return (slice(None),) * (1 + self.axis) + (part,)


def minima(source: ImageSource, axis: int) -> npt.NDArray[np.float32]:
    """Each channel's smallest value; reads all of the image once, along an axis."""
    found = np.full(source.n_channels, np.inf, dtype=np.float32)
    for _, planes in source.slabs(axis):
        np.minimum(found, planes.min(axis=(1, 2, 3)), out=found)
    return found


def inside_padded(shape: Shape3, sweep: Sweep) -> Slices3:
    """Where the image lies in the padded one, in the sweep's own direction."""
    parts = []
    for axis, ((before, after), n) in enumerate(
        zip(padding(shape, sweep.window), shape, strict=True)
    ):
        start = after if sweep.backwards and axis == sweep.axis else before
        parts.append(slice(start, start + n))
    return (parts[0], parts[1], parts[2])
