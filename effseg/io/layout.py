"""What a file is to hold: judged before it is begun, compared with it when it is written."""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from effseg.errors import DataError, EffsegError
from effseg.files import written_whole
from effseg.io.formats import Format, format_of
from effseg.io.header import check_spacing
from effseg.io.payload import payload
from effseg.io.voxel_stream import Seam, VoxelStream
from effseg.volume import Grid


@dataclass(frozen=True)
class FileLayout:
    """A volume file as it is meant.

    Attributes:
        path: its name.
        form: its format.
        grid: where its voxels lie.
        dtype: of its voxels, little endian.
        n_channels: how many channels it has.
        head: the bytes before its voxels.
    """

    path: Path
    form: Format
    grid: Grid
    dtype: "np.dtype[np.generic]"
    n_channels: int
    head: bytes

    @classmethod
    def judged(
        cls, path: Path, grid: Grid, dtype: "np.dtype[np.generic]", *, n_channels: int = 1
    ) -> Self:
        """The layout of a file of this name.

        Raises:
            DataError: if the format cannot hold it, or the name is that of something that is no
                file.
        """
        form = format_of(path)
        check_spacing(path, grid.spacing)
        if n_channels < 1:
            raise DataError(f"{path}: nothing to write, the volume has no channels")
        head = form.write_header(path, grid, dtype, n_channels)
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is there and not a regular file; choose another name")
        return cls(path, form, grid, dtype, n_channels, head)

    @property
    def n_bytes(self) -> int:
        """Of its voxels, before compression."""
        return self.grid.n_voxels * self.n_channels * self.dtype.itemsize

    def write(self, voxels: Iterable[memoryview]) -> None:
        """Write the file whole, from its voxels in its own order.

        Raises:
            DataError: if it is not what was meant; what was there before stays then.
            OSError: if it cannot be written; likewise.
        """
        with written_whole(self.path) as partial:
            self.write_to(partial, voxels)

    def write_to(self, partial: Path, voxels: Iterable[memoryview]) -> None:
        """Write the file under another name; as `write`."""
        with partial.open("wb") as file:
            stream = self.stream(file)
            for block in voxels:
                stream.append(block)
            stream.end()
        self.verify(partial, stream.checksum)

    def stream(
        self, file: BinaryIO, *, seamed: bool = False, seam: Seam | None = None
    ) -> VoxelStream:
        """What takes the voxels into `file`; as `VoxelStream`."""
        return VoxelStream(file, self.head, packed=self.form.packed, seamed=seamed, seam=seam)

    def verify(self, partial: Path, checksum: int) -> None:
        """Read back what was written: header, size and every voxel's bits.

        Raises:
            DataError: if it is not what was meant.
        """
        try:
            self._compare(partial, checksum)
        except EffsegError as error:
            raise DataError(
                f"{self.path}: is not what was written, is the disk full? {error}"
            ) from error

    def _compare(self, partial: Path, checksum: int) -> None:
        header = self.form.read_header(partial)
        found = (header.grid.shape, header.dtype, header.n_channels)
        meant = (self.grid.shape, self.dtype, self.n_channels)
        if found != meant:
            raise DataError(f"{partial}: reads as {found}; expected {meant}")
        near = 1e-6 * min(self.grid.spacing)
        if not np.allclose(header.grid.affine, self.grid.affine, rtol=1e-6, atol=near):
            raise DataError(f"{partial}: reads with another {self.grid.difference(header.grid)}")
        again = zlib.crc32(self.head) if self.form.packed == "file" else 0
        for block in payload(partial, header):
            again = zlib.crc32(block, again)
        if again != checksum:
            raise DataError(f"{partial}: other voxels")


@contextmanager
def explained(path: Path, n_bytes: int, left: str = "nothing was left behind") -> Iterator[None]:
    """Say of an `OSError` inside what it stopped, and what is left.

    Args:
        path: of what is written.
        n_bytes: of its voxels, before compression.
        left: what is left of it.

    Raises:
        DataError: in its place.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error} ({n_bytes} bytes of voxels "
            f"before compression); {left}"
        ) from error
