"""One image to what the network sees: canonical axes, the plan's spacing, normalised channels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from effseg.errors import DataError
from effseg.plans import Channel, Plan
from effseg.resample import (
    Slabs,
    first_needed,
    logits_to_labels,
    resample_slabs,
    resample_to_spacing,
    resampling_bytes,
)
from effseg.sources import ImageSource, Planes
from effseg.types import Array, Shape3
from effseg.volume import Grid, Volume


@dataclass(frozen=True)
class Prepared:
    """An image as the network sees it.

    Attributes:
        image: float32, (channels, z, y, x), on `grid`.
        grid: canonical axes, the plan's spacing.
        native: the grid the image came on.
    """

    image: npt.NDArray[np.float32]
    grid: Grid
    native: Grid


def prepare_image(image: Volume, plan: Plan) -> Prepared:
    """Reorder, resample and normalise an image.

    Raises:
        DataError: if it has another number of channels than the plan.
    """
    check_channels(image.n_channels, plan)
    native = image.grid
    image = image.reordered(native.canonical_axes())
    if image.array.ndim == 3:
        image = Volume(array=image.array[None], grid=image.grid)
    image = resample_to_spacing(image, plan.spacing)
    array = np.empty(image.array.shape, dtype=np.float32)
    for i, channel in enumerate(plan.channels):
        array[i] = normalise(image.array[i], channel)
    return Prepared(image=array, grid=image.grid, native=native)


@dataclass(frozen=True)
class Frame:
    """Where an image lies as the network sees it, swept along an axis in the file's direction.

    Attributes:
        native: the grid the image came on.
        axis: of (z, y, x), canonical, along which it is swept.
        ordered: the native grid in canonical order; backwards along `axis` where the file is.
        grid: the same field of view at the plan's spacing.
        native_axis: which axis of `native` runs along `axis`.
        backwards: whether `axis` runs from the canonical end to the start.
    """

    native: Grid
    axis: int
    ordered: Grid
    grid: Grid
    native_axis: int
    backwards: bool

    @classmethod
    def of(cls, native: Grid, plan: Plan, *, axis: int) -> Self:
        """The frame of an image on this grid."""
        axes = native.canonical_axes()
        flips = [flip and i != axis for i, flip in enumerate(axes.flips)]
        ordered = native.reordered(replace(axes, flips=(flips[0], flips[1], flips[2])))
        return cls(
            native=native,
            axis=axis,
            ordered=ordered,
            grid=ordered.with_spacing(plan.spacing),
            native_axis=axes.order[axis],
            backwards=axes.flips[axis],
        )

    @classmethod
    def as_it_lies(cls, native: Grid, *, axis: int) -> Self:
        """The frame of an image that the network sees on its own grid."""
        return cls(native, axis, native, native, axis, backwards=False)

    @property
    def is_resampled(self) -> bool:
        """Whether the plan's spacing is another than the image's."""
        return self.ordered != self.grid


class PreparedSlabs:
    """What `prepare_image` makes of an image, a few planes at a time, along the axis of a frame.

    Where a channel is normalised by its own mean and deviation, the image is read through once
    more, before.

    Args:
        image: as it lies in the file, on `frame.native`.
        frame: where it goes.
        plan: says how channels are normalised.

    Raises:
        DataError: if the image has another number of channels than the plan.
    """

    def __init__(self, image: ImageSource, frame: Frame, plan: Plan) -> None:
        check_channels(image.n_channels, plan)
        self.frame = frame
        self.n_channels = image.n_channels
        self.shape: Shape3 = frame.grid.shape
        self._image = image
        self._channels = plan.channels

    def slabs(self, axis: int, *, start: int = 0) -> Iterator[Planes]:
        """As of `ImageSource`, along the frame's axis only."""
        assert axis == self.frame.axis
        for at, planes in self._resampled(start):
            for i, channel in enumerate(self._channels):
                moments = self._moments[i] if channel.normalisation.kind == "zscore" else None
                planes[i] = normalise(planes[i], channel, moments=moments)
            yield at, planes

    @cached_property
    def _moments(self) -> "tuple[Moments, ...]":
        found = [Moments()] * self.n_channels
        for _, planes in self._resampled(0):
            found = [one.joined(plane) for one, plane in zip(found, planes, strict=True)]
        return tuple(found)

    def _resampled(self, start: int) -> Iterator[Planes]:
        frame = self.frame
        if not frame.is_resampled:
            for at, planes in self._ordered(start):
                yield at, planes.copy()  # which may be the image's own
            return
        first = first_needed(frame.ordered, frame.grid, axis=frame.axis, start=start)
        yield from resample_slabs(
            self._ordered(first), frame.ordered, frame.grid, axis=frame.axis, start=start
        )

    def _ordered(self, start: int) -> Iterator[Planes]:
        """The image's own planes in canonical order."""
        axes = self.frame.native.canonical_axes()
        flips = [flip and i != self.frame.axis for i, flip in enumerate(axes.flips)]
        axes = replace(axes, flips=(flips[0], flips[1], flips[2]))
        for at, planes in self._image.slabs(self.frame.native_axis, start=start):
            yield at, axes.apply(planes)


def preparing_bytes(frame: Frame, *, n_channels: int) -> int:
    """What `PreparedSlabs` takes at most beside the image, slabs of `SLAB_PLANES` included."""
    if not frame.is_resampled:
        plane = frame.grid.n_voxels // frame.grid.shape[frame.axis]
        return 3 * 4 * n_channels * plane * min(8, frame.grid.shape[frame.axis])
    return resampling_bytes(frame.ordered, frame.grid, axis=frame.axis, n_channels=n_channels)


@dataclass(frozen=True)
class Moments:
    """Mean and deviation of the voxels above the smallest, joined part by part.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979).

    Attributes:
        low: the smallest value; infinite for no voxels.
        n_low: how many voxels have it.
        n: how many lie above.
        mean: of these.
        squares: the sum of their squared distances from the mean.
    """

    low: float = math.inf
    n_low: int = 0
    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def joined(self, array: npt.NDArray[np.float32]) -> "Moments":
        """The moments of these voxels and an array's."""
        low = float(array.min())
        body = array[array > low]
        mean = float(body.mean(dtype=np.float64)) if body.size else 0.0
        squares = float(body.var(dtype=np.float64)) * body.size if body.size else 0.0
        part = Moments(low, array.size - body.size, body.size, mean, squares)
        lower = min(self.low, low)
        one, other = self._above(lower), part._above(lower)
        n = one.n + other.n
        gap = other.mean - one.mean
        return Moments(
            low=lower,
            n_low=one.n_low + other.n_low,
            n=n,
            mean=one.mean + gap * other.n / max(n, 1),
            squares=one.squares + other.squares + gap**2 * one.n * other.n / max(n, 1),
        )

    def _above(self, low: float) -> "Moments":
        """The same where a lower value is the smallest: what was the smallest lies above it."""
        if self.low == low or self.n_low == 0:
            return self
        n = self.n + self.n_low
        gap = self.low - self.mean
        return Moments(
            low=low,
            n=n,
            mean=self.mean + gap * self.n_low / n,
            squares=self.squares + gap**2 * self.n * self.n_low / n,
        )

    def apply(self, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The array, changed in place to zero mean and unit deviation; a constant becomes zero."""
        if self.n == 0:
            array[...] = 0
            return array
        array -= self.mean
        array /= max(math.sqrt(self.squares / self.n), 1e-8)
        return array


def check_channels(n_channels: int, plan: Plan) -> None:
    """Refuse an image of another number of channels than the plan's.

    Raises:
        DataError: for one.
    """
    if n_channels != len(plan.channels):
        names = ", ".join(channel.name for channel in plan.channels)
        raise DataError(
            f"image with {n_channels} channels; the plan expects {len(plan.channels)} ({names})"
        )


def prepare_label(label: Volume, plan: Plan) -> Volume:
    """Reorder and resample a label map onto the grid that its image is prepared on."""
    canonical = label.reordered(label.grid.canonical_axes())
    return resample_to_spacing(canonical, plan.spacing, label=True)


def normalise(
    array: Array, channel: Channel, *, moments: Moments | None = None
) -> npt.NDArray[np.float32]:
    """One channel's intensities to about zero mean and unit deviation, float32.

    CT: clipped and scaled by the data set's foreground statistics. Else: by the mean and deviation
    of the image's voxels above its minimum, which is what surrounds the body; a constant image
    becomes zero.

    Args:
        array: the image, or a part of it; left as it is.
        channel: says how.
        moments: of the whole image, where the array is a part of it.
    """
    out = np.array(array, dtype=np.float32)
    numbers = channel.normalisation
    if numbers.kind == "ct":
        assert numbers.mean is not None
        assert numbers.std is not None
        np.clip(out, numbers.low, numbers.high, out=out)
        out -= numbers.mean
        out /= numbers.std
        return out
    return (moments or Moments().joined(out)).apply(out)


def restore_labels(logits: Array | Slabs, prepared: Prepared, plan: Plan) -> Volume:
    """Logits on the prepared grid to a label map on the image's own grid.

    The logits are resampled, so the label map is that of interpolated logits, not interpolated
    labels; logits of all classes exist for a few voxels at a time.

    Args:
        logits: (classes, z, y, x) on `prepared.grid`, or what comes slab by slab.
        prepared: what the logits were computed from.
        plan: names the label values.

    Returns:
        The smallest unsigned type that holds the plan's label values, on `prepared.native`.
    """
    values = [label.value for label in plan.labels]
    return logits_to_labels(logits, prepared.grid, prepared.native, values=values)
