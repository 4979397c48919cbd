"""Windows summed up where they overlap, for the stretch that a sweep has under way."""

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from effseg.errors import DataError
from effseg.tiling import Sweep, gaussian_weights, ring_parts
from effseg.types import Shape3, Slices3

COPIED_BYTES = 16 << 20
"""Of a window's channels, turned or widened at once."""


class Frontier:
    """The blended windows of the stretch that a sweep has under way, float32.

    Position p of the swept axis lies at place p modulo the window's length; what is finished is
    taken out, and its places are those of what comes.

    Args:
        n_channels: of what is blended.
        n_passes: outputs for each window and channel, of which the mean counts.
        sweep: the windows and their order.
        device: where the sums lie, and where they are worked on.
        folder: of a nameless file that holds the sums in place of the device's memory; None: none.

    Raises:
        DataError: if there is no room for the file.
    """

    def __init__(
        self,
        n_channels: int,
        sweep: Sweep,
        *,
        n_passes: int,
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        self.axis = sweep.axis
        self.n_channels = n_channels
        self.n_passes = n_passes
        self.share = torch.zeros(sweep.frontier, device=device)
        self.weights = torch.from_numpy(gaussian_weights(sweep.window)).to(device)
        self._total: Tensor | None = None
        self._file: SumsFile | None = None
        if folder is None:
            self._total = torch.zeros((n_channels, *sweep.frontier), device=device)
        else:
            self._file = SumsFile(folder, n_channels, sweep.frontier)

    def add(
        self, box: Slices3, values: Tensor, *, channels: slice, mirror: tuple[int, ...]
    ) -> None:
        """Blend one output of a window in: nothing of its size is made on the host.

        Args:
            box: of the window.
            values: (channels, *window), of any float type; left as they are.
            channels: which of what is blended they are.
            mirror: axes of (z, y, x) to flip before.
        """
        first = channels.start or 0
        axes = [1 + axis for axis in mirror]
        copied = axes or values.dtype != torch.float32
        # one operator for all channels, where it needs no copy: each waits for all threads
        most = max(1, COPIED_BYTES // (4 * self.weights.numel())) if copied else len(values)
        values = values.to(self.share.device)
        for part, sums in self._groups(first, first + len(values), most):
            some = values[part.start - first : part.stop - first]
            some = (some.flip(axes) if axes else some).to(sums.dtype)
            for lies, given in self._places(box):
                sums[(slice(None), *lies)].addcmul_(
                    some[(slice(None), *given)], self.weights[given]
                )

    def count(self, box: Slices3) -> None:
        """Count a window whose outputs were all added."""
        for lies, given in self._places(box):
            self.share[lies].add_(self.weights[given], alpha=self.n_passes)

    def take(self, start: int, stop: int) -> Tensor:
        """The mean of the windows between two positions, (channels, z, y, x), taken out.

        0 where no window was.
        """
        shape = list(self.share.shape)
        shape[self.axis] = stop - start
        result = self.share.new_empty((self.n_channels, *shape))
        before = (slice(None),) * self.axis
        for part, places in ring_parts(start, stop, self.share.shape[self.axis]):
            share = self.share[(*before, places)]
            share.masked_fill_(share == 0, 1)
            for channels, sums in self._groups(0, self.n_channels, self.n_channels):
                total = sums[(slice(None), *before, places)]
                torch.div(total, share, out=result[channels][(slice(None), *before, part)])
        self.drop(start, stop)
        return result

    @torch.inference_mode()
    def drop(self, start: int, stop: int) -> None:
        """Take out what lies between two positions, and forget it."""
        before = (slice(None),) * self.axis
        for _, places in ring_parts(start, stop, self.share.shape[self.axis]):
            self.share[(*before, places)].zero_()
            for _, sums in self._groups(0, self.n_channels, self.n_channels):
                sums[(slice(None), *before, places)].zero_()

    def close(self) -> None:
        """Let go of the file, where there is one."""
        if self._file is not None:
            self._file.close()

    def _groups(self, start: int, stop: int, most: int) -> Iterator[tuple[slice, Tensor]]:
        """The sums of some channels, so many at a time; of a file, one."""
        step = most if self._file is None else 1
        for first in range(start, stop, step):
            part = slice(first, min(stop, first + step))
            if self._file is not None:
                yield part, self._file.channel(first)[None]
            else:
                assert self._total is not None
                yield part, self._total[part]

    def _places(self, box: Slices3) -> Iterator[tuple[Slices3, tuple[slice, ...]]]:
        """Where a window lies in the ring, and which part of the window: one or two pairs."""
        along = box[self.axis]
        for part, places in ring_parts(along.start, along.stop, self.share.shape[self.axis]):
            z, y, x = (places if i == self.axis else b for i, b in enumerate(box))
            yield (z, y, x), (slice(None),) * self.axis + (part,)


class SumsFile:
    """Sums on the disk: a channel is mapped while it is worked on, and no longer.

    Args:
        folder: of the nameless file.
        n_channels: how many.
        shape: of one.

    Raises:
        DataError: if there is no room for it.
    """

    def __init__(self, folder: Path, n_channels: int, shape: Shape3) -> None:
        self._shape = shape
        self._bytes = 4 * math.prod(shape)
        self._stack = ExitStack()
        try:
            file = TemporaryFile(dir=folder)  # noqa: SIM115 - open until `close`
            self._file = self._stack.enter_context(file)
            # room beforehand: a mapped file that the disk has none for ends the process
            room = getattr(os, "posix_fallocate", lambda file, _, n: os.truncate(file, n))
            room(self._file.fileno(), 0, n_channels * self._bytes)
        except OSError as error:
            self.close()
            raise DataError(
                f"{folder}: no room for {n_channels * self._bytes} bytes of sums "
                f"({error.strerror or error}); free some, or give more memory"
            ) from error

    def close(self) -> None:
        """Give the room back."""
        self._stack.close()

    def channel(self, index: int) -> Tensor:
        """One channel's sums, 0 at first; what is changed in them is kept."""
        mapped = np.memmap(
            self._file, np.float32, mode="r+", offset=index * self._bytes, shape=self._shape
        )
        return torch.from_numpy(mapped)
