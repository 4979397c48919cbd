"""Files that appear under their name whole, or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to; once the block ends well, what is there takes its place under `path`.

    Missing folders are made. The file is forced to the disk before it gets its name, so a crash or
    a power cut leaves the old file or the new one. A link keeps pointing: what is behind it is
    replaced. If the block fails, nothing is left behind and what was there before stays.

    Raises:
        OSError: if the folder cannot be made or the file cannot be put in place.
    """
    target = Path(os.path.realpath(path))
    partial = target.parent / f".{secrets.token_hex(6)}.partial"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        _sync(partial)
        partial.replace(target)
        if os.name == "posix":  # make the new name last, too, where the system can
            _sync(target.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
