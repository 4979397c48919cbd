"""An image cut into windows, and windows summed up where they overlap."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from effseg.tiling import Sweep, gaussian_weights, padded_shape, padding, ring_parts
from effseg.types import Shape3, Slices3


class PaddedImage:
    """An image no axis of which is shorter than a window; what is missing is made window by window.

    Args:
        image: (C, z, y, x); padded with each channel's minimum.
        window: voxels (z, y, x).
    """

    def __init__(self, image: npt.NDArray[np.float32], window: Shape3) -> None:
        self.image = image
        self.window = window
        shape: Shape3 = (image.shape[1], image.shape[2], image.shape[3])
        z, y, x = (
            slice(before, before + n)
            for (before, _), n in zip(padding(shape, window), shape, strict=True)
        )
        self.inside: Slices3 = (z, y, x)
        self.shape = padded_shape(shape, window)
        self._minima = [plane.min() for plane in image] if self.shape != shape else []

    def crop(self, box: Slices3) -> npt.NDArray[np.float32]:
        """One window, (C, *window)."""
        if not self._minima:
            return self.image[(slice(None), *box)]
        result = np.empty((len(self.image), *self.window), dtype=np.float32)
        for plane, minimum in zip(result, self._minima, strict=True):
            plane[...] = minimum
        z, y, x = (
            slice(max(0, i.start - b.start), min(b.stop, i.stop) - b.start)
            for b, i in zip(box, self.inside, strict=True)
        )
        given = tuple(
            slice(max(b.start, i.start) - i.start, min(b.stop, i.stop) - i.start)
            for b, i in zip(box, self.inside, strict=True)
        )
        result[:, z, y, x] = self.image[(slice(None), *given)]
        return result


class Frontier:
    """The blended windows of the stretch that a sweep has under way, float32.

    Position p of the swept axis lies at place p modulo the window's length; what is finished is
    taken out, and its places are those of what comes.

    Args:
        n_channels: of a window.
        sweep: the windows and their order.
        device: where the sums lie.
    """

    def __init__(self, n_channels: int, sweep: Sweep, *, device: torch.device) -> None:
        self.axis = sweep.axis
        self.total = torch.zeros((n_channels, *sweep.frontier), device=device)
        self.share = torch.zeros(sweep.frontier, device=device)
        self.weights = torch.from_numpy(gaussian_weights(sweep.window)).to(device)

    def add(self, box: Slices3, values: Tensor) -> None:
        """Blend a window in; its values (channels, *window) are weighted in place."""
        values.mul_(self.weights)
        along = box[self.axis]
        for part, places in ring_parts(along.start, along.stop, self.share.shape[self.axis]):
            lies = (*box[: self.axis], places, *box[self.axis + 1 :])
            given = (slice(None),) * self.axis + (part,)
            self.total[(slice(None), *lies)].add_(values[(slice(None), *given)])
            self.share[lies].add_(self.weights[given])

    def take(self, start: int, stop: int) -> Tensor:
        """The mean of the windows between two positions, (channels, z, y, x), taken out."""
        shape = list(self.total.shape)
        shape[1 + self.axis] = stop - start
        result = self.total.new_empty(shape)
        before = (slice(None),) * self.axis
        for part, places in ring_parts(start, stop, self.share.shape[self.axis]):
            total = self.total[(slice(None), *before, places)]
            share = self.share[(*before, places)]
            torch.div(total, share, out=result[(slice(None), *before, part)])
            total.zero_()
            share.zero_()
        return result
