"""Voxels in a file of nothing else, read a box at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effseg.errors import DataError
from effseg.types import Array


@dataclass(frozen=True)
class PlaneFile:
    """Planes of voxels, one behind the other.

    Read, not mapped: of a mapped file the system counts as this process's memory the whole pages
    around each row, and their neighbours, which is many times a small patch.

    Attributes:
        path: of the file.
        shape: (planes, channels, rows, columns).
        dtype: of the voxels, in the machine's byte order.
    """

    path: Path
    shape: tuple[int, int, int, int]
    dtype: "np.dtype[np.generic]"

    def read(self, planes: slice, rows: slice, columns: slice) -> Array:
        """The voxels of a box, (planes, channels, rows, columns); takes a few rows beside it.

        Raises:
            DataError: if the file is shorter than it should be, or cannot be read.
        """
        _, n_channels, n_rows, n_columns = self.shape
        stretch = np.empty((rows.stop - rows.start, n_columns), dtype=self.dtype)
        width = columns.stop - columns.start
        box = np.empty((planes.stop - planes.start, n_channels, len(stretch), width), self.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                for place, part in zip(range(planes.start, planes.stop), box, strict=True):
                    for channel, into in enumerate(part):
                        first = (place * n_channels + channel) * n_rows + rows.start
                        file.seek(first * n_columns * self.dtype.itemsize)
                        if file.readinto(stretch.data.cast("B")) != stretch.nbytes:
                            raise DataError(f"{self.path}: is cut; was the disk full?")
                        into[...] = stretch[:, columns]
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        return box
