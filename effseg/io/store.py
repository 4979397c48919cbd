"""Volumes in Zarr stores, read whole or a few planes at a time. The sole importer of zarr.

What lies in a store is an OME-Zarr image, of Zarr's format 2 or 3.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np

from effseg.errors import DataError, EffsegError, MemoryBudgetError
from effseg.io.formats import is_store_name
from effseg.io.ome import OmeImage
from effseg.types import Array
from effseg.volume import Grid, Volume

STORE_BYTES = 32 << 20
"""What zarr, its codecs and its threads keep of their own, once it is imported."""

AT_ONCE = 10
"""Chunks that zarr packs or unpacks at once, by its own default."""


def library_bytes(*paths: str | Path) -> int:
    """What libraries keep of their own that only some of these formats ask for."""
    return STORE_BYTES if any(is_store_name(Path(path)) for path in paths) else 0


def import_zarr(path: Path) -> ModuleType:
    """The library.

    Raises:
        DataError: if it is not there.
    """
    try:
        import zarr
    except ImportError as error:
        raise DataError(f'{path}: Zarr stores take zarr; pip install "effseg[zarr]"') from error
    return zarr  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Store:
    """An image in a Zarr store, its metadata judged.

    Attributes:
        path: of the store.
        array: its finest resolution, (z, y, x) or (C, z, y, x), as zarr gives it.
        levels: paths of all its resolutions.
        grid: where its voxels lie.
        n_channels: 1 where it has no channel axis.
    """

    path: Path
    array: Any
    levels: tuple[str, ...]
    grid: Grid
    n_channels: int

    @classmethod
    def opened(cls, path: Path) -> Self:
        """The image in the store of this name.

        Raises:
            DataError: if zarr is missing, or there is no such image.
            GeometryError: if its axes are not orthogonal.
        """
        zarr = import_zarr(path)
        with _explained(path):
            group = zarr.open_group(path, mode="r")
            image = OmeImage(path, group.attrs.asdict())
            array = group[image.levels[0]]
            if len(array.shape) != 3 + image.has_channels:
                raise DataError(
                    f"{path}: shape {array.shape} of {3 + image.has_channels} axes; expected one "
                    "length each"
                )
            if array.dtype.kind not in "iufb":
                raise DataError(f"{path}: voxels of type {array.dtype}; expected numbers")
        z, y, x = (int(n) for n in array.shape[-3:])
        return cls(
            path=path,
            array=array,
            levels=image.levels,
            grid=image.grid((z, y, x)),
            n_channels=int(array.shape[0]) if image.has_channels else 1,
        )

    @property
    def dtype(self) -> "np.dtype[np.generic]":
        """Of the voxels, in the machine's byte order."""
        dtype: np.dtype[np.generic] = np.dtype(self.array.dtype)
        return dtype.newbyteorder("=")

    def read(self, part: Any, *, channel: int | None = None) -> Array:
        """Some voxels.

        Args:
            part: which of (z, y, x).
            channel: which; None: all, where there is an axis of them.

        Raises:
            DataError: if they cannot be read.
            MemoryBudgetError: if there is no memory for them.
        """
        lead: tuple[Any, ...] = ()
        if len(self.array.shape) == 4:
            lead = (slice(None) if channel is None else channel,)
        with _explained(self.path):
            return np.asarray(self.array[(*lead, *part)], dtype=self.dtype)

    def volume(self, *, channel: int | None = None) -> Volume:
        """All of it, or of one channel.

        Raises:
            DataError: as `read`.
            MemoryBudgetError: likewise.
        """
        array = self.read((slice(None),) * 3, channel=channel)
        if array.ndim == 4 and len(array) == 1:
            array = array[0]
        return Volume(array=array, grid=self.grid)

    def slabs(self, thickness: int, *, channel: int) -> Iterator[tuple[int, Array]]:
        """Slabs of so many planes along z, each with its start; chunks are read once for several.

        Raises:
            DataError: as `read`.
            MemoryBudgetError: likewise.
        """
        stretch = self._stretch(thickness)
        for first in range(0, self.grid.shape[0], stretch):
            part = (slice(first, first + stretch), slice(None), slice(None))
            planes = self.read(part, channel=channel)
            for start in range(0, len(planes), thickness):
                yield first + start, planes[start : start + thickness]

    def held_bytes(self, thickness: int) -> int:
        """What `slabs` holds at most, slabs included, the library aside."""
        n_planes = min(self._stretch(thickness), self.grid.shape[0])
        plane = math.prod(self.grid.shape[1:])
        chunk = math.prod(self.array.chunks)
        across = (
            math.ceil(n / c) for n, c in zip(self.grid.shape[1:], self._chunks[1:], strict=True)
        )
        n_chunks = math.prod(across) * math.ceil(n_planes / self._chunks[0])
        # of a chunk what was read and what was made of it
        return int(self.dtype.itemsize * (n_planes * plane + 2 * min(AT_ONCE, n_chunks) * chunk))

    @property
    def _chunks(self) -> tuple[int, ...]:
        return tuple(self.array.chunks[-3:])

    def _stretch(self, thickness: int) -> int:
        """Planes read at once: whole slabs, as thick as a chunk or a little thicker."""
        return thickness * math.ceil(self._chunks[0] / thickness)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say of whatever zarr and its codecs raise that the store cannot be read."""
    try:
        yield
    except EffsegError:
        raise
    except MemoryError as error:
        raise MemoryBudgetError(
            f"{path}: the bytes of its voxels are not to be had; read one channel, or thinner "
            "slabs, or use a machine with more memory"
        ) from error
    except Exception as error:  # codecs raise what they like
        said = str(error).strip().splitlines()
        raise DataError(
            f"{path}: cannot be read as a Zarr store: {said[0] if said else type(error).__name__}"
        ) from error
