"""Memory whose bytes a test can count."""

from mmap import mmap

import numpy as np


def filled(n_bytes: int) -> np.ndarray:
    """Of no heap, which might give what it still has and keeps what is freed."""
    block = np.frombuffer(mmap(-1, n_bytes), np.uint8)
    block[:] = 1
    return block
