"""Where models that never saw a case agree with one another, and not with its reference.

Memory: the reference and two label maps of its size; the models' maps are read slab by slab.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from effseg.errors import DataError, GeometryError
from effseg.evaluation.overlap import present_labels
from effseg.evaluation.surface import TOLERANCE_SLACK
from effseg.io import SlabReader
from effseg.postprocess import Component, foreground_box, label_components
from effseg.types import Array, FloatArray, Slices3
from effseg.volume import Grid, Volume

Point: TypeAlias = tuple[float, float, float]
"""Of the world, (z, y, x) in mm."""

SLAB_PLANES = 8

ROUNDING = 1e-9
"""Three of four are three quarters, whatever floating point makes of that."""


@dataclass(frozen=True)
class Vote:
    """What one model says of a case: files on the reference's grid.

    Attributes:
        labels: its label map.
        confidence: the probability of the label that it finds most probable.
    """

    labels: Path
    confidence: Path


@dataclass(frozen=True)
class Place:
    """A connected region where models agree on one label and the reference has another.

    Attributes:
        reference_label: what the reference says there.
        models_label: what the models say.
        volume_mm3: of what lies further than the tolerance from the reference's own `models_label`.
        point_mm: a voxel of it next to its centre, in the world, (z, y, x).
        agreement: share of the models that say so, mean over its voxels.
        mean_probability: that those models give it, mean over its voxels.
    """

    reference_label: int
    models_label: int
    volume_mm3: float
    point_mm: Point
    agreement: float
    mean_probability: float

    @property
    def score(self) -> float:
        """Volume times agreement times probability: mm3 that are expected to be wrong."""
        return self.volume_mm3 * self.agreement * self.mean_probability


@dataclass(frozen=True)
class SuspectCase:
    """A case as judged by models that did not train on it.

    Attributes:
        case: its name.
        reference: file of its label map.
        image: file of its first channel.
        models: names of those that judged it.
        predictions: their label maps.
        places: highest score first; empty where nothing is suspect.
    """

    case: str
    reference: Path
    image: Path
    models: tuple[str, ...]
    predictions: tuple[Path, ...]
    places: tuple[Place, ...]

    @property
    def score(self) -> float:
        """Sum of its places' scores, mm3."""
        return sum(place.score for place in self.places)


def find_places(
    reference: Volume,
    votes: Sequence[Vote],
    *,
    agreement: float,
    tolerance_mm: float,
    ignore_label: int | None = None,
) -> tuple[Place, ...]:
    """Find the regions where models agree against a reference.

    A voxel counts where `agreement` of the models or more say one label, which is not the
    reference's, and the reference has no voxel of that label within `tolerance_mm`: outlines that
    run a little differently are no mistake. What counts is cut into 26-connected components of one
    pair of labels.

    Args:
        reference: label map, unsigned integers.
        votes: of one model at least.
        agreement: share of the models, above a half and at most 1.
        tolerance_mm: 0 or more.
        ignore_label: the reference's value for "unknown", where nothing is suspect.

    Returns:
        The places, highest score first; equal ones as they lie.

    Raises:
        DataError: if there is no vote, or a number is out of its range.
        GeometryError: if a map lies on another grid.
    """
    if not votes:
        raise DataError("no model to judge by; expected one or more")
    if not 0.5 < agreement <= 1:
        raise DataError(f"agreement {agreement:g}; expected a share above 0.5 and at most 1")
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise DataError(f"tolerance_mm {tolerance_mm:g}; expected a finite distance of 0 or more")
    grid, truth = reference.grid, reference.array
    against = _agreed(reference, votes, agreement=agreement, ignore_label=ignore_label)
    box = _drop_near(against, truth, grid, tolerance_mm)
    if box is None:
        return ()
    inside = grid.crop(box)
    pairs, codes = _pairs(truth[box], against[box])
    numbers, components = label_components(codes, grid.voxel_mm3)
    said, sure = _sums(votes, grid, box, numbers, against[box], len(components))
    places = [
        Place(
            reference_label=pairs[component.label - 1][0],
            models_label=pairs[component.label - 1][1],
            volume_mm3=component.volume_mm3,
            point_mm=_point(numbers, i + 1, component, inside),
            agreement=float(said[i]) / (component.n_voxels * len(votes)),
            mean_probability=float(sure[i] / said[i]),
        )
        for i, component in enumerate(components)
    ]
    return tuple(sorted(places, key=lambda place: -place.score))


def _agreed(
    reference: Volume, votes: Sequence[Vote], *, agreement: float, ignore_label: int | None
) -> Array:
    """The label that models agree on, plus 1, where it is not the reference's; else 0."""
    needed = math.ceil(agreement * len(votes) - ROUNDING)
    readers = [_reader(vote.labels, reference.grid) for vote in votes]
    widest = max(reader.dtype.itemsize for reader in readers)
    against = np.zeros(reference.grid.shape, np.min_scalar_type(256**widest))
    for slabs in zip(*(reader.slabs(SLAB_PLANES) for reader in readers), strict=True):
        start, first = slabs[0]
        planes = slice(start, start + len(first))
        truth = reference.array[planes]
        differs = np.zeros(first.shape, bool)
        for _, slab in slabs:
            differs |= slab != truth
        if ignore_label is not None:
            differs &= truth != ignore_label
        cast = np.stack([slab[differs] for _, slab in slabs])
        expected = truth[differs]
        said = np.zeros(expected.size, against.dtype)
        for value in present_labels(cast):
            agreed = (cast == value).sum(axis=0) >= needed
            said[agreed & (expected != value)] = value + 1
        against[planes][differs] = said
    return against


def _drop_near(against: Array, truth: Array, grid: Grid, tolerance_mm: float) -> Slices3 | None:
    """Make 0 of what lies near the reference's own voxels of that label; the box of the rest."""
    limit = tolerance_mm * (1 + TOLERANCE_SLACK)
    for code in present_labels(against) if limit else ():
        box = None if code == 0 else foreground_box(against == code)
        if box is None:
            continue
        near = _grown(box, grid, limit)
        same = truth[near] == code - 1
        # Whatever is nearest to a voxel outside of a mask has a neighbour outside of it, too.
        same &= ~ndimage.binary_erosion(same, border_value=1)
        targets = np.argwhere(same)
        if not len(targets):
            continue
        tree = KDTree(targets * grid.spacing)
        # Plane by plane: a point takes 24 bytes, and there may be a whole organ of them.
        for z, plane in enumerate(against[near]):
            y, x = np.nonzero(plane == code)
            points = np.stack([np.full_like(y, z), y, x], axis=1) * grid.spacing
            distances, _ = tree.query(points, distance_upper_bound=limit)
            close = np.isfinite(distances)
            plane[y[close], x[close]] = 0
    return foreground_box(against)


def _grown(box: Slices3, grid: Grid, margin_mm: float) -> Slices3:
    z, y, x = (
        slice(
            max(0, part.start - math.ceil(margin_mm / step)),
            min(n, part.stop + math.ceil(margin_mm / step)),
        )
        for part, n, step in zip(box, grid.shape, grid.spacing, strict=True)
    )
    return (z, y, x)


def _pairs(truth: Array, against: Array) -> tuple[list[tuple[int, int]], Array]:
    """(reference label, models' label) of each pair that occurs, and a map of them from 1; 0: none.

    The map is of 16 bits: more pairs than that come from no label map.
    """
    width = int(against.max()) + 1
    found: Array = np.zeros(0, dtype=np.int64)
    for plane, codes in zip(truth, against, strict=True):
        kept = codes > 0
        found = np.union1d(found, plane[kept].astype(np.int64) * width + codes[kept])
    numbers = np.zeros(against.shape, np.uint16)
    for plane, codes, out in zip(truth, against, numbers, strict=True):
        kept = codes > 0
        keys = plane[kept].astype(np.int64) * width + codes[kept]
        out[kept] = np.searchsorted(found, keys) + 1
    return [(key // width, key % width - 1) for key in found.tolist()], numbers


def _sums(
    votes: Sequence[Vote], grid: Grid, box: Slices3, numbers: Array, against: Array, n: int
) -> tuple[FloatArray, FloatArray]:
    """For each component how many voxels' votes agree with it, and the sum of their confidence."""
    said, sure = np.zeros(n), np.zeros(n)
    for vote in votes:
        labels, confidence = _reader(vote.labels, grid), _reader(vote.confidence, grid)
        for (start, slab), (_, shares) in zip(
            labels.slabs(SLAB_PLANES), confidence.slabs(SLAB_PLANES), strict=True
        ):
            first = max(start, box[0].start)
            last = min(start + len(slab), box[0].stop)
            if first >= last:
                continue
            here = (slice(first - start, last - start), *box[1:])
            there = slice(first - box[0].start, last - box[0].start)
            agrees = slab[here].astype(against.dtype) + 1 == against[there]
            which = numbers[there][agrees]
            said += np.bincount(which, minlength=n + 1)[1:]
            sure += np.bincount(which, weights=shares[here][agrees], minlength=n + 1)[1:]
    return said, sure


def _point(numbers: Array, number: int, component: Component, grid: Grid) -> Point:
    """The voxel of a component next to its centre, in the world."""
    middle = np.asarray(component.centroid_index)
    starts = [part.start for part in component.box]
    nearest, least = middle, math.inf
    for z, plane in enumerate(numbers[component.box], start=starts[0]):
        y, x = np.nonzero(plane == number)
        if not y.size:
            continue
        off = (y + starts[1] - middle[1]) ** 2 + (x + starts[2] - middle[2]) ** 2
        i = int(off.argmin())
        if off[i] + (z - middle[0]) ** 2 < least:
            least = float(off[i]) + (z - middle[0]) ** 2
            nearest = np.asarray([z, y[i] + starts[1], x[i] + starts[2]])
    z_mm, y_mm, x_mm = grid.index_to_world(nearest).tolist()
    return z_mm, y_mm, x_mm


def _reader(path: Path, grid: Grid) -> SlabReader:
    reader = SlabReader(path)
    difference = grid.difference(reader.grid)
    if difference is not None:
        raise GeometryError(
            f"{path} and the reference differ in {difference}; `effseg check` names such cases"
        )
    return reader
