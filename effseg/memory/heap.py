"""Whether the C library gives freed memory back to the system at once.

glibc maps blocks of 32 MiB and more one by one, and keeps smaller ones on a heap once it has seen
them freed. There they lie between what still lives, and a training step's activations fit into the
gaps badly: resident memory is 1.1 to 2.1 times what tensors take, by no rule that could be told
beforehand. Mapped one by one, it is what tensors take and a few MiB. The price is that the system
clears each page anew (mallopt(3), M_MMAP_THRESHOLD).
"""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

from effseg.plans import Heap

MAPPED_BYTES = 128 * 1024
"""From this size on a block is mapped. glibc's own, until it has seen a larger one freed."""
KEPT_BYTES = 32 * 2**20
"""What glibc raises it to in the end (DEFAULT_MMAP_THRESHOLD_MAX)."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt, in malloc.h."""


_entered = 0
_lock = threading.Lock()


@contextmanager
def mapped_blocks() -> Iterator[bool]:
    """Map large blocks one by one, in the whole process; yields whether the C library can.

    What is free on the heap already is used before anything is mapped: enter it early.

    It may be entered again within, and from other threads: the last to leave ends it. glibc is then
    left as it is after a while of work with large blocks: it keeps those below 32 MiB, but no
    longer changes its mind by what it sees.
    """
    libc = _glibc()
    if libc is None:
        yield False
        return
    _count(libc, 1)
    try:
        yield True
    finally:
        _count(libc, -1)


def give_back_memory() -> None:
    """Give back what nothing uses any more: unreachable cycles, and what allocators keep of it.

    CUDA's caching allocator returns its free blocks to the card, glibc those on its heap.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def heap_of(kind: Heap) -> AbstractContextManager[object]:
    """The heap that a plan asks for: `mapped_blocks`, or as the C library has it."""
    return mapped_blocks() if kind == "mapped" else nullcontext()


def _count(libc: ctypes.CDLL, more: int) -> None:
    global _entered
    with _lock:
        before, _entered = _entered, _entered + more
        if before == 0:
            libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
            libc.malloc_trim(0)
        elif _entered == 0:
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            libc.mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018  # other C libraries have no such symbol
    except (OSError, AttributeError):
        return None
    return libc
