"""What the C library keeps of memory that was let go."""

import ctypes
import sys


def trim_heap() -> None:
    """Give the system back what glibc's heap holds and nobody uses; of another, nothing.

    glibc keeps freed blocks below 32 MiB for later ones (mallopt(3), M_MMAP_THRESHOLD): work that
    goes through such blocks in turns ends up with several times what it has in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
