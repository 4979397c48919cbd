"""Which windows cover a volume, and how they are blended: index arithmetic only."""

from functools import reduce
from itertools import product

import numpy as np
import numpy.typing as npt

from effseg.errors import PlanError
from effseg.types import Shape3, Slices3

SMALLEST_WEIGHT = 1e-3


def window_starts(length: int, window: int, *, overlap: float) -> tuple[int, ...]:
    """Evenly spaced starts of the fewest windows that cover an axis.

    Args:
        length: of the axis in voxels, at least `window`.
        window: in voxels.
        overlap: the least share of a window that its neighbour covers, 0 <= overlap < 1.

    Returns:
        Starts in order; the first is 0, the last `length - window`.

    Raises:
        PlanError: if the window is longer than the axis, or the overlap out of range.
    """
    if not 1 <= window <= length:
        raise PlanError(f"a window of {window} voxels on an axis of {length}; pad the axis first")
    if not 0 <= overlap < 1:
        raise PlanError(f"overlap {overlap}; expected 0 <= overlap < 1")
    step = max(1.0, window * (1 - overlap))
    n_windows = int(np.ceil((length - window) / step)) + 1
    return tuple(round(start) for start in np.linspace(0, length - window, n_windows))


def windows(shape: Shape3, window: Shape3, *, overlap: float) -> tuple[Slices3, ...]:
    """The windows that cover a volume, those of the first axis slowest."""
    starts = [window_starts(n, w, overlap=overlap) for n, w in zip(shape, window, strict=True)]
    return tuple(
        (slice(z, z + window[0]), slice(y, y + window[1]), slice(x, x + window[2]))
        for z, y, x in product(*starts)
    )


def gaussian_weights(window: Shape3) -> npt.NDArray[np.float32]:
    """Blending weights: a Gaussian of a deviation of one eighth of the window, largest 1.

    Never below 1e-3, so that a voxel which only a window's corner covers keeps its digits.
    """
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in window]
    weights = np.asarray(reduce(np.multiply.outer, axes))
    bounded = np.maximum(weights / weights.max(), SMALLEST_WEIGHT)
    return np.asarray(bounded, dtype=np.float32)


def padding(shape: Shape3, smallest: Shape3) -> tuple[tuple[int, int], ...]:
    """Voxels to add before and after each axis so that none is shorter than `smallest`."""
    short = [max(0, want - n) for n, want in zip(shape, smallest, strict=True)]
    return tuple((missing // 2, missing - missing // 2) for missing in short)
