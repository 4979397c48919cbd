"""Which formats there are, told by the end of a file's name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from effseg.errors import DataError
from effseg.io import metaimage, nifti, nrrd
from effseg.io.header import Header
from effseg.io.voxel_stream import Packed
from effseg.volume import Grid


@dataclass(frozen=True)
class Format:
    """How one kind of file is read and written.

    Attributes:
        read_header: of a file of this kind.
        write_header: the bytes before the voxels, from path (for errors), grid, type, channels.
        interleaved: whether channels are written as the fastest axis.
        packed: what is written as a gzip stream.
    """

    read_header: Callable[[Path], Header]
    write_header: Callable[[Path, Grid, "np.dtype[np.generic]", int], bytes]
    interleaved: bool
    packed: Packed


FORMATS = {
    ".nii.gz": Format(
        partial(nifti.read_header, packed=True),
        nifti.write_header,
        interleaved=False,
        packed="file",
    ),
    ".nii": Format(
        partial(nifti.read_header, packed=False), nifti.write_header, interleaved=False, packed=""
    ),
    ".nrrd": Format(nrrd.read_header, nrrd.write_header, interleaved=False, packed="voxels"),
    ".mha": Format(metaimage.read_header, metaimage.write_header, interleaved=True, packed=""),
}

DICOM_ZIP = ".zip"

ZARR = ".zarr"
"""A folder that holds a Zarr store."""

WRITTEN_SUFFIXES: tuple[str, ...] = (*FORMATS, ZARR)
"""What the name of a volume that can be written ends with."""

VOLUME_SUFFIXES: tuple[str, ...] = (*WRITTEN_SUFFIXES, DICOM_ZIP)
"""What the name of a readable volume ends with; a folder that holds a DICOM series is one too."""

_DETACHED = (".mhd", ".nhdr", ".hdr", ".img")


def volume_suffix(path: Path) -> str:
    """The suffix of `VOLUME_SUFFIXES` that the name ends with, in any case; "" for none."""
    name = path.name.lower()
    return next((s for s in VOLUME_SUFFIXES if name.endswith(s) and name != s), "")


def strip_suffix(path: Path) -> str:
    """The name of a volume without its suffix: `case_07` for `images/case_07.nii.gz`.

    A name without a suffix of `VOLUME_SUFFIXES`, a folder's for one, is returned as it is.
    """
    return path.name[: len(path.name) - len(volume_suffix(path))]


def is_store_name(path: Path) -> bool:
    """Whether a volume of this name is a Zarr store."""
    return volume_suffix(path) == ZARR


def is_store(path: Path) -> bool:
    """Whether a Zarr store of this name is there, sound or not."""
    return is_store_name(path) and path.is_dir()


def is_volume(path: Path) -> bool:
    """Whether a file or a Zarr store is there; a folder of DICOM files is neither."""
    return path.is_file() or is_store(path)


def list_volumes(folder: Path) -> list[Path]:
    """The volumes in a folder, sorted: files and Zarr stores.

    A series of DICOM files, one a slice, is none of them.

    Hidden files are left out, such as the `._` twins that macOS leaves on other disks.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if volume_suffix(path) and not path.name.startswith(".") and is_volume(path)
    )


def format_of(path: Path) -> Format:
    """The format of a single-file volume.

    Raises:
        DataError: if the name has no suffix of one, or that of a header with detached voxels.
    """
    suffix = volume_suffix(path)
    if suffix in FORMATS:
        return FORMATS[suffix]
    if path.suffix.lower() in _DETACHED:
        raise DataError(
            f"{path}: {path.suffix} keeps its voxels in another file, which may be anywhere; "
            "convert it to .nii.gz, .nrrd or .mha"
        )
    if suffix == ZARR:
        raise DataError(f"{path}: a file; expected a folder that holds a Zarr store")
    raise DataError(f"{path}: no format by this name; expected {', '.join(WRITTEN_SUFFIXES)}")
