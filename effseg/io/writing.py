"""Volumes to files: whole and checked, or not at all."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from effseg.errors import DataError
from effseg.io.formats import is_store_name
from effseg.io.layout import FileLayout, explained
from effseg.io.store_layout import StoreLayout
from effseg.io.store_slabs import store_bytes, write_store
from effseg.io.voxel_stream import blocks
from effseg.types import Array
from effseg.volume import Grid, Volume

_KEPT = frozenset(("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"))
_WIDENED = {"b1": "u1", "f2": "f4"}
_SMALLER = ("u1", "i2", "u2", "i4", "u4")


def write_volume(volume: Volume, path: str | Path) -> Path:
    """Write a volume as `.nii.gz`, `.nii`, `.nrrd`, `.mha` or `.zarr`, by the end of the name.

    The file appears under its name only when it is complete: it is written beside it, forced to
    the disk, read back and compared. The voxel type is kept, with three exceptions: bool becomes
    uint8, 64-bit integers the smallest of uint8, int16, uint16, int32, uint32 that holds all
    their values (if none does, they stay), float16 becomes float32. Several channels become a
    fourth axis, `ElementNumberOfChannels` in MHA; one channel becomes three axes. `.nii.gz` and
    `.nrrd` are compressed. NIfTI rounds the numbers of the affine to float32 (a relative 6e-8).

    A `.zarr` is a folder: an OME-Zarr 0.5 image of one resolution in Zarr's format 3, compressed,
    with the direction of its axes under the key `effseg`.

    Returns:
        The path.

    Raises:
        DataError: if the volume cannot be held by the format, or the file cannot be written, is
            not what was meant (a full disk), or would replace something that is no file. Nothing
            is left behind then, and what was there before stays.
    """
    path = Path(path)
    array = volume.array
    dtype = stored_dtype(path, array.dtype)
    if dtype.kind in "iu" and dtype.itemsize == 8 and array.size:
        dtype = _smallest(array, dtype)
    if is_store_name(path):
        n_channels = None
        if volume.n_channels == 1:
            array = array.reshape(volume.grid.shape)
        else:
            n_channels = volume.n_channels
        store = StoreLayout.judged(path, volume.grid, dtype, n_channels=n_channels)
        with explained(path, array.size * dtype.itemsize):
            write_store(store, array)
        return path
    layout = FileLayout.judged(path, volume.grid, dtype, n_channels=volume.n_channels)
    with explained(path, layout.n_bytes):
        layout.write(_voxels(array, layout))
    return path


def writing_bytes(path: str | Path, grid: Grid, itemsize: int) -> int:
    """What `SlabWriter` takes beside its slabs, above a few MiB: of a Zarr store a row of chunks.

    Args:
        path: to be written.
        grid: of its voxels.
        itemsize: bytes of one.
    """
    return store_bytes(grid, itemsize) if is_store_name(Path(path)) else 0


def stored_dtype(path: Path, dtype: "np.dtype[np.generic]") -> "np.dtype[np.generic]":
    """The little-endian type in which voxels of a type are written, whatever their values.

    Raises:
        DataError: if there is none.
    """
    code = dtype.str[1:]
    code = _WIDENED.get(code, code)
    if code not in _KEPT:
        raise DataError(
            f"{path}: voxels of type {dtype} cannot be stored; expected integers, float32, "
            "float64 or bool"
        )
    return np.dtype(code).newbyteorder("<")


def _smallest(array: Array, wide: "np.dtype[np.generic]") -> "np.dtype[np.generic]":
    low, high = int(np.min(array)), int(np.max(array))
    for small in _SMALLER:
        if np.iinfo(small).min <= low and high <= np.iinfo(small).max:
            return np.dtype(small).newbyteorder("<")
    return wide


def _voxels(array: Array, layout: FileLayout) -> Iterator[memoryview]:
    """In the order of the file."""
    if array.ndim == 3:
        yield from blocks(array, layout.dtype)
    elif layout.form.interleaved:
        yield from blocks(np.moveaxis(array, 0, -1), layout.dtype)
    else:
        for channel in array:
            yield from blocks(channel, layout.dtype)
