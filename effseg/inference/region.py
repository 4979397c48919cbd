"""The part of an image that is to be labelled."""

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from effseg.errors import DataError
from effseg.resample import needs
from effseg.types import Array, Slices3
from effseg.volume import Grid, Volume


@dataclass(frozen=True, eq=False)
class Region:
    """Voxels of an image outside of which everything is background.

    Inside, labels are those of the whole image: every window that has a part in them is passed.

    Attributes:
        box: that holds them, (z, y, x); may be empty.
        mask: which voxels of the image they are; None: all of the box.
    """

    box: Slices3
    mask: Array | None = None

    @classmethod
    def of(cls, given: Slices3 | Volume, grid: Grid) -> Self:
        """The region that a box, or a mask on the image's grid, means.

        Raises:
            DataError: if a mask lies on another grid, or a box has steps.
        """
        if isinstance(given, Volume):
            difference = grid.difference(given.grid)
            if difference is not None or given.array.ndim != 3:
                raise DataError(
                    "a region that does not lie on the image's grid: it differs in "
                    f"{difference or 'channels'}; bring it over with resample_like(..., label=True)"
                )
            return cls(box=_whole(grid), mask=given.array)
        box = []
        for part, n in zip(given, grid.shape, strict=True):
            start, stop, step = part.indices(n)
            if step != 1:
                raise DataError(f"a region with step {step}; expected a box of neighbouring voxels")
            box.append(slice(start, max(start, stop)))
        return cls(box=(box[0], box[1], box[2]))

    @classmethod
    def around(cls, boxes: Iterable[Slices3], grid: Grid, *, margin_mm: float) -> Self:
        """The smallest box that holds some boxes and a margin; an empty one for none."""
        parts: list[slice] = []
        found = list(boxes)
        for axis, (n, spacing) in enumerate(zip(grid.shape, grid.spacing, strict=True)):
            margin = math.ceil(margin_mm / spacing)
            low = max(0, min((box[axis].start for box in found), default=n) - margin)
            high = min(n, max((box[axis].stop for box in found), default=0) + margin)
            parts.append(slice(low, high) if found else slice(0, 0))
        return cls(box=(parts[0], parts[1], parts[2]))

    def within(self, box: Slices3) -> Self:
        """What of the region lies in a box too."""
        return replace(self, box=_common(self.box, box))

    def touches(self, box: Slices3) -> bool:
        """Whether a box of the image holds a voxel of the region."""
        common = _common(self.box, box)
        if any(part.start >= part.stop for part in common):
            return False
        return self.mask is None or bool(np.any(self.mask[common]))

    def needed(self, source: Grid, target: Grid) -> Callable[[Slices3], bool]:
        """Tells of a box of the swept grid whether the region needs it."""
        reached = needs(source, target)
        return lambda box: self.touches(reached(box))

    def outside(self, box: Slices3) -> npt.NDArray[np.bool_]:
        """Which voxels of a box of the image lie outside."""
        common = _common(self.box, box)
        z, y, x = (
            slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True)
        )
        result = np.ones([b.stop - b.start for b in box], dtype=np.bool_)
        if all(part.start < part.stop for part in common):
            result[z, y, x] = False if self.mask is None else self.mask[common] == 0
        return result

    @property
    def facts(self) -> tuple[object, ...]:
        """What tells it from another."""
        box = tuple((part.start, part.stop) for part in self.box)
        if self.mask is None:
            return box
        return (*box, zlib.crc32(np.ascontiguousarray(self.mask).data.cast("B")))


def _whole(grid: Grid) -> Slices3:
    z, y, x = (slice(0, n) for n in grid.shape)
    return (z, y, x)


def _common(one: Slices3, other: Slices3) -> Slices3:
    z, y, x = (
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )
    return (z, y, x)
