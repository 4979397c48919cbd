"""Stored bytes as numbers: in the machine's byte order, scaled as the header says."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from effseg.errors import DataError, MemoryBudgetError
from effseg.io.header import Header
from effseg.types import Array


class StoredVoxels:
    """The voxels of a file in its own order, taken in pieces.

    Args:
        path: for the words of an error.
        header: of the file.
        blocks: its payload, of any lengths.
    """

    def __init__(self, path: Path, header: Header, blocks: Iterator[bytes]) -> None:
        self._path = path
        self._header = header
        self._blocks = blocks
        self._rest = memoryview(b"")

    def take(self, n_values: int) -> Array:
        """The next voxels, flat, in the machine's byte order.

        Raises:
            DataError: where the payload is refused.
            MemoryBudgetError: if there is no memory for them.
        """
        flat = room_for(self._path, (n_values,), self._header.dtype)
        as_bytes, at = flat.view(np.uint8), 0
        while at < len(as_bytes):
            block = self._rest or memoryview(next(self._blocks))
            part = block[: len(as_bytes) - at]
            as_bytes[at : at + len(part)] = np.frombuffer(part, dtype=np.uint8)
            at += len(part)
            self._rest = block[len(part) :]
        if not flat.dtype.isnative:
            flat = flat.byteswap(inplace=True)
        return flat.view(flat.dtype.newbyteorder("="))

    def end(self) -> None:
        """Read to the end, so that a checksum and left-over bytes count.

        Raises:
            DataError: where the payload is refused.
        """
        for _ in self._blocks:
            pass


def room_for(path: Path, shape: tuple[int, ...], dtype: "np.dtype[np.generic]") -> Array:
    """An array to read into.

    Raises:
        MemoryBudgetError: if there is no memory for it.
    """
    try:
        return np.empty(shape, dtype=dtype)
    except (MemoryError, ValueError) as error:  # ValueError: more than an address can say
        n_values = math.prod(shape)
        raise MemoryBudgetError(
            f"{path}: {n_values * dtype.itemsize} bytes for {n_values} voxels are not to be had; "
            "read one channel, or thinner slabs, or use a machine with more memory"
        ) from error


def value_dtype(header: Header) -> "np.dtype[np.generic]":
    """The type of the true values."""
    if _is_scaled(header) and header.dtype.kind != "f":
        return np.dtype(np.float32)
    return header.dtype.newbyteorder("=")


def rescaled(path: Path, stored: Array, header: Header) -> Array:
    """True values, worked out in float64, one plane after the other; floats in place.

    Raises:
        DataError: if their type cannot hold them.
    """
    if not _is_scaled(header):
        return stored
    dtype = value_dtype(header)
    values = stored if stored.dtype == dtype else np.empty(stored.shape, dtype=dtype)
    try:
        with np.errstate(over="raise"):
            for plane in np.ndindex(stored.shape[:-2]):
                values[plane] = stored[plane].astype(np.float64) * header.slope + header.intercept
    except FloatingPointError as error:
        raise DataError(
            f"{path}: slope {header.slope:g} and intercept {header.intercept:g} take the voxels "
            f"beyond {values.dtype}; expected a sound header"
        ) from error
    return values


def _is_scaled(header: Header) -> bool:
    return (header.slope, header.intercept) != (1.0, 0.0)
