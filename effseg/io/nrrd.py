"""NRRD headers with the voxels in the same file (`.nrrd`), raw or gzip.

Source: the format's definition, https://teem.sourceforge.net/nrrd/format.html.
"""

import re
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
from effseg.types import FloatArray
from effseg.volume import Grid

_MAX_HEADER = 2**20
_TYPES = {
    "i1": "signed char|int8|int8_t",
    "u1": "uchar|unsigned char|uint8|uint8_t",
    "i2": "short|short int|signed short|signed short int|int16|int16_t",
    "u2": "ushort|unsigned short|unsigned short int|uint16|uint16_t",
    "i4": "int|signed int|int32|int32_t",
    "u4": "uint|unsigned int|uint32|uint32_t",
    "i8": "longlong|long long|long long int|signed long long|int64|int64_t",
    "u8": "ulonglong|unsigned long long|unsigned long long int|uint64|uint64_t",
    "f4": "float",
    "f8": "double",
}
_CODES = {name: code for code, names in _TYPES.items() for name in names.split("|")}
_NAMES = {code: names.split("|")[0] for code, names in _TYPES.items()} | {"i1": "int8"}
_TO_LPS = {
    "left-posterior-superior": (1.0, 1.0, 1.0),
    "lps": (1.0, 1.0, 1.0),
    "right-anterior-superior": (-1.0, -1.0, 1.0),
    "ras": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0),
    "las": (1.0, -1.0, 1.0),
}
_UNITS_MM = {"": 1.0, "mm": 1.0, "millimeter": 1.0, "um": 0.001, "µm": 0.001, "cm": 10.0, "m": 1e3}
_DETACHED = ("data file", "datafile")
_SKIPS = ("byte skip", "byteskip", "line skip", "lineskip")


def read_header(path: Path) -> Header:
    """Read and judge the header of a `.nrrd`.

    Without a space the world is taken as LPS, as ITK takes it.

    Raises:
        DataError: if the file is cut, its header impossible, or its voxels elsewhere.
        GeometryError: if its axes are not orthogonal.
    """
    fields, start = _fields(path)
    for name in _DETACHED:
        if name in fields:
            raise DataError(
                f"{path}: its voxels are in another file, {fields[name][:80]!r}; "
                "convert it to a .nrrd of one piece"
            )
    for name in _SKIPS:
        if fields.get(name, "0") != "0":
            raise DataError(f"{path}: field '{name}' is {fields[name]!r}; expected none")
    kind, encoding = _needed(path, fields, "type").lower(), _needed(path, fields, "encoding")
    if kind not in _CODES:
        raise DataError(f"{path}: type {kind[:80]!r}; expected {', '.join(_NAMES.values())}")
    if encoding.lower() not in ("raw", "gzip", "gz"):
        raise DataError(f"{path}: encoding {encoding[:80]!r}; expected raw or gzip")
    dtype: np.dtype[np.generic] = np.dtype(_CODES[kind])
    if dtype.itemsize > 1:
        endian = _needed(path, fields, "endian").lower()
        if endian not in ("little", "big"):
            raise DataError(f"{path}: endian {endian[:80]!r}; expected little or big")
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    n_axes = integers(path, "dimension", _needed(path, fields, "dimension"), count=1)[0]
    if n_axes not in (3, 4):
        raise DataError(f"{path}: dimension {n_axes}; expected 3, or 4 with a channel axis")
    sizes = integers(path, "sizes", _needed(path, fields, "sizes"), count=n_axes)
    affine, channel_axis = _affine(path, fields, n_axes)
    n_channels = 1 if channel_axis is None else sizes.pop(channel_axis)
    return Header(
        grid=grid_of(path, sizes, affine, source="its space directions"),
        dtype=dtype,
        n_channels=n_channels,
        interleaved=channel_axis == 0,
        start=start,
        packed=encoding.lower() != "raw",
    ).checked(path)


def write_header(path: Path, grid: Grid, dtype: "np.dtype[np.generic]", n_channels: int) -> bytes:  # noqa: ARG001 - one signature for all formats
    """The text before the voxels: LPS, gzip, channels on the slowest axis."""
    affine = affine_lps_of(grid)
    many = n_channels > 1
    lines = [
        "NRRD0004",
        f"type: {_NAMES[dtype.str[1:]]}",
        f"dimension: {4 if many else 3}",
        "space: left-posterior-superior",
        "sizes: " + " ".join(str(n) for n in (*grid.shape[::-1], *([n_channels] * many))),
        "space directions: "
        + " ".join([*(_vector(affine[:3, axis]) for axis in range(3)), *(["none"] * many)]),
        "kinds: domain domain domain" + " list" * many,
        "endian: little",
        "encoding: gzip",
        "space units: " + '"mm" "mm" "mm"',
        f"space origin: {_vector(affine[:3, 3])}",
    ]
    return ("\n".join(lines) + "\n\n").encode("ascii")


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields by name in lower case, and the byte at which the voxels begin."""
    n_bytes = file_bytes(path)
    try:
        with path.open("rb") as file:
            head = file.read(_MAX_HEADER)
    except OSError as error:
        raise unreadable(path, error) from error
    if re.match(rb"NRRD000[1-5]\r?\n", head) is None:
        raise DataError(
            f"{path}: not NRRD: begins with {head[:8]!r}, expected NRRD0001 to NRRD0005"
        )
    end = re.search(rb"\r?\n\r?\n", head)
    if end is None:
        raise DataError(
            f"{path}: is cut: no blank line ends the header in {min(n_bytes, _MAX_HEADER)} bytes"
        )
    fields: dict[str, str] = {}
    for line in head[: end.start()].decode("utf-8", errors="replace").splitlines()[1:]:
        match = re.match(r"([^:#][^:]*):(=?)(.*)", line)
        if match is None or match[2]:  # a comment, or a note of the form key:=value
            continue
        name = match[1].strip().lower()
        if name in fields:
            raise DataError(f"{path}: field '{name[:80]}' stands twice; expected once")
        fields[name] = match[3].strip()
    return fields, end.end()


def _needed(path: Path, fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise DataError(f"{path}: the header has no field '{name}'")
    return fields[name]


def _affine(path: Path, fields: dict[str, str], n_axes: int) -> tuple[FloatArray, int | None]:
    """4 x 4, indices to LPS millimetres, and which axis of the file is the channel."""
    if "space directions" not in fields:
        if n_axes != 3:
            raise DataError(
                f"{path}: 4 axes and no space directions; expected 'none' for the channel axis"
            )
        spacing = numbers(path, "spacings", _needed(path, fields, "spacings"), count=3)
        return np.diag([*spacing, 1.0]), None
    space = fields.get("space", "lps").lower()
    if space not in _TO_LPS:
        raise DataError(
            f"{path}: space {space[:80]!r}; expected left-posterior-superior, "
            "right-anterior-superior or left-anterior-superior"
        )
    words = re.findall(r"none|\([^)]*\)", fields["space directions"])
    channels = [axis for axis, word in enumerate(words) if word == "none"]
    if len(words) != n_axes or channels not in ([[]] if n_axes == 3 else [[0], [3]]):
        raise DataError(
            f"{path}: space directions {fields['space directions'][:120]!r}; expected three "
            "vectors, and 'none' for a channel axis, first or last"
        )
    vectors = [
        numbers(path, "space directions", word.strip("()"), count=3)
        for word in words
        if word != "none"
    ]
    origin = fields.get("space origin", "(0,0,0)").strip("()")
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(vectors).T
    affine[:3, 3] = numbers(path, "space origin", origin, count=3)
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", '"mm"')))
    if len(units) != 1 or not units <= _UNITS_MM.keys():
        raise DataError(f"{path}: space units {fields['space units'][:80]!r}; expected mm")
    affine[:3] *= np.asarray(_TO_LPS[space])[:, None] * _UNITS_MM[units.pop()]
    return affine, channels[0] if channels else None


def _vector(values: FloatArray) -> str:
    return "(" + ",".join(repr(float(v)) for v in values) + ")"
