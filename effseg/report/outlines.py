"""Masks to outlines and slices to pictures: what an SVG needs to show a plane of a volume."""

import base64
import math
import struct
import zlib

import numpy as np

from effseg.types import Array

MOST_PIXELS = 256
"""A picture's longer side; larger slices are averaged down."""

# The corners of a cell of four pixels: 1 top left, 2 top right, 4 bottom right, 8 bottom left.
# The entries lead from one cell edge (0 top, 1 right, 2 bottom, 3 left) to another so that the
# mask is always on the same side. Each cell edge then has one way in and one way out.
_STEPS = {
    1: ((0, 3),),
    2: ((1, 0),),
    3: ((1, 3),),
    4: ((2, 1),),
    5: ((0, 3), (2, 1)),
    6: ((2, 0),),
    7: ((2, 3),),
    8: ((3, 2),),
    9: ((0, 2),),
    10: ((1, 0), (3, 2)),
    11: ((1, 2),),
    12: ((3, 1),),
    13: ((0, 1),),
    14: ((3, 0),),
}
_EDGES = {0: (0, 1), 1: (1, 2), 2: (2, 1), 3: (1, 0)}  # (row, column), in half pixels of the cell


def outline(mask: Array, *, spacing: tuple[float, float]) -> str:
    """The boundary of a mask as the `d` of an SVG path: closed loops halfway between pixels.

    Marching squares (Lorensen and Cline, SIGGRAPH 1987, in two dimensions); where two pixels touch
    by a corner only, they stay apart.

    Args:
        mask: bool, (rows, columns).
        spacing: of rows and columns; the path is in these units, from the outer corner of the
            first pixel.

    Returns:
        "M x,y L ... Z M ..."; empty for an empty mask.
    """
    filled = np.pad(np.asarray(mask, dtype=bool), 1).astype(np.uint8)
    cells = filled[:-1, :-1] + 2 * filled[:-1, 1:] + 4 * filled[1:, 1:] + 8 * filled[1:, :-1]
    onward: dict[tuple[int, int], tuple[int, int]] = {}
    for row, column in np.argwhere((cells > 0) & (cells < 15)).tolist():
        for way_in, way_out in _STEPS[int(cells[row, column])]:
            (a, b), (c, d) = _EDGES[way_in], _EDGES[way_out]
            onward[2 * row + a, 2 * column + b] = (2 * row + c, 2 * column + d)
    loops = []
    while onward:
        start, there = onward.popitem()
        loop = [start]
        while there != start:
            loop.append(there)
            there = onward.pop(there)
        loops.append(_corners(loop))
    # Half pixels of cells to pixels: cell (0, 0) begins at the centre of the padding's corner.
    return " ".join(
        "M"
        + "L".join(
            f"{_short((c - 1) / 2 * spacing[1])},{_short((r - 1) / 2 * spacing[0])}"
            for r, c in loop
        )
        + "Z"
        for loop in loops
    )


def _corners(loop: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The loop without the points that lie on a straight way."""
    kept = []
    for i, (r, c) in enumerate(loop):
        (r0, c0), (r1, c1) = loop[i - 1], loop[(i + 1) % len(loop)]
        if (r - r0) * (c1 - c) != (r1 - r) * (c - c0):
            kept.append((r, c))
    return kept


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def shrink(pixels: Array) -> tuple[Array, int]:
    """Average whole blocks until no side is longer than `MOST_PIXELS`.

    Returns:
        The smaller array, and how many pixels a side became one; the last row and column stand for
        what is left over, so that the array may reach past the original.
    """
    factor = math.ceil(max(pixels.shape) / MOST_PIXELS)
    if factor == 1:
        return pixels, 1
    rest = [(0, -n % factor) for n in pixels.shape]
    whole = np.pad(pixels, rest, mode="edge")
    rows, columns = (n // factor for n in whole.shape)
    return whole.reshape(rows, factor, columns, factor).mean(axis=(1, 3)), factor


def png_uri(pixels: Array, *, window: tuple[float, float]) -> str:
    """A grey PNG as a data URI (PNG specification, third edition, W3C 2025).

    Args:
        pixels: (rows, columns), any real type; NaN is drawn black.
        window: shown as black and as white.
    """
    low, high = window
    share = (np.nan_to_num(pixels.astype(np.float64), nan=low) - low) / max(high - low, 1e-12)
    grey = np.round(np.clip(share, 0, 1) * 255).astype(np.uint8)
    # Filter 2: each row as its difference from the row above, which packs smooth pictures better.
    rows = np.diff(grey, axis=0, prepend=np.zeros((1, grey.shape[1]), np.uint8)).astype(np.uint8)
    body = np.hstack([np.full((grey.shape[0], 1), 2, np.uint8), rows]).tobytes()
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(body, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
