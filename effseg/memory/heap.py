"""What the C library does with memory that is freed: give it back to the system, or keep it.

glibc maps blocks of 32 MiB and more one by one, and keeps smaller ones on a heap once it has seen
them freed. There they lie between what still lives, and a training step's activations fit into the
gaps badly: resident memory is 1.1 to 2.1 times what tensors take, by no rule that could be told
beforehand. Mapped one by one, it is what tensors take and a few MiB. The price is that the system
clears each page anew: on a virtual machine steps and predictions took twice as long. Kept, all of
them, the large ones too, they are cleared once (mallopt(3), M_MMAP_THRESHOLD, M_MMAP_MAX and
M_TRIM_THRESHOLD).
"""

import ctypes
import gc
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Literal

import torch

from effseg.plans import Heap

MAPPED_BYTES = 128 * 1024
"""From this size on a block is mapped. glibc's own, until it has seen a larger one freed."""
KEPT_BYTES = 32 * 2**20
"""What glibc raises it to in the end (DEFAULT_MMAP_THRESHOLD_MAX)."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Of mallopt, in malloc.h."""
KEPT_WORST = 2.5
"""Resident memory where what is freed is kept, over what it is where it is given back: more than
was seen of any training step or prediction (`benchmarks/heaps.py`)."""
N_MAPPED = 65536
"""How many blocks glibc maps at most (DEFAULT_MMAP_MAX)."""
NEVER = -1
"""As a threshold of trimming (mallopt(3))."""

Manner = Literal["mapped", "kept"]

SETTINGS: Mapping[Manner | None, Mapping[int, int]] = {
    None: {
        M_MMAP_MAX: N_MAPPED,
        M_MMAP_THRESHOLD: KEPT_BYTES,
        M_TRIM_THRESHOLD: 2 * KEPT_BYTES,
    },
    "mapped": {
        M_MMAP_MAX: N_MAPPED,
        M_MMAP_THRESHOLD: MAPPED_BYTES,
        M_TRIM_THRESHOLD: MAPPED_BYTES,
    },
    "kept": {M_MMAP_MAX: 0, M_MMAP_THRESHOLD: KEPT_BYTES, M_TRIM_THRESHOLD: NEVER},
}
"""Of the C library, once one of them was in force; None: neither is any more."""

_entered: dict[Manner, int] = {"mapped": 0, "kept": 0}
_lock = threading.Lock()


def mapped_blocks() -> AbstractContextManager[bool]:
    """Map large blocks one by one, in the whole process; yields whether the C library can.

    What is free on the heap already is used before anything is mapped: enter it early.

    It may be entered again within, and from other threads: the last to leave ends it. glibc is then
    left as it is after a while of work with large blocks: it keeps those below 32 MiB, but no
    longer changes its mind by what it sees.
    """
    return _within("mapped")


def kept_blocks() -> AbstractContextManager[bool]:
    """Keep all that is freed, in the whole process; yields whether the C library can.

    Within `mapped_blocks`, entered before or after and from whatever thread, nothing is kept: what
    promises fewer bytes wins. The last to leave gives back what is free at the heap's end.
    """
    return _within("kept")


def heap_of(kind: Heap) -> AbstractContextManager[object]:
    """The heap that a plan asks for: `mapped_blocks`, `kept_blocks`, or as the C library has it."""
    if kind == "mapped":
        return mapped_blocks()
    return kept_blocks() if kind == "kept" else nullcontext()


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


@contextmanager
def _within(manner: Manner) -> Iterator[bool]:
    libc = _glibc()
    if libc is None:
        yield False
        return
    _count(libc, manner, 1)
    try:
        yield True
    finally:
        _count(libc, manner, -1)


def _count(libc: ctypes.CDLL, manner: Manner, more: int) -> None:
    with _lock:
        before = _in_force()
        _entered[manner] += more
        now = _in_force()
        if now == before:
            return
        for parameter, value in SETTINGS[now].items():
            libc.mallopt(parameter, value)
        if now == "mapped" or before == "kept":
            libc.malloc_trim(0)


def _in_force() -> Manner | None:
    if _entered["mapped"]:
        return "mapped"
    return "kept" if _entered["kept"] else None


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018  # other C libraries have no such symbol
    except (OSError, AttributeError):
        return None
    return libc
