"""What every file header comes down to (`Header`), and the rules that all of them must keep."""

import math
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effseg.errors import DataError, GeometryError
from effseg.types import Array, FloatArray
from effseg.volume import Grid

DEFLATE_RATIO = 1032
"""Deflate cannot shrink further: 258 bytes in 2 bits (RFC 1951)."""

MIN_SPACING_MM, MAX_SPACING_MM = 0.001, 100.0

_REVERSED = [2, 1, 0, 3]


@dataclass(frozen=True)
class Header:
    """Where the voxels of a file lie, in the world and in the file.

    Attributes:
        grid: the grid in LPS (z, y, x).
        dtype: of the stored voxels, with their byte order.
        n_channels: 1 where the file has no channel axis.
        interleaved: the channel is the fastest axis of the file; else the slowest.
        start: byte of the file at which the voxels, or the stream that holds them, begin.
        packed: the voxels are in a zlib or gzip stream.
        skip: bytes of that stream before the first voxel.
        slope: of the linear map from stored to true values.
        intercept: of the same map.
    """

    grid: Grid
    dtype: "np.dtype[np.generic]"
    n_channels: int
    interleaved: bool
    start: int
    packed: bool
    skip: int = 0
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def channel_bytes(self) -> int:
        """Of one channel, as stored."""
        return self.grid.n_voxels * self.dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        """Of all channels, as stored."""
        return self.channel_bytes * self.n_channels

    def checked(self, path: Path) -> "Header":
        """This header, if the file is large enough for what it claims, and no larger.

        Raises:
            DataError: if the file is cut, has bytes left over, or claims more than it can hold.
        """
        n_bytes = file_bytes(path)
        claim = (
            f"{self.n_channels} channel(s) of {self.grid.shape} voxels (z, y, x) of {self.dtype}"
        )
        if self.packed:
            most = DEFLATE_RATIO * max(0, n_bytes - self.start) + 1024
            if self.skip + self.payload_bytes > most:
                raise DataError(
                    f"{path}: the header claims {claim}, {self.payload_bytes} bytes; a file of "
                    f"{n_bytes} bytes can inflate to {most} at most: it is cut or forged"
                )
        elif n_bytes != self.start + self.payload_bytes:
            wrong = "is cut" if n_bytes < self.start + self.payload_bytes else "has bytes left over"
            raise DataError(
                f"{path}: {wrong}: {n_bytes} bytes, expected {self.start + self.payload_bytes} "
                f"for {claim} from byte {self.start}; get the file again"
            )
        return self


def file_bytes(path: Path) -> int:
    """The size of a regular file.

    Raises:
        DataError: if there is none, or it is a pipe, a device or a folder.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file; expected a volume")
    return status.st_size


def unreadable(path: Path, error: OSError) -> DataError:
    """What to raise where the system refuses a file."""
    return DataError(f"{path}: cannot be read: {error.strerror or error}")


def grid_of(path: Path, shape_xyz: Sequence[int], affine_lps: Array, *, source: str) -> Grid:
    """The grid of a file.

    Args:
        path: for the words of an error.
        shape_xyz: voxels along (x, y, z).
        affine_lps: 4 x 4, indices (x, y, z, 1) to LPS millimetres (x, y, z, 1).
        source: the name of what gave the affine, for the words of an error.

    Raises:
        DataError: if the shape is empty, or a spacing is no number between 0.001 and 100 mm.
        GeometryError: if the axes are not orthogonal to 1e-3.
    """
    x, y, z = shape_xyz
    if min(shape_xyz) < 1:
        raise DataError(f"{path}: shape {(z, y, x)} (z, y, x); expected at least one voxel each")
    affine = np.asarray(affine_lps, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise DataError(f"{path}: {source} is not finite; expected finite numbers")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
    check_spacing(path, spacing.tolist())
    try:
        return Grid.from_affine((z, y, x), affine[_REVERSED][:, _REVERSED])
    except GeometryError:
        units = affine[:3, :3] / spacing[::-1]
        cosine = np.abs(units.T @ units - np.eye(3)).max()
        raise GeometryError(
            f"{path}: {source} is sheared: two axes stand at {math.degrees(math.acos(cosine)):.2f} "
            "degrees, expected 90; resample it to orthogonal axes with the tool that made it"
        ) from None


def check_spacing(path: Path, spacing: Sequence[float]) -> None:
    """Refuse voxels that no scanner makes: they would explode when resampled.

    Raises:
        DataError: if a spacing is not between 0.001 and 100 mm.
    """
    if not all(MIN_SPACING_MM <= s <= MAX_SPACING_MM for s in spacing):
        words = ", ".join(f"{s:g}" for s in spacing)
        raise DataError(
            f"{path}: spacing ({words}) mm (z, y, x); "
            f"expected {MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm: are the units right?"
        )


def affine_lps_of(grid: Grid) -> FloatArray:
    """4 x 4, indices (x, y, z, 1) to LPS millimetres (x, y, z, 1)."""
    return grid.affine[_REVERSED][:, _REVERSED]


def numbers(path: Path, field: str, text: str, *, count: int) -> list[float]:
    """The finite numbers of a text field.

    Raises:
        DataError: if they are not numbers, not finite or not `count`.
    """
    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise DataError(
            f"{path}: field '{field}' is {text[:80]!r}; expected {count} finite numbers"
        )
    return values


def integers(path: Path, field: str, text: str, *, count: int) -> list[int]:
    """The integers of a text field, all at least 1.

    Raises:
        DataError: if they are not integers, less than 1 or not `count`.
    """
    try:
        values = [int(word) for word in text.split()]
    except ValueError:
        values = []
    if len(values) != count or min(values, default=0) < 1:
        raise DataError(
            f"{path}: field '{field}' is {text[:80]!r}; expected {count} integers of at least 1"
        )
    return values
