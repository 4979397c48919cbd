"""MetaImage headers with the voxels in the same file (`.mha`), raw or zlib.

Source: the format's definition, https://itk.org/Wiki/ITK/MetaIO/Documentation.
"""

from pathlib import Path

import numpy as np

from effseg.errors import DataError
from effseg.io.header import (
    Header,
    affine_lps_of,
    file_bytes,
    grid_of,
    integers,
    numbers,
    unreadable,
)
from effseg.volume import Grid

_MAX_HEADER = 2**16
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_NAMES = {code: name for name, code in _TYPES.items() if name not in ("MET_LONG", "MET_ULONG")}
_SYNONYMS = {
    "orientation": "transformmatrix",
    "rotation": "transformmatrix",
    "origin": "offset",
    "position": "offset",
    "elementbyteordermsb": "binarydatabyteordermsb",
}
_FIXED = {
    "objecttype": "image",
    "ndims": "3",
    "binarydata": "true",
    "headersize": "0",
    "elementtointensityfunctionslope": "1",
    "elementtointensityfunctionoffset": "0",
}


def read_header(path: Path) -> Header:
    """Read and judge the header of a `.mha`.

    Raises:
        DataError: if the file is cut, its header impossible, or its voxels elsewhere.
        GeometryError: if its axes are not orthogonal.
    """
    fields, start = _fields(path)
    for name, value in _FIXED.items():
        if fields.get(name, value).lower() != value:
            raise DataError(f"{path}: field '{name}' is {fields[name][:80]!r}; expected {value}")
    where = fields["elementdatafile"]
    if where.lower() != "local":
        raise DataError(
            f"{path}: its voxels are in another file, {where[:80]!r}; "
            "convert it to a .mha of one piece"
        )
    kind = _needed(path, fields, "elementtype")
    if kind not in _TYPES:
        raise DataError(f"{path}: ElementType {kind[:80]!r}; expected one of {', '.join(_TYPES)}")
    big = _flag(path, fields, "binarydatabyteordermsb")
    packed = _flag(path, fields, "compresseddata")
    n_bytes = fields.get("compresseddatasize", "0")
    if packed and n_bytes != "0":
        found = file_bytes(path) - start
        if integers(path, "compresseddatasize", n_bytes, count=1) != [found]:
            raise DataError(
                f"{path}: is cut or has bytes left over: {found} bytes of voxels, "
                f"expected {n_bytes[:80]}; get the file again"
            )
    matrix = fields.get("transformmatrix", "1 0 0 0 1 0 0 0 1")
    spacing = numbers(path, "elementspacing", _needed(path, fields, "elementspacing"), count=3)
    # the file lists one axis after the other: the columns of the matrix
    columns = np.reshape(numbers(path, "transformmatrix", matrix, count=9), (3, 3)).T
    affine = np.eye(4)
    affine[:3, :3] = columns * spacing
    affine[:3, 3] = numbers(path, "offset", fields.get("offset", "0 0 0"), count=3)
    n_channels = fields.get("elementnumberofchannels", "1")
    return Header(
        grid=grid_of(
            path,
            integers(path, "dimsize", _needed(path, fields, "dimsize"), count=3),
            affine,
            source="its TransformMatrix",
        ),
        dtype=np.dtype(_TYPES[kind]).newbyteorder(">" if big else "<"),
        n_channels=integers(path, "elementnumberofchannels", n_channels, count=1)[0],
        interleaved=True,
        start=start,
        packed=packed,
    ).checked(path)


def write_header(path: Path, grid: Grid, dtype: "np.dtype[np.generic]", n_channels: int) -> bytes:  # noqa: ARG001 - one signature for all formats
    """The text before the voxels: raw, little endian, channels on the fastest axis."""
    affine = affine_lps_of(grid)
    direction = affine[:3, :3] / np.asarray(grid.spacing[::-1])
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = False",
        "TransformMatrix = " + _words(direction.T.ravel().tolist()),
        "Offset = " + _words(affine[:3, 3].tolist()),
        "CenterOfRotation = 0 0 0",
        "ElementSpacing = " + _words(grid.spacing[::-1]),
        "DimSize = " + " ".join(str(n) for n in grid.shape[::-1]),
        *([f"ElementNumberOfChannels = {n_channels}"] if n_channels > 1 else []),
        f"ElementType = {_NAMES[dtype.str[1:]]}",
        "ElementDataFile = LOCAL",
    ]
    return ("\n".join(lines) + "\n").encode("ascii")


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields by name in lower case, and the byte at which the voxels begin."""
    file_bytes(path)
    fields: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            while "elementdatafile" not in fields:
                line = file.readline(_MAX_HEADER)
                name, equals, value = line.decode("utf-8", errors="replace").partition("=")
                name = _SYNONYMS.get(name.strip().lower(), name.strip().lower())
                if not equals or not line.endswith(b"\n") or file.tell() > _MAX_HEADER:
                    raise DataError(
                        f"{path}: not MetaImage, or cut: byte {file.tell()} ends {line[-40:]!r}; "
                        "expected lines 'Name = value' up to 'ElementDataFile = LOCAL'"
                    )
                if name in fields:
                    raise DataError(f"{path}: field '{name[:80]}' stands twice; expected once")
                fields[name] = value.strip()
            return fields, file.tell()
    except OSError as error:
        raise unreadable(path, error) from error


def _needed(path: Path, fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise DataError(f"{path}: the header has no field '{name}'")
    return fields[name]


def _flag(path: Path, fields: dict[str, str], name: str) -> bool:
    value = fields.get(name, "false").lower()
    if value not in ("true", "false"):
        raise DataError(f"{path}: field '{name}' is {value[:80]!r}; expected True or False")
    return value == "true"


def _words(values: "list[float] | tuple[float, ...]") -> str:
    return " ".join(repr(float(v)) for v in values)
