"""NIfTI headers, versions 1 and 2, one file (`.nii`, `.nii.gz`).

Source: the NIfTI-1 standard, https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h. nibabel
takes a header apart and turns quaternions; what to believe of it is decided here.
"""

import math
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from effseg.errors import DataError
from effseg.io.header import Header, affine_lps_of, file_bytes, grid_of, unreadable
from effseg.io.payload import inflate
from effseg.types import FloatArray
from effseg.volume import Grid

_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8",
    1280: "u8",
}  # fmt: skip
_UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_OFFSET = 16 * 2**20
_MAX_SLOPE = 1e20
_QUATERNION_ROUNDING = 1e-4
_SCANNER = 1
_HEADER_1, _HEADER_2 = 348, 540


def read_header(path: Path, *, packed: bool) -> Header:
    """Read and judge the header of a `.nii`, or `.nii.gz` if packed.

    The sform counts where its code is positive, else the qform, else the spacing alone: then the
    world is nibabel's, centred, axes towards left, front and head.

    Raises:
        DataError: if the file is cut, or its header impossible or at odds with itself.
        GeometryError: if its axes are not orthogonal.
    """
    head = _head(path, packed=packed)
    fields, least = _fields(path, head)
    shape = _shape(path, fields)
    dtype = _dtype(path, fields)
    offset = float(fields["vox_offset"])
    if not (least <= offset <= least + _MAX_OFFSET and offset.is_integer()):
        raise DataError(
            f"{path}: vox_offset is {offset:g}; expected a whole number from {least} to "
            f"{least + _MAX_OFFSET}"
        )
    slope, intercept = _scaling(path, fields)
    with np.errstate(invalid="ignore"):  # a signalling NaN is refused as any other, below
        affine, source = _affine(path, fields, shape)
    return Header(
        grid=grid_of(path, shape[:3], _RAS_TO_LPS @ affine, source=source),
        dtype=dtype,
        n_channels=math.prod(shape[3:]),
        interleaved=False,
        start=0 if packed else int(offset),
        packed=packed,
        skip=int(offset) if packed else 0,
        slope=slope,
        intercept=intercept,
    ).checked(path)


def write_header(path: Path, grid: Grid, dtype: "np.dtype[np.generic]", n_channels: int) -> bytes:
    """The 352 bytes before the voxels: NIfTI-1, sform and qform alike, channels last.

    NIfTI-1 stores an sform in float32: a relative error of 6e-8 in each of its numbers.

    Raises:
        DataError: if a length is more than NIfTI-1 can say.
    """
    shape = (*grid.shape[::-1], *([n_channels] if n_channels > 1 else []))
    if max(shape) > np.iinfo(np.int16).max:
        raise DataError(
            f"{path}: {shape} voxels (x, y, z); NIfTI-1 holds 32767 along an axis: write .nrrd"
        )
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_zooms((*grid.spacing[::-1], *([1.0] if n_channels > 1 else [])))
    affine = _RAS_TO_LPS @ affine_lps_of(grid)
    header.set_qform(affine, code=_SCANNER)
    header.set_sform(affine, code=_SCANNER)
    header.set_xyzt_units("mm")
    header["vox_offset"] = _HEADER_1 + 4
    header["scl_slope"], header["scl_inter"] = 1, 0
    return bytes(header.binaryblock) + bytes(4)  # four zeros: no extensions follow


def _head(path: Path, *, packed: bool) -> bytes:
    n_bytes = file_bytes(path)
    try:
        with path.open("rb") as file:
            if (file.read(2) == b"\x1f\x8b") != packed:
                found, expected = ("plain", "gzip") if packed else ("gzip", "plain")
                raise DataError(
                    f"{path}: {found} data, {n_bytes} bytes, under this name; expected {expected} "
                    "data: cut or corrupt, or .nii and .nii.gz were mixed up"
                )
            file.seek(0)
            if not packed:
                return file.read(_HEADER_2)
            head = b""
            for block in inflate(path, file, block=4096):
                head += block
                if len(head) >= _HEADER_2:
                    break
            return head
    except OSError as error:
        raise unreadable(path, error) from error


def _fields(path: Path, head: bytes) -> "tuple[nibabel.Nifti1Header, int]":
    """The header's fields, and the least offset at which its voxels may begin."""
    for endianness in ("<", ">"):
        n_bytes = int(np.frombuffer(head.ljust(4, b"\0"), dtype=f"{endianness}i4", count=1)[0])
        if n_bytes in (_HEADER_1, _HEADER_2):
            break
    else:
        raise DataError(
            f"{path}: not NIfTI: begins with {head[:4].hex() or 'nothing'}, expected a header "
            f"length of {_HEADER_1} or {_HEADER_2}"
        )
    if len(head) < n_bytes:
        raise DataError(f"{path}: is cut: {len(head)} bytes, expected a header of {n_bytes}")
    kind, magic = (
        (nibabel.Nifti1Header, b"n+1") if n_bytes == _HEADER_1 else (nibabel.Nifti2Header, b"n+2")
    )
    fields = kind(head[:n_bytes], endianness, check=False)
    found = bytes(fields["magic"].item())[:3]
    if found != magic:
        hint = "; its voxels are in another file: convert it to .nii.gz" if b"ni" in found else ""
        raise DataError(f"{path}: magic {found!r}, expected {magic!r}{hint}")
    return fields, n_bytes + 4


def _shape(path: Path, fields: "nibabel.Nifti1Header") -> tuple[int, ...]:
    """Voxels along (x, y, z), and channels where there are several."""
    n_axes = int(fields["dim"][0])
    dims = tuple(int(n) for n in fields["dim"][1 : max(0, min(n_axes, 7)) + 1])
    if not 3 <= n_axes <= 7 or min(dims) < 1:
        raise DataError(
            f"{path}: dim says {n_axes} axes of {dims}; expected 3 to 7 of at least one voxel"
        )
    channels = tuple(n for n in dims[3:] if n > 1)
    if len(channels) > 1:
        raise DataError(f"{path}: {dims} voxels; expected (x, y, z) and one channel axis at most")
    return (*dims[:3], *channels)


def _dtype(path: Path, fields: "nibabel.Nifti1Header") -> "np.dtype[np.generic]":
    code, bits = int(fields["datatype"]), int(fields["bitpix"])
    if code not in _DTYPES:
        raise DataError(
            f"{path}: datatype {code}; expected real numbers of at most 64 bits "
            f"({', '.join(str(known) for known in _DTYPES)})"
        )
    dtype: np.dtype[np.generic] = np.dtype(_DTYPES[code]).newbyteorder(fields.endianness)
    if bits != 8 * dtype.itemsize:
        raise DataError(f"{path}: bitpix {bits}; expected {8 * dtype.itemsize} for {dtype}")
    return dtype


def _scaling(path: Path, fields: "nibabel.Nifti1Header") -> tuple[float, float]:
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or math.isnan(slope):  # the standard's and nibabel's ways to say: none
        return 1.0, 0.0
    if not (abs(slope) <= _MAX_SLOPE and abs(intercept) <= _MAX_SLOPE):
        raise DataError(
            f"{path}: scl_slope {slope:g}, scl_inter {intercept:g}; expected finite numbers of at "
            f"most {_MAX_SLOPE:g}"
        )
    return slope, intercept


def _affine(
    path: Path, fields: "nibabel.Nifti1Header", shape: tuple[int, ...]
) -> tuple[FloatArray, str]:
    """4 x 4, indices to RAS millimetres, and where it comes from."""
    unit = int(fields["xyzt_units"]) & 7
    if unit not in _UNITS_MM:
        raise DataError(f"{path}: unit code {unit}; expected 1 (m), 2 (mm), 3 (micron) or 0")
    if fields["pixdim"][0] == 0:  # the standard: as if 1
        fields["pixdim"][0] = 1
    sform_code, qform_code = int(fields["sform_code"]), int(fields["qform_code"])
    if sform_code > 0:
        affine, source = fields.get_sform(), "its sform"
        if sform_code == qform_code:
            _check_agreement(path, fields, affine, shape)
    elif qform_code > 0:
        affine, source = _qform(path, fields), "its qform"
    else:
        affine, source = fields.get_base_affine(), "its pixdim"
    affine = np.asarray(affine, dtype=np.float64)
    zooms = np.asarray(fields["pixdim"][1:4], dtype=np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if np.isfinite(lengths).all() and not np.allclose(lengths, np.abs(zooms), rtol=1e-3, atol=0):
        raise DataError(
            f"{path}: spacing {_words(lengths)} (x, y, z) by {source}, {_words(zooms)} by its "
            "pixdim; expected equal: set one right"
        )
    affine[:3] *= _UNITS_MM[unit]
    return affine, source


def _qform(path: Path, fields: "nibabel.Nifti1Header") -> FloatArray:
    quaternion = np.asarray([fields[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
    norm = float(np.linalg.norm(quaternion))
    if 1 < norm < 1 + _QUATERNION_ROUNDING:  # rounded decimals; nibabel takes 2e-7
        for axis, value in zip("bcd", quaternion / norm, strict=True):
            fields[f"quatern_{axis}"] = value
    try:
        return np.asarray(fields.get_qform(), dtype=np.float64)
    except (ValueError, HeaderDataError) as error:
        raise DataError(f"{path}: its qform is impossible: {error}") from error


def _check_agreement(
    path: Path, fields: "nibabel.Nifti1Header", sform: FloatArray, shape: tuple[int, ...]
) -> None:
    """Two transforms to the same space (equal codes) must put each corner in the same place."""
    try:
        qform = _qform(path, fields)
    except DataError:
        return  # impossible, so it puts nothing anywhere
    corners = np.asarray([(*c, 1.0) for c in product(*((0.0, n - 1.0) for n in shape[:3]))])
    gap = np.linalg.norm(corners @ (sform - qform).T, axis=1).max()
    half = np.linalg.norm(sform[:3, :3], axis=0).min() / 2
    if gap > half:
        raise DataError(
            f"{path}: sform and qform, both of code {int(fields['sform_code'])}, put a corner "
            f"{gap:g} apart; expected less than half a voxel, {half:g}: unset one code"
        )


def _words(values: FloatArray) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values) + ")"
