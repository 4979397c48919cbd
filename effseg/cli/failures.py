"""What a failure is called on the command line: one line and an exit code."""

import errno
import tempfile
import traceback

from effseg.cli.console import plain
from effseg.errors import EffsegError

USAGE, BAD_INPUT, NO_RESOURCES, INTERNAL, STOPPED = 1, 2, 3, 4, 130


def explained(error: Exception) -> tuple[str, int]:
    """A failure in one line of markup, and its exit code."""
    if isinstance(error, EffsegError):
        return plain(str(error)), error.exit_code
    if isinstance(error, OSError):  # what the system refuses, a read-only folder say, is no bug
        return plain(str(error)), NO_RESOURCES if error.errno == errno.ENOSPC else BAD_INPUT
    if _is_out_of_memory(error):
        return "out of memory; give a smaller --memory, which plans for less", NO_RESOURCES
    said = " ".join(f"{type(error).__name__}: {error}".split())
    path = _write_traceback(error)
    return f"[red]bug[/] of effseg, please report it with {path}: {plain(said)}", INTERNAL


def _is_out_of_memory(error: Exception) -> bool:
    """Python says so by a class; torch by words in a RuntimeError, one phrase a device."""
    if isinstance(error, MemoryError):
        return True
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _write_traceback(error: Exception) -> str:
    """A file with an exception's traceback."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="effseg-traceback-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return file.name
