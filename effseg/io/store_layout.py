"""What a Zarr store is to hold: judged before it is begun, compared with it when it is written."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from effseg.errors import DataError, EffsegError
from effseg.io.header import check_spacing
from effseg.io.ome import LEVEL, ome_attributes
from effseg.io.store import Store, import_zarr
from effseg.types import Array
from effseg.volume import Grid

ROW_PLANES = 16
"""Planes of a row of chunks: what is held back until a row is whole."""

CHUNK_SIDE = 256
"""Voxels of a chunk along the other axes, at most: 2^20 in a chunk."""

_LEVEL_OF_ZSTD = 3
_METADATA = frozenset(("zarr.json", ".zgroup", ".zattrs", ".zmetadata"))


@dataclass(frozen=True)
class StoreLayout:
    """A Zarr store as it is meant: one resolution of an OME-Zarr 0.5 image, Zarr's format 3.

    Attributes:
        path: its name.
        grid: where its voxels lie.
        dtype: of its voxels, little endian.
        n_channels: how many channels it has; None: no axis of them.
    """

    path: Path
    grid: Grid
    dtype: "np.dtype[np.generic]"
    n_channels: int | None = None

    @classmethod
    def judged(
        cls,
        path: Path,
        grid: Grid,
        dtype: "np.dtype[np.generic]",
        *,
        n_channels: int | None = None,
    ) -> Self:
        """The layout of a store of this name.

        Raises:
            DataError: if zarr is missing, the volume cannot be held, or the name is that of
                something that is more than one image.
        """
        import_zarr(path)
        check_spacing(path, grid.spacing)
        if n_channels == 0:
            raise DataError(f"{path}: nothing to write, the volume has no channels")
        if path.exists():
            _check_replaceable(path)
        return cls(path, grid, dtype, n_channels)

    def create(self, partial: Path, *, axis: int) -> Any:
        """A new store of this layout, under another name, and zarr's array in it.

        Args:
            partial: the name.
            axis: along which slabs come: a row of chunks is `ROW_PLANES` thick along it.
        """
        zarr = import_zarr(self.path)
        lead = () if self.n_channels is None else (self.n_channels,)
        chunks = [min(n, CHUNK_SIDE) for n in self.grid.shape]
        chunks[axis] = min(self.grid.shape[axis], ROW_PLANES)
        name = self.path.name.removesuffix(self.path.suffix)
        attributes = ome_attributes(self.grid, name=name, has_channels=bool(lead))
        group = zarr.create_group(partial, overwrite=True, zarr_format=3, attributes=attributes)
        return group.create_array(
            LEVEL,
            shape=(*lead, *self.grid.shape),
            chunks=(*(1 for _ in lead), *chunks),
            dtype=self.dtype,
            fill_value=0,
            compressors=zarr.codecs.ZstdCodec(level=_LEVEL_OF_ZSTD),
            dimension_names=[*("c" for _ in lead), "z", "y", "x"],
        )

    def verify(self, partial: Path, checksum: int, *, axis: int) -> None:
        """Read back what was written: metadata and every voxel's bits.

        Raises:
            DataError: if it is not what was meant.
        """
        try:
            store = Store.opened(partial)
            found = (store.grid, store.dtype, store.array.shape[:-3])
            lead = () if self.n_channels is None else (self.n_channels,)
            if found != (self.grid, self.dtype.newbyteorder("="), lead):
                raise DataError(f"{partial}: reads as {found}; expected {self}")
            again = 0
            for channel in range(self.n_channels or 1):
                for part in rows(self.grid, axis):
                    again = _checksum(store.read(part, channel=channel), axis, again)
            if again != checksum:
                raise DataError(f"{partial}: other voxels")
        except EffsegError as error:
            raise DataError(
                f"{self.path}: is not what was written, is the disk full? {error}"
            ) from error


def rows(grid: Grid, axis: int) -> Iterator[tuple[slice, slice, slice]]:
    """The boxes of (z, y, x) that rows of chunks along an axis fill, in order."""
    for start in range(0, grid.shape[axis], ROW_PLANES):
        part = [slice(None)] * 3
        part[axis] = slice(start, min(start + ROW_PLANES, grid.shape[axis]))
        yield part[0], part[1], part[2]


def _checksum(planes: Array, axis: int, before: int) -> int:
    turned = np.ascontiguousarray(np.moveaxis(planes, axis, 0))
    return zlib.crc32(turned.reshape(-1).view(np.uint8).data, before)


def _check_replaceable(path: Path) -> None:
    """Refuse to put a store where more than one image would be lost.

    Raises:
        DataError: for a file, a folder that is no such store, or one that holds more.
    """
    if not path.is_dir():
        raise DataError(f"{path}: is there and no Zarr store; choose another name")
    names = {inside.name for inside in path.iterdir()}
    if not names:
        return
    try:
        levels = {level.split("/")[0] for level in Store.opened(path).levels}
    except EffsegError as error:
        raise DataError(
            f"{path}: is there and not an OME-Zarr image; choose another name"
        ) from error
    more = sorted(names - levels - _METADATA)
    if more:
        raise DataError(
            f"{path}: is there and holds {more[0]} beside an image; choose another name"
        )
