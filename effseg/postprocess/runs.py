"""Foreground as runs: stretches of voxels of one value along x.

A label map has few of them, so what is asked of it after its components are known (statistics,
what touches across a seam, which voxels to clear) is asked of the runs, and the runs are what is
kept of it. Compressed they take a twentieth of the bytes of a compressed component map.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from effseg.types import Array

_QUICK = 1
"""zlib's level: higher ones take several times as long for a tenth of the bytes."""


@dataclass(frozen=True)
class Runs:
    """Runs of one block of planes, in raster order; none goes on from one row into the next.

    Attributes:
        starts: (n,) flat index of the first voxel in the block.
        lengths: (n,) voxels.
        numbers: (n,) the component's, within the block, from 1.
    """

    starts: Array
    lengths: Array
    numbers: Array

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def rows(self) -> Array:
        """The components' rows in the block's table: their numbers, from 0."""
        return self.numbers.astype(np.int64) - 1

    def renumbered(self, numbers: Array) -> Self:
        """The same runs with other numbers."""
        return replace(self, numbers=numbers)

    def part(self, which: slice) -> Self:
        """Some of the runs."""
        return replace(
            self,
            starts=self.starts[which],
            lengths=self.lengths[which],
            numbers=self.numbers[which],
        )

    def plane(self, z: int, plane_voxels: int) -> Self:
        """The runs of one plane; starts count from its first voxel."""
        first, last = np.searchsorted(self.starts, [z * plane_voxels, (z + 1) * plane_voxels])
        runs = self.part(slice(first, last))
        return replace(runs, starts=runs.starts - z * plane_voxels)

    def packed(self) -> bytes:
        """The runs in few bytes: differences, then equal bytes side by side, then zlib."""
        columns = np.empty((3, len(self)), dtype="<u4")
        columns[0] = np.diff(self.starts, prepend=0)
        columns[1] = self.lengths
        columns[2] = self.numbers
        by_byte = columns.view(np.uint8).reshape(3, len(self), 4).transpose(0, 2, 1)
        return zlib.compress(by_byte.tobytes(), _QUICK)

    @classmethod
    def unpacked(cls, packed: bytes) -> Self:
        """The runs that `packed` stands for."""
        by_byte = np.frombuffer(zlib.decompress(packed), dtype=np.uint8).reshape(3, 4, -1)
        columns = by_byte.transpose(0, 2, 1).copy().view("<u4")[..., 0]
        return cls(
            starts=np.cumsum(columns[0], dtype=np.int64),
            lengths=columns[1].astype(np.int64),
            numbers=columns[2],
        )

    def painted(self, values: Array, n_voxels: int) -> Array:
        """A flat block of voxels with one value in each run and 0 elsewhere."""
        counts = np.empty(2 * len(self) + 1, dtype=np.int64)
        stops = self.starts + self.lengths
        counts[0:-1:2] = self.starts
        counts[2:-1:2] -= stops[:-1]
        counts[1::2] = self.lengths
        counts[-1] = n_voxels - stops[-1]
        painted = np.zeros(counts.size, dtype=values.dtype)
        painted[1::2] = values
        return np.repeat(painted, counts)


def find_runs(labels: Array) -> tuple[Array, Array]:
    """Starts and lengths of the runs of every value but 0.

    Args:
        labels: contiguous, (z, y, x), with a voxel at least.
    """
    flat = labels.reshape(-1)
    begins = np.empty(flat.size, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins.reshape(-1, labels.shape[2])[:, 0] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=flat.size)
    foreground = flat[starts] != 0
    return starts[foreground], lengths[foreground]


def touching(before: Runs, after: Runs, width: int) -> tuple[Array, Array]:
    """Pairs of runs of two neighbouring planes that share a face, an edge or a corner.

    Args:
        before: the runs of one plane.
        after: the runs of the next.
        width: voxels along x.

    Returns:
        For each pair, the index into `before` and the index into `after`.
    """
    # One column more than there is: the end of a row and the next row's start are no neighbours.
    starts_before, starts_after = (runs.starts + runs.starts // width for runs in (before, after))
    stops_before = starts_before + before.lengths
    firsts, seconds = [], []
    for row in (-(width + 1), 0, width + 1):
        starts = starts_after + row
        low = np.searchsorted(stops_before, starts, side="left")
        high = np.searchsorted(starts_before, starts + after.lengths, side="right")
        counts = high - low
        # low, low + 1, ..., high - 1 for each run in turn
        offsets = np.repeat(low - (np.cumsum(counts) - counts), counts)
        firsts.append(offsets + np.arange(offsets.size))
        seconds.append(np.repeat(np.arange(counts.size), counts))
    return np.concatenate(firsts), np.concatenate(seconds)
