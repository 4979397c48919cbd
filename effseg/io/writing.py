"""Volumes to files: whole and checked, or not at all."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from effseg.errors import DataError, EffsegError
from effseg.files import written_whole
from effseg.io.formats import Format, format_of
from effseg.io.header import check_spacing
from effseg.io.payload import payload
from effseg.types import Array
from effseg.volume import Grid, Volume

_BLOCK_VOXELS = 2**20
_LEVEL = 4
"""Of deflate: a chest CT takes half the time of level 6 and 1 % more room, label maps a quarter of
the room of level 3."""
_KEPT = frozenset(("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"))
_SMALLER = ("u1", "i2", "u2", "i4", "u4")


def write_volume(volume: Volume, path: str | Path) -> Path:
    """Write a volume as `.nii.gz`, `.nii`, `.nrrd` or `.mha`, by the end of the name.

    The file appears under its name only when it is complete: it is written beside it, forced to
    the disk, read back and compared. The voxel type is kept, with three exceptions: bool becomes
    uint8, 64-bit integers the smallest of uint8, int16, uint16, int32, uint32 that holds all
    their values (if none does, they stay), float16 becomes float32. Several channels become a
    fourth axis, `ElementNumberOfChannels` in MHA; one channel becomes three axes. `.nii.gz` and
    `.nrrd` are compressed. NIfTI rounds the numbers of the affine to float32 (a relative 6e-8).

    Returns:
        The path.

    Raises:
        DataError: if the volume cannot be held by the format, or the file cannot be written, is
            not what was meant (a full disk), or would replace something that is no file. Nothing
            is left behind then, and what was there before stays.
    """
    path = Path(path)
    form = format_of(path)
    check_spacing(path, volume.grid.spacing)
    if volume.n_channels < 1:
        raise DataError(f"{path}: nothing to write, the volume has no channels")
    dtype = _stored_dtype(path, volume.array)
    head = form.write_header(path, volume.grid, dtype, volume.n_channels)
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is there and not a regular file; choose another name")
    try:
        with written_whole(path) as partial:
            checksum = _write(partial, form, head, volume.array, dtype)
            try:
                _verify(partial, form, volume.grid, dtype, volume.n_channels, checksum)
            except EffsegError as error:
                raise DataError(
                    f"{path}: is not what was written, is the disk full? {error}"
                ) from error
    except OSError as error:
        n_bytes = volume.grid.n_voxels * volume.n_channels * dtype.itemsize
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error} ({n_bytes} bytes of voxels "
            "before compression); nothing was left behind"
        ) from error
    return path


def _stored_dtype(path: Path, array: Array) -> "np.dtype[np.generic]":
    dtype = np.dtype(array.dtype)
    code = dtype.str[1:]
    if dtype.kind == "b":
        code = "u1"
    elif code == "f2":
        code = "f4"
    elif code in ("i8", "u8"):
        low, high = int(np.min(array)), int(np.max(array))
        holds = (np.iinfo(small).min <= low and high <= np.iinfo(small).max for small in _SMALLER)
        code = next((small for small, fits in zip(_SMALLER, holds, strict=True) if fits), code)
    elif code not in _KEPT:
        raise DataError(
            f"{path}: voxels of type {dtype} cannot be stored; expected integers, float32, "
            "float64 or bool"
        )
    return np.dtype(code).newbyteorder("<")


def _write(
    partial: Path, form: Format, head: bytes, array: Array, dtype: "np.dtype[np.generic]"
) -> int:
    """Write a new file to the disk; return the checksum of its voxels."""
    checksum = 0
    pack = zlib.compressobj(_LEVEL, wbits=31) if form.packed else None  # 31: gzip, no time in it
    with partial.open("xb") as file:
        file.write(pack.compress(head) if pack and form.packed == "file" else head)
        for block in _blocks(array, dtype, interleaved=form.interleaved):
            checksum = zlib.crc32(block, checksum)
            file.write(pack.compress(block) if pack else block)
        if pack:
            file.write(pack.flush())
        file.flush()
        os.fsync(file.fileno())
    return checksum


def _blocks(
    array: Array, dtype: "np.dtype[np.generic]", *, interleaved: bool
) -> Iterator[memoryview]:
    """The voxels in the order of the file, a few planes at a time; at most one block is copied."""
    if array.ndim == 4 and interleaved:
        parts = [np.moveaxis(array, 0, -1)]
    else:
        parts = list(array) if array.ndim == 4 else [array]
    for part in parts:
        step = max(1, _BLOCK_VOXELS // int(np.prod(part.shape[1:])))
        for first in range(0, part.shape[0], step):
            block = np.ascontiguousarray(part[first : first + step], dtype=dtype)
            yield block.reshape(-1).view(np.uint8).data


def _verify(
    partial: Path,
    form: Format,
    grid: Grid,
    dtype: "np.dtype[np.generic]",
    n_channels: int,
    checksum: int,
) -> None:
    """Read back what was written: header, size and every voxel's bits."""
    header = form.read_header(partial)
    found = (header.grid.shape, header.dtype, header.n_channels)
    if found != (grid.shape, dtype, n_channels):
        raise DataError(f"{partial}: reads as {found}; expected {(grid.shape, dtype, n_channels)}")
    near = 1e-6 * min(grid.spacing)
    if not np.allclose(header.grid.affine, grid.affine, rtol=1e-6, atol=near):
        raise DataError(f"{partial}: reads with another {grid.difference(header.grid)}")
    again = 0
    for block in payload(partial, header):
        again = zlib.crc32(block, again)
    if again != checksum:
        raise DataError(f"{partial}: other voxels")
