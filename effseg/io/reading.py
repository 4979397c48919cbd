"""Files to volumes."""

from pathlib import Path

import numpy as np

from effseg.errors import DataError
from effseg.io.dicom import read_series, read_series_grid
from effseg.io.formats import DICOM_ZIP, format_of, is_store, volume_suffix
from effseg.io.header import Header, file_bytes
from effseg.io.payload import payload
from effseg.io.store import Store
from effseg.io.voxels import StoredVoxels, rescaled
from effseg.types import Array
from effseg.volume import Grid, Volume


def read_volume(path: str | Path, *, channel: int | None = None) -> Volume:
    """Read `.nii`, `.nii.gz`, `.nrrd`, `.mha`, `.zarr`, a DICOM series in a folder or a `.zip`.

    The voxel type is kept, in the machine's byte order. Where a NIfTI file scales its values the
    result is float32 (float64 if stored so); DICOM gives true values (HU for CT) as int16, else
    int32, where they are whole numbers, float32 otherwise. Takes the array and little more;
    where integers are scaled, both their array and the float32 one.

    Args:
        path: the file or folder.
        channel: one channel only; the others are not kept in memory.

    Returns:
        The array (z, y, x), or (C, z, y, x) where the file has several channels and none was
        chosen, and the grid it lies on. NaN and infinite voxels come through.

    Raises:
        DataError: if the file is missing, cut, corrupt, at odds with itself or of no known kind.
        GeometryError: if its axes are not orthogonal.
        MemoryBudgetError: if there is no memory for the array.
    """
    path = Path(path)
    if is_store(path):
        store = Store.opened(path)
        check_channel(path, channel, store.n_channels)
        return store.volume(channel=channel)
    if is_series(path):
        check_channel(path, channel, 1)
        return read_series(path)
    header = header_of(path)
    check_channel(path, channel, header.n_channels)
    stored = _stored(path, header, channel)
    if stored.ndim == 4 and channel is not None:
        stored = stored[channel].copy()  # lets go of the interleaved others
    return Volume(array=rescaled(path, stored, header), grid=header.grid)


def read_grid(path: str | Path) -> tuple[Grid, int]:
    """The grid and the number of channels of a volume, from its header alone.

    Nothing of the size of the volume is allocated.

    Raises:
        DataError: if the header cannot be used, or claims more than the file can hold.
        GeometryError: if its axes are not orthogonal.
    """
    path = Path(path)
    if is_store(path):
        store = Store.opened(path)
        return store.grid, store.n_channels
    if is_series(path):
        return read_series_grid(path), 1
    header = header_of(path)
    return header.grid, header.n_channels


def is_series(path: Path) -> bool:
    """Whether a volume of this name is a series of DICOM files."""
    return (path.is_dir() and not is_store(path)) or volume_suffix(path) == DICOM_ZIP


def header_of(path: Path) -> Header:
    """The judged header of a single-file volume.

    Raises:
        DataError: if the file is missing or of no known kind, or its header cannot be used.
        GeometryError: if its axes are not orthogonal.
    """
    file_bytes(path)  # a missing file is missing before its name is judged
    return format_of(path).read_header(path)


def check_channel(path: Path, channel: int | None, n_channels: int) -> None:
    """Refuse a channel that is not there.

    Raises:
        DataError: for one.
    """
    if channel is not None and not 0 <= channel < n_channels:
        raise DataError(
            f"{path}: channel {channel} of {n_channels}; expected 0 to {n_channels - 1}"
        )


def _stored(path: Path, header: Header, channel: int | None) -> Array:
    """The stored numbers as (z, y, x) or (C, z, y, x), in the machine's byte order."""
    n_channels = 1 if channel is not None and not header.interleaved else header.n_channels
    shape = header.grid.shape
    voxels = StoredVoxels(path, header, payload(path, header, channel=channel))
    flat = voxels.take(n_channels * header.grid.n_voxels)
    voxels.end()
    if n_channels == 1:
        return flat.reshape(shape)
    if header.interleaved:
        return np.moveaxis(flat.reshape(*shape, n_channels), -1, 0)
    return flat.reshape(n_channels, *shape)
