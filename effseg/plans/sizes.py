"""Bytes and shapes as people write and read them."""

import math
import re
from collections.abc import Iterable

from effseg.errors import PlanError
from effseg.types import Shape3

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}


def parse_bytes(text: str | int) -> int:
    """Turn a memory budget into bytes: `"8GiB"` (2^33), `"8GB"` (8e9), `"8G"` (2^33), 4096.

    Raises:
        PlanError: for anything else, zero and negative numbers included.
    """
    hint = 'expected a size such as "8GiB" or "500MB", a number of bytes, or "auto"'
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise PlanError(f"memory {text!r}; {hint}")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    units = {name.lower(): size for name, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise PlanError(f"memory {text!r}; {hint}")
    n_bytes = int(float(match[1]) * units[match[2].lower()])
    if n_bytes < 1:
        raise PlanError(f"memory {text!r} is nothing; {hint}")
    return n_bytes


def total_stride(strides: Iterable[Shape3]) -> Shape3:
    """The product of the strides along each axis."""
    z, y, x = (math.prod(along) for along in zip(*strides, strict=True))
    return (z, y, x)


def format_shape(shape: Shape3) -> str:
    """Lengths as people read them: `64 x 112 x 112`."""
    return " x ".join(str(n) for n in shape)


def format_bytes(n_bytes: float) -> str:
    """Bytes as people read them: `1.50 GiB`, `64 MiB`, `12 B`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.{2 if unit == 'GiB' else 0}f} {unit}"
    return f"{n_bytes:.0f} B"
