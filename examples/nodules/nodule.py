"""A lung nodule: what up to four radiologists outlined of it, and how well they agree.

Readings are grouped into nodules as pylidc does it, so that its published counts hold: of the 6,859
readings in LIDC-IDRI 2,651 nodules, 1,392 of them with at least three readers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from matplotlib.path import Path as Polygon
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

MAX_READERS = 4

RATINGS = (
    "subtlety",
    "internalStructure",
    "calcification",
    "sphericity",
    "margin",
    "lobulation",
    "spiculation",
    "texture",
    "malignancy",
)


@dataclass(frozen=True, eq=False)
class Outline:
    """A closed line around a nodule, or around a hole in it, in one slice.

    The line's own pixels lie outside the nodule (or, around a hole, outside the tissue).

    Attributes:
        position_mm: the slice's position along z.
        inclusion: False around a hole.
        points: (n, 2) whole numbers, (row, column).
    """

    position_mm: float
    inclusion: bool
    points: np.ndarray


@dataclass(frozen=True, eq=False)
class Reading:
    """One reader's outlines and ratings of one nodule.

    Attributes:
        patient: the patient's name, "LIDC-IDRI-0001".
        reader: tells the readers of one scan apart. The database does not say who read what, so
            there every reading has a number of its own.
        ratings: from 1 to 5 (calcification 1 to 6, where 6 means none) by the names in `RATINGS`.
        outlines: at least one.
    """

    patient: str
    reader: int
    ratings: Mapping[str, int]
    outlines: tuple[Outline, ...]


@dataclass(frozen=True, eq=False)
class Nodule:
    """The readings of one nodule, on the slices of its scan.

    Attributes:
        readings: at least one.
        slices_mm: (n,) positions of all slices of the scan along z, in the order of the image.
        pixel_mm: the in-plane spacing, the same along rows and columns.
    """

    readings: tuple[Reading, ...]
    slices_mm: np.ndarray
    pixel_mm: float

    @property
    def patient(self) -> str:
        """The patient's name."""
        return self.readings[0].patient

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxel centres, (z, y, x); z by the median gap of the slices."""
        gap = float(np.median(np.abs(np.diff(self.slices_mm))))
        return (gap, self.pixel_mm, self.pixel_mm)

    @property
    def n_readers(self) -> int:
        """How many readers marked it; a reader who marked it in two parts counts once."""
        return len({reading.reader for reading in self.readings})

    @cached_property
    def points(self) -> np.ndarray:
        """(n, 3) points of all outlines, (slice, row, column)."""
        return np.concatenate([_points(reading, self.slices_mm) for reading in self.readings])

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """Where the masks lie in the scan: the smallest box around all outlines."""
        low, high = self.points.min(axis=0), self.points.max(axis=0) + 1
        z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        return (z, y, x)

    @cached_property
    def masks(self) -> np.ndarray:
        """(n_readers, z, y, x), bool: each reader's voxels, inside `box`."""
        readers = sorted({reading.reader for reading in self.readings})
        masks = np.zeros((len(readers), *(part.stop - part.start for part in self.box)), bool)
        for reading in self.readings:
            masks[readers.index(reading.reader)] |= self._mask(reading)
        return masks

    @property
    def consensus(self) -> np.ndarray:
        """(z, y, x), bool, inside `box`: the voxels that at least half of the readers marked."""
        return self.masks.sum(axis=0) * 2 >= len(self.masks)

    @property
    def union(self) -> np.ndarray:
        """(z, y, x), bool, inside `box`: the voxels that any reader marked."""
        return self.masks.any(axis=0)

    @property
    def diameter_mm(self) -> float:
        """The diameter of a ball of the consensus' volume; 0 where nobody agrees on a voxel."""
        return float(np.cbrt(self.consensus.sum() * math.prod(self.spacing) * 6 / math.pi))

    def rating(self, name: str) -> float:
        """The median of the readers' ratings; nan where nobody rated it."""
        given = [r.ratings[name] for r in self.readings if r.ratings.get(name)]
        return float(np.median(given)) if given else math.nan

    def _mask(self, reading: Reading) -> np.ndarray:
        z0, y0, x0 = (part.start for part in self.box)
        mask = np.zeros([part.stop - part.start for part in self.box], bool)
        # Holes are cut last: a part drawn later must not fill them again.
        for outline in sorted(reading.outlines, key=lambda o: not o.inclusion):
            plane = mask[nearest_slice(outline.position_mm, self.slices_mm) - z0]
            line = outline.points
            (top, left), (bottom, right) = line.min(axis=0), line.max(axis=0) + 1
            rows, columns = np.mgrid[top:bottom, left:right]
            pixels = np.stack([rows.ravel(), columns.ravel()], axis=1)
            # One point encloses nothing; Polygon wants the first point again at the end.
            closed = np.concatenate([line, line[:1]])
            inside = Polygon(closed, closed=True).contains_points(pixels).reshape(rows.shape)
            part = plane[top - y0 : bottom - y0, left - x0 : right - x0]
            part[inside] = outline.inclusion
            plane[line[:, 0] - y0, line[:, 1] - x0] = False
        return mask


def nearest_slice(position_mm: float, slices_mm: np.ndarray) -> int:
    """The index of the slice nearest to a position; outlines are not exactly on their slices."""
    return int(np.abs(slices_mm - position_mm).argmin())


def group_readings(
    readings: Sequence[Reading], *, slices_mm: np.ndarray, pixel_mm: float, tolerance: float
) -> list[Nodule]:
    """Tell which readings of a scan mean the same nodule; [] for no readings.

    Two readings are neighbours where points of their outlines come within the tolerance;
    neighbours of neighbours are one nodule. While a nodule has more than four members the tolerance
    shrinks by a tenth, down to 0.1; 14 groups of LIDC-IDRI stay larger than four. This is pylidc's
    `Scan.cluster_annotations`, with its quirk: the distance counts voxels, and the tolerance that
    it starts with is the slice thickness in mm.

    Args:
        readings: all of one scan.
        slices_mm: (n,) positions of the scan's slices.
        pixel_mm: the in-plane spacing.
        tolerance: the slice thickness in mm.
    """
    if not readings:
        return []
    trees = [cKDTree(_points(reading, slices_mm)) for reading in readings]
    gaps = np.zeros((len(trees), len(trees)))
    for (i, one), (j, two) in combinations(enumerate(trees), 2):
        gaps[i, j] = gaps[j, i] = one.query(two.data)[0].min()
    groups = connected_components(gaps <= tolerance, directed=False)[1]
    while np.bincount(groups).max() > MAX_READERS and tolerance * 0.9 >= 0.1:
        tolerance *= 0.9
        groups = connected_components(gaps <= tolerance, directed=False)[1]
    return [
        Nodule(
            readings=tuple(r for r, g in zip(readings, groups, strict=True) if g == group),
            slices_mm=slices_mm,
            pixel_mm=pixel_mm,
        )
        for group in range(int(groups.max()) + 1)
    ]


def reader_agreement(nodules: Iterable[Nodule]) -> float:
    """How well the readers agree with each other: the yardstick beside a network's Dice.

    The mean over nodules of the mean Dice between every two readers of a nodule; nodules of one
    reader do not count, nan where none is left. A pair of empty masks counts as 0.
    """
    means = []
    for nodule in nodules:
        pairs = [_dice(one, two) for one, two in combinations(nodule.masks, 2)]
        if pairs:
            means.append(float(np.mean(pairs)))
    return float(np.mean(means)) if means else math.nan


def _dice(one: np.ndarray, two: np.ndarray) -> float:
    total = int(one.sum()) + int(two.sum())
    return 2 * int((one & two).sum()) / total if total else 0.0


def _points(reading: Reading, slices_mm: np.ndarray) -> np.ndarray:
    """(n, 3) points of a reading's outlines, (slice, row, column)."""
    return np.concatenate(
        [
            np.insert(outline.points, 0, nearest_slice(outline.position_mm, slices_mm), axis=1)
            for outline in reading.outlines
        ]
    )
