"""Files to volumes."""

from pathlib import Path

import numpy as np

from effseg.errors import DataError, MemoryBudgetError
from effseg.io.dicom import read_series, read_series_grid
from effseg.io.formats import DICOM_ZIP, format_of, volume_suffix
from effseg.io.header import Header, file_bytes
from effseg.io.payload import payload
from effseg.types import Array
from effseg.volume import Grid, Volume


def read_volume(path: str | Path, *, channel: int | None = None) -> Volume:
    """Read a volume: `.nii`, `.nii.gz`, `.nrrd`, `.mha`, a DICOM series in a folder or a `.zip`.

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
    if _is_series(path):
        _check_channel(path, channel, 1)
        return read_series(path)
    header = _header(path)
    _check_channel(path, channel, header.n_channels)
    stored = _stored(path, header, channel)
    if stored.ndim == 4 and channel is not None:
        stored = stored[channel].copy()  # lets go of the interleaved others
    return Volume(array=_rescaled(path, stored, header), grid=header.grid)


def read_grid(path: str | Path) -> tuple[Grid, int]:
    """The grid and the number of channels of a volume, from its header alone.

    Nothing of the size of the volume is allocated.

    Raises:
        DataError: if the header cannot be used, or claims more than the file can hold.
        GeometryError: if its axes are not orthogonal.
    """
    path = Path(path)
    if _is_series(path):
        return read_series_grid(path), 1
    header = _header(path)
    return header.grid, header.n_channels


def _is_series(path: Path) -> bool:
    return path.is_dir() or volume_suffix(path) == DICOM_ZIP


def _header(path: Path) -> Header:
    file_bytes(path)  # a missing file is missing before its name is judged
    return format_of(path).read_header(path)


def _check_channel(path: Path, channel: int | None, n_channels: int) -> None:
    if channel is not None and not 0 <= channel < n_channels:
        raise DataError(
            f"{path}: channel {channel} of {n_channels}; expected 0 to {n_channels - 1}"
        )


def _stored(path: Path, header: Header, channel: int | None) -> Array:
    """The stored numbers as (z, y, x) or (C, z, y, x), in the machine's byte order."""
    n_channels = 1 if channel is not None and not header.interleaved else header.n_channels
    shape = header.grid.shape
    try:
        flat = np.empty(n_channels * header.grid.n_voxels, dtype=header.dtype)
    except (MemoryError, ValueError) as error:  # ValueError: more than an address can say
        raise MemoryBudgetError(
            f"{path}: {header.payload_bytes} bytes for {n_channels} channel(s) of {shape} voxels "
            "are not to be had; read one channel, or use a machine with more memory"
        ) from error
    as_bytes, at = flat.view(np.uint8), 0
    for block in payload(path, header, channel=channel):
        as_bytes[at : at + len(block)] = np.frombuffer(block, dtype=np.uint8)
        at += len(block)
    if not flat.dtype.isnative:
        flat = flat.byteswap(inplace=True)
    flat = flat.view(flat.dtype.newbyteorder("="))
    if n_channels == 1:
        return flat.reshape(shape)
    if header.interleaved:
        return np.moveaxis(flat.reshape(*shape, n_channels), -1, 0)
    return flat.reshape(n_channels, *shape)


def _rescaled(path: Path, stored: Array, header: Header) -> Array:
    """True values, worked out in float64, one plane after the other."""
    if (header.slope, header.intercept) == (1.0, 0.0):
        return stored
    in_place = stored.dtype.kind == "f"
    values = stored if in_place else np.empty(stored.shape, dtype=np.float32)
    try:
        with np.errstate(over="raise"):
            for plane in np.ndindex(stored.shape[:-2]):
                values[plane] = stored[plane].astype(np.float64) * header.slope + header.intercept
    except FloatingPointError as error:
        raise DataError(
            f"{path}: slope {header.slope:g} and intercept {header.intercept:g} take the voxels "
            f"beyond {values.dtype}; expected a sound header"
        ) from error
    return values
