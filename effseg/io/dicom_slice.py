"""One DICOM image: its header judged, its pixels as true values. The sole importer of pydicom.

Source: DICOM PS3.3, C.7.6.2.1.1 for the place of a slice, C.11.1.1.2 for its values.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from effseg.errors import DataError
from effseg.io.header import DEFLATE_RATIO, numbers
from effseg.io.members import Member
from effseg.types import Array, FloatArray

if TYPE_CHECKING:
    from pydicom import Dataset, FileDataset

_MARK_AT = 128
_SUFFIXES = (".dcm", ".dicom", ".ima")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_MAX_SLOPE = 1e9


@dataclass(frozen=True)
class Slice:
    """What the header of an image says.

    Attributes:
        member: the file.
        series: SeriesInstanceUID.
        frame: FrameOfReferenceUID.
        shape: rows, columns.
        gaps: millimetres between rows, between columns.
        position: centre of the first pixel, LPS (x, y, z) mm.
        along_row: unit vector (x, y, z) in which the column index grows.
        along_column: unit vector (x, y, z) in which the row index grows.
        slope: of the map from stored to true values.
        intercept: of the same map.
    """

    member: Member
    series: str
    frame: str
    shape: tuple[int, int]
    gaps: FloatArray
    position: FloatArray
    along_row: FloatArray
    along_column: FloatArray
    slope: float
    intercept: float

    @property
    def is_whole(self) -> bool:
        """Whether its true values are whole numbers."""
        return self.slope.is_integer() and self.intercept.is_integer()


def read_slice(member: Member) -> Slice | None:
    """Read the header of one image; None where the file is not an image.

    Raises:
        DataError: if pydicom is missing, the file is cut, or an image that cannot be used.
    """
    where = member.where
    with member.open() as file:
        head = file.read(4096)
        if head[_MARK_AT : _MARK_AT + 4] != b"DICM":
            if where.suffix.lower() in _SUFFIXES:
                raise DataError(
                    f"{where}: {member.n_bytes} bytes without DICOM's mark at byte {_MARK_AT}; "
                    "cut, corrupt, or older than the standard"
                )
            return None
        if _DEFLATED in head:  # pydicom would inflate it without a bound
            raise DataError(f"{where}: deflated as a whole; expected another transfer syntax")
        file.seek(0)
        data = _parsed(member, file, pixels=False)
    if not _is_image(_text(member, data.file_meta, "MediaStorageSOPClassUID", default="")):
        return None
    _check_pixels(member, data)
    slope, intercept = _scaling(member, data)
    cosines = np.asarray(_numbers(member, data, "ImageOrientationPatient", count=6)).reshape(2, 3)
    if not np.allclose(cosines @ cosines.T, np.eye(2), atol=1e-3):
        raise DataError(
            f"{where}: ImageOrientationPatient {cosines.ravel().tolist()}; expected two unit "
            "vectors at right angles"
        )
    return Slice(
        member=member,
        series=_text(member, data, "SeriesInstanceUID"),
        frame=_text(member, data, "FrameOfReferenceUID", default=""),
        shape=(_count(member, data, "Rows"), _count(member, data, "Columns")),
        gaps=np.asarray(_numbers(member, data, "PixelSpacing", count=2)),
        position=np.asarray(_numbers(member, data, "ImagePositionPatient", count=3)),
        along_row=cosines[0],
        along_column=cosines[1],
        slope=slope,
        intercept=intercept,
    )


def read_values(one: Slice) -> Array:
    """The true values of an image, (rows, columns): int64 where they are whole, else float64.

    Raises:
        DataError: if its pixels are cut, corrupt, or packed in a way that cannot be read here.
    """
    with one.member.open() as file:
        data = _parsed(one.member, file, pixels=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = np.asarray(data.pixel_array)
    except MemoryError:
        raise
    except Exception as error:  # any, for a decoder of foreign bytes
        raise DataError(
            f"{one.member.where}: its pixels cannot be read: {error}; get the file again, or for "
            "a packed one install pylibjpeg"
        ) from error
    if stored.shape != one.shape:
        raise DataError(f"{one.member.where}: pixels of shape {stored.shape}; expected {one.shape}")
    if one.is_whole:
        return stored.astype(np.int64) * int(one.slope) + int(one.intercept)
    return stored.astype(np.float64) * one.slope + one.intercept


def _parsed(member: Member, file: BinaryIO, *, pixels: bool) -> "FileDataset":
    """The data set; pydicom's warnings are put aside, for what counts is judged here."""
    try:
        import pydicom
    except ImportError as error:
        raise DataError(
            f'{member.where}: reading DICOM takes pydicom; pip install "effseg[dicom]"'
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pydicom.dcmread(file, stop_before_pixels=not pixels)
    except MemoryError:
        raise
    except Exception as error:  # any, for a parser of foreign bytes
        raise DataError(f"{member.where}: cannot be parsed: {error}; get the file again") from error


def _is_image(sop_class: str) -> bool:
    """False for the classes that are known to be something else; images say so in their names."""
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    name = UID(sop_class, validation_mode=IGNORE).name
    return name == sop_class or "Image Storage" in name


def _check_pixels(member: Member, data: "FileDataset") -> None:
    """One grey frame, light where the value is high, no larger than its file allows."""
    n_frames = _text(member, data, "NumberOfFrames", default="1")
    if n_frames != "1":
        raise DataError(
            f"{member.where}: {n_frames} frames; expected one: have it exported slice by slice"
        )
    photometric = _text(member, data, "PhotometricInterpretation")
    if photometric != "MONOCHROME2":
        raise DataError(
            f"{member.where}: PhotometricInterpretation {photometric}; expected MONOCHROME2"
        )
    bits = _count(member, data, "BitsAllocated")
    if bits not in (8, 16, 32):
        raise DataError(f"{member.where}: BitsAllocated {bits}; expected 8, 16 or 32")
    if "ModalityLUTSequence" in data:
        raise DataError(f"{member.where}: values by a look-up table; expected slope and intercept")
    claim = _count(member, data, "Rows") * _count(member, data, "Columns") * bits // 8
    native = _text(member, data.file_meta, "TransferSyntaxUID", default=_NATIVE[0]) in _NATIVE
    most = member.n_bytes * (1 if native else DEFLATE_RATIO)
    if claim > most:
        raise DataError(
            f"{member.where}: is cut or forged: {claim} bytes of pixels in a file of "
            f"{member.n_bytes}; get the file again"
        )


def _scaling(member: Member, data: "FileDataset") -> tuple[float, float]:
    ct = _text(member, data, "Modality", default="") == "CT"
    pair = []
    for keyword, identity in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        absent = not _text(member, data, keyword, default="")
        if absent and ct:
            raise DataError(f"{member.where}: no {keyword}; a CT without it has no HU")
        value = identity if absent else _numbers(member, data, keyword, count=1)[0]
        if abs(value) > _MAX_SLOPE or (value == 0 and identity == 1):
            raise DataError(f"{member.where}: {keyword} {value:g}; expected a usable number")
        pair.append(value)
    return pair[0], pair[1]


def _text(member: Member, data: "Dataset", keyword: str, *, default: str | None = None) -> str:
    """An element as text, as it stands in the file: no length of a number is too long."""
    element: Any = data.get_item(keyword) if keyword in data else None
    value = element.value if element is not None else None
    if isinstance(value, bytes):
        text = value.decode("ascii", errors="replace").strip(" \0")
    else:
        text = "" if value is None else str(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if text:
        return text
    if default is None:
        raise DataError(f"{member.where}: has no {keyword}; cut, or not a slice of a series")
    return default


def _numbers(member: Member, data: "FileDataset", keyword: str, *, count: int) -> list[float]:
    text = _text(member, data, keyword)
    return numbers(member.where, keyword, text.replace("\\", " "), count=count)


def _count(member: Member, data: "FileDataset", keyword: str) -> int:
    try:
        value = data.get(keyword)
    except Exception as error:  # any, for a parser of foreign bytes
        raise DataError(f"{member.where}: {keyword} cannot be read: {error}") from error
    if not isinstance(value, int) or value < 1:
        raise DataError(f"{member.where}: {keyword} is {value}; expected at least 1")
    return value
