"""Images that need not be in memory: read a few planes at a time, from one end to the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from effseg.errors import DataError, GeometryError
from effseg.io import SlabReader, read_volume
from effseg.resample import SLAB_PLANES
from effseg.types import Array, Shape3
from effseg.volume import Grid, Volume

Planes: TypeAlias = tuple[int, npt.NDArray[np.float32]]
"""Where some planes start along an axis, and their voxels, (channels, z, y, x)."""


@runtime_checkable
class ImageSource(Protocol):
    """An image that is read in order along an axis."""

    @property
    def n_channels(self) -> int:
        """How many channels it has."""
        ...

    @property
    def shape(self) -> Shape3:
        """Voxels (z, y, x)."""
        ...

    def slabs(self, axis: int, *, start: int = 0) -> Iterator[Planes]:
        """Its planes from `start` to the last, in order, a few at a time; each call begins anew."""
        ...


class ChunkedArray(Protocol):
    """What numpy's memory maps, Zarr's arrays and HDF5's data sets have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels (z, y, x), or channels first."""
        ...

    @property
    def dtype(self) -> Any:
        """Of the voxels."""
        ...

    def __getitem__(self, box: Any, /) -> Any:
        """The voxels of a box."""


class ArraySource:
    """An array that lies in memory, in a file or in chunks.

    Args:
        array: (z, y, x) or (C, z, y, x), of real numbers; a few planes are read at a time, or as
            many as the array's own chunks have.

    Attributes:
        n_channels: how many channels it has.
        shape: voxels (z, y, x).
        whole: (C, z, y, x) where it lies in memory as float32 already.

    Raises:
        DataError: if it has another number of axes, or an empty one.
    """

    def __init__(self, array: Array | ChunkedArray) -> None:
        if len(array.shape) not in (3, 4) or 0 in array.shape:
            raise DataError(
                f"an image of shape {tuple(array.shape)}; expected (z, y, x) or (channels, z, y, x)"
            )
        self._array = array
        self.n_channels = int(array.shape[0]) if len(array.shape) == 4 else 1
        z, y, x = (int(n) for n in array.shape[-3:])
        self.shape: Shape3 = (z, y, x)
        self.whole: npt.NDArray[np.float32] | None = None
        if type(array) is np.ndarray and array.dtype == np.float32:
            self.whole = array.reshape(self.n_channels, *self.shape)

    def slabs(self, axis: int, *, start: int = 0) -> Iterator[Planes]:
        """As of `ImageSource`."""
        thickness = self._thickness(axis)
        lead = (slice(None),) * (len(self._array.shape) - 3 + axis)
        while start < self.shape[axis]:
            stop = min(self.shape[axis], (start // thickness + 1) * thickness)
            planes = np.asarray(self._array[(*lead, slice(start, stop))], dtype=np.float32)
            yield start, planes.reshape(self.n_channels, *planes.shape[-3:])
            start = stop

    def _thickness(self, axis: int) -> int:
        chunks = getattr(self._array, "chunks", None)
        if isinstance(chunks, tuple) and len(chunks) == len(self._array.shape):
            along = chunks[len(chunks) - 3 + axis]
            if isinstance(along, int) and along > 0:
                return along
        return SLAB_PLANES


class FileSource:
    """One channel of an image in a file that is read through from z to z.

    Args:
        reader: of that channel.

    Attributes:
        n_channels: 1.
        shape: voxels (z, y, x).
    """

    def __init__(self, reader: SlabReader) -> None:
        self._reader = reader
        self.n_channels = 1
        self.shape: Shape3 = reader.grid.shape

    def slabs(self, axis: int, *, start: int = 0) -> Iterator[Planes]:
        """As of `ImageSource`, along axis 0 only: what lies before `start` is read past."""
        assert axis == 0
        for first, part in self._reader.slabs(SLAB_PLANES):
            skipped = max(0, start - first)
            if skipped < len(part):
                yield first + skipped, part[None, skipped:].astype(np.float32)


class SideBySide:
    """The channels of several images on one grid.

    Args:
        sources: the images; their slabs come equally thick.

    Attributes:
        n_channels: of all together.
        shape: voxels (z, y, x).
    """

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._sources = sources
        self.n_channels = sum(source.n_channels for source in sources)
        self.shape: Shape3 = sources[0].shape

    def slabs(self, axis: int, *, start: int = 0) -> Iterator[Planes]:
        """As of `ImageSource`."""
        for parts in zip(*(one.slabs(axis, start=start) for one in self._sources), strict=True):
            yield parts[0][0], np.concatenate([planes for _, planes in parts])


@dataclass(frozen=True)
class ImageFiles:
    """An image in files, judged by their headers.

    Attributes:
        paths: one with all channels, or several with one each.
        grid: where its voxels lie.
        readers: one a channel.
    """

    paths: tuple[str | Path, ...]
    grid: Grid
    readers: tuple[SlabReader, ...]

    @classmethod
    def judged(cls, paths: Sequence[str | Path], *, name: str) -> Self:
        """The image in some files, whose headers are read once.

        Args:
            paths: one with all channels, or several with one each.
            name: whose they are, for the words of an error.

        Raises:
            DataError: if one cannot be read, or one of several holds several channels.
            GeometryError: if the channels do not lie on one grid.
        """
        channels = [SlabReader.of_channels(path) for path in paths]
        grid = channels[0][0].grid
        for path, readers in zip(paths, channels, strict=True):
            if len(paths) > 1 and len(readers) != 1:
                raise DataError(
                    f"{path}: {len(readers)} channels in one of {len(paths)} image files of "
                    f"{name}; expected one channel a file, or one file with all channels"
                )
            difference = grid.difference(readers[0].grid)
            if difference is not None:
                raise GeometryError(
                    f"{name}: channels {Path(paths[0]).name} and {Path(path).name} differ in "
                    f"{difference}; bring the second over with resample_like(...)"
                )
        every = tuple(reader for readers in channels for reader in readers)
        return cls(paths=tuple(paths), grid=grid, readers=every)

    @property
    def n_channels(self) -> int:
        """How many channels it has."""
        return len(self.readers)

    @property
    def voxel_bytes(self) -> int:
        """Of one channel of a voxel, once read."""
        return max(reader.dtype.itemsize for reader in self.readers)

    @property
    def held_bytes(self) -> int:
        """What reading them takes beside the voxels asked for: of a Zarr store, whole chunks."""
        return sum(reader.held_bytes(SLAB_PLANES) for reader in self.readers)

    def opened(self, *, whole: bool) -> ImageSource:
        """The image, read whole now, or read through as it is asked for, along axis 0 only."""
        parts: list[ImageSource]
        if whole:
            parts = [ArraySource(read_volume(path).array) for path in self.paths]
        else:
            parts = [FileSource(reader) for reader in self.readers]
        return SideBySide(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class ImageArray:
    """An image in an array, which lies where it lies.

    Attributes:
        array: (z, y, x) or (C, z, y, x).
        grid: where its voxels lie.
        voxel_bytes: 0: nothing is read into memory whole.
        held_bytes: 0: what chunks take is the array's own.
    """

    array: Array | ChunkedArray
    grid: Grid
    voxel_bytes: int = 0
    held_bytes: int = 0

    @classmethod
    def given(cls, image: Volume | Array | ChunkedArray) -> Self:
        """The image in a volume, or in an array that says nothing of where it lies: 1 mm each way.

        Raises:
            DataError: if the array has another number of axes than three or four.
        """
        if isinstance(image, Volume):
            return cls(array=image.array, grid=image.grid)
        return cls(array=image, grid=Grid(shape=ArraySource(image).shape))

    @property
    def n_channels(self) -> int:
        """How many channels it has."""
        return ArraySource(self.array).n_channels

    def opened(self, *, whole: bool) -> ImageSource:  # noqa: ARG002 - as of `ImageFiles`
        """The image, which is read as it is asked for."""
        return ArraySource(self.array)
