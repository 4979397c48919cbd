"""The files of a folder or of a zip, alike to their reader."""

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from effseg.errors import DataError
from effseg.io.header import DEFLATE_RATIO, file_bytes, unreadable

_MAX_MEMBER_BYTES = 2**28


@dataclass(frozen=True)
class Member:
    """One file.

    Attributes:
        where: the folder or zip and the name in it: for words, a zip's name is never opened.
        n_bytes: its size, as declared.
        open: gives its bytes.
    """

    where: Path
    n_bytes: int
    open: Callable[[], BinaryIO]


@contextmanager
def members(path: Path) -> Iterator[list[Member]]:
    """The files of a folder, with those of the folders below, or of a zip, by name.

    Nothing is extracted: a zip's files are read into memory, one at a time.

    Raises:
        DataError: if the zip is cut, corrupt, encrypted, or claims more than it can hold.
    """
    try:
        if path.is_dir():
            yield _of_folder(path)
            return
        n_bytes = file_bytes(path)
        with zipfile.ZipFile(path) as archive:
            yield _of_zip(path, archive, n_bytes)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{path}: not a sound zip: {error}; get the file again") from error
    except OSError as error:
        raise unreadable(Path(error.filename or path), error) from error


def _of_folder(path: Path) -> list[Member]:
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return [
        Member(file, file_bytes(file), lambda file=file: file.open("rb"))  # type: ignore[misc]
        for file in sorted(files)
        if file.is_file()  # no pipes, no dangling links
    ]


def _of_zip(path: Path, archive: zipfile.ZipFile, n_bytes: int) -> list[Member]:
    infos = sorted(
        (info for info in archive.infolist() if not info.is_dir()), key=lambda info: info.filename
    )
    total = sum(info.file_size for info in infos)
    if total > DEFLATE_RATIO * n_bytes:
        raise DataError(
            f"{path}: claims to hold {total} bytes in {n_bytes}; expected at most "
            f"{DEFLATE_RATIO * n_bytes}: it is forged"
        )
    for info in infos:
        if info.flag_bits & 1:
            raise DataError(f"{path}: {info.filename} is encrypted; expected a plain zip")
        if info.file_size > _MAX_MEMBER_BYTES:
            raise DataError(
                f"{path}: {info.filename} is {info.file_size} bytes; expected single slices of at "
                f"most {_MAX_MEMBER_BYTES}"
            )
    # read whole: a slice is small, and going back in a zip's member inflates it anew
    return [
        Member(
            path / info.filename,
            info.file_size,
            lambda info=info: io.BytesIO(archive.read(info)),  # type: ignore[misc]
        )
        for info in infos
    ]
