"""A volume read slab by slab."""

from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Self

import numpy as np

from effseg.errors import DataError
from effseg.io.dicom import read_series_facts, read_series_slabs
from effseg.io.formats import is_store
from effseg.io.header import Header
from effseg.io.payload import payload
from effseg.io.reading import check_channel, header_of, is_series
from effseg.io.store import Store
from effseg.io.voxels import StoredVoxels, rescaled, value_dtype
from effseg.types import Array
from effseg.volume import Grid


class SlabReader:
    """Reads a volume as `read_volume` does, slab by slab along z, in one pass and in order.

    ```python
    reader = SlabReader("image.nii.gz")
    for start, slab in reader.slabs(16):
        ...
    ```

    Takes one slab and a block; where integers are scaled, two slabs; of a Zarr store chunks, see
    `held_bytes`.

    A header is judged on construction. A fault further behind is found where it lies: slabs before
    it have been handed out by then. The last one comes only when the file is sound to its end.

    Args:
        path: as for `read_volume`. A DICOM series is read through once on construction, for the
            type that holds its values.
        channel: which, where the file has several: slabs are of one channel.

    Attributes:
        grid: where all voxels lie.
        dtype: of the slabs; that of `read_volume`'s array.
        n_channels: how many there are to choose from.

    Raises:
        DataError: as `read_volume`; if the file has several channels and none was chosen.
        GeometryError: if its axes are not orthogonal.
    """

    grid: Grid
    dtype: "np.dtype[np.generic]"

    def __init__(self, path: str | Path, *, channel: int | None = None) -> None:
        self._path = Path(path)
        self._channel = channel
        self._header: Header | None = None
        self._store: Store | None = None
        self.n_channels = 1
        if is_store(self._path):
            self._store = store = Store.opened(self._path)
            self._choose(store.n_channels)
            self.grid, self.dtype = store.grid, store.dtype
            return
        if is_series(self._path):
            check_channel(self._path, channel, 1)
            self.grid, self.dtype = read_series_facts(self._path)
            return
        header = self._header = header_of(self._path)
        self._choose(header.n_channels)
        self.grid, self.dtype = header.grid, value_dtype(header)

    @classmethod
    def of_channels(cls, path: str | Path) -> tuple[Self, ...]:
        """A reader for each channel of a volume, whose header is read once for all.

        Args:
            path: as of the class.

        Raises:
            DataError: as the class.
            GeometryError: likewise.
        """
        first = cls(path, channel=0)
        readers = [first]
        for channel in range(1, first.n_channels):
            other = copy(first)
            other._channel = channel
            readers.append(other)
        return tuple(readers)

    def held_bytes(self, thickness: int) -> int:
        """What `slabs` holds beside a slab and a block: of a Zarr store, whole chunks."""
        return 0 if self._store is None else self._store.held_bytes(thickness)

    def slabs(self, thickness: int) -> Iterator[tuple[int, Array]]:
        """The slabs from first to last: the index of its first plane, and (n, y, x) voxels.

        Each call begins anew.

        Args:
            thickness: planes a slab; the last may have fewer.

        Raises:
            DataError: if the file is cut, corrupt, or no longer what it was; if `thickness` is less
                than 1.
            MemoryBudgetError: if there is no memory for a slab.
        """
        if thickness < 1:
            raise DataError(f"{self._path}: slabs of {thickness} planes; expected 1 or more")
        if self._store is not None:
            return self._store.slabs(thickness, channel=self._channel or 0)
        if self._header is None:
            return read_series_slabs(self._path, thickness, grid=self.grid, dtype=self.dtype)
        return self._of_file(self._header, thickness)

    def _choose(self, n_channels: int) -> None:
        """Have a channel that is there.

        Raises:
            DataError: if it is not, or there are several and none was chosen.
        """
        check_channel(self._path, self._channel, n_channels)
        if self._channel is None and n_channels > 1:
            raise DataError(
                f"{self._path}: {n_channels} channels; expected one: choose it, 0 to "
                f"{n_channels - 1}"
            )
        self.n_channels = n_channels

    def _of_file(self, header: Header, thickness: int) -> Iterator[tuple[int, Array]]:
        n_planes, *plane = header.grid.shape
        n_values = plane[0] * plane[1] * (header.n_channels if header.interleaved else 1)
        blocks = payload(self._path, header, channel=self._channel)
        voxels = StoredVoxels(self._path, header, blocks)
        for start in range(0, n_planes, thickness):
            n = min(thickness, n_planes - start)
            stored = voxels.take(n * n_values)
            if start + n == n_planes:
                voxels.end()
            if header.interleaved and header.n_channels > 1:
                stored = stored.reshape(-1, header.n_channels)[:, self._channel].copy()
            yield start, rescaled(self._path, stored.reshape(n, *plane), header)
