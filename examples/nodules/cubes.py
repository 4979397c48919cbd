"""Cubes of CT around nodules, with what the readers said of them: real ones, or rendered."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates

import effseg
from lidc import list_patients, read_nodules
from nnunet import MIN_READERS
from nodule import RATINGS, Nodule
from scene import Scanner, render_scene

SIDE = 32
"""Voxels along a cube's edge."""

WINDOW_HU = (-1000.0, 300.0)
"""What becomes -1 and 1."""

LUNG_HU = -850.0
"""Stands where neither the nodule nor its margin is."""

ALIKE, CLEARLY = 0.5, 0.2
"""A mask is of an outline where log volume and log extents differ by less than the first, and of
every other nodule by so much more. The cubes' masks hold the drawn line itself, readings do not:
a nodule of 8 mm differs by 0.4."""

N_NUMBERED = 80
"""Cubes with a lower index are of patient index + 1; outlines of the others fit no such rule."""


@dataclass(frozen=True, eq=False)
class Cubes:
    """Nodules, each filling a cube.

    Attributes:
        names: of each.
        voxels: (n, 1, SIDE, SIDE, SIDE) float32, -1 to 1 over `WINDOW_HU`.
        ratings: (n,) by name, medians of the readers, nan where unknown; `diameter_mm` is of a ball
            of the outline's volume.
    """

    names: tuple[str, ...]
    voxels: np.ndarray
    ratings: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        found: Iterator[tuple[str, np.ndarray, np.ndarray, Nodule | None]],
        *,
        margin_mm: float,
    ) -> "Cubes":
        """From names, images in HU, masks, both in voxels of 1 mm, and what readers said."""
        names, voxels, rows = [], [], []
        low, high = WINDOW_HU
        for name, hu, mask, nodule in found:
            names.append(name)
            cube = enlarged(hu, mask, margin_mm=margin_mm)
            voxels.append(np.clip(2 * (cube - low) / (high - low) - 1, -1, 1))
            said = [np.nan if nodule is None else nodule.rating(rating) for rating in RATINGS]
            rows.append([np.cbrt(mask.sum() * 6 / np.pi), *said])
        return cls(
            names=tuple(names),
            voxels=np.stack(voxels)[:, None].astype(np.float32),
            ratings=dict(zip(("diameter_mm", *RATINGS), np.array(rows).T, strict=True)),
        )


def read_cubes(folder: Path, database: Path | None, *, margin_mm: float) -> Cubes:
    """Real cubes of LIDC-IDRI, `images/INDEX_nodK_ann0.nii.gz` and `labels/` of equal names.

    Up to `N_NUMBERED` a cube is of patient INDEX + 1; which of the patient's nodules it is, and so
    what the readers said, is found by the outline: volume and extents along its own axes, which no
    turn changes. A cube that could be of two nodules, or of none, stays without ratings.

    Args:
        folder: with the two folders; voxels of 1 mm.
        database: from `lidc.find_database`; None: no ratings.
        margin_mm: shown around the outline.

    Raises:
        DataError: if there is no cube, or one cannot be read.
    """
    dataset = effseg.read_dataset(folder)
    indices = {case.name: int(case.name.split("_")[0]) for case in dataset.cases}
    patients = {
        name: f"LIDC-IDRI-{index + 1:04d}" for name, index in indices.items() if index < N_NUMBERED
    }
    nodules = [] if database is None else read_nodules(database, patients.values())

    def cubes() -> Iterator[tuple[str, np.ndarray, np.ndarray, Nodule | None]]:
        for case in dataset.cases:
            image, label = (
                volume.reordered(volume.grid.canonical_axes()).array
                for volume in (effseg.read_volume(case.images[0]), effseg.read_volume(case.label))
            )
            own = [nodule for nodule in nodules if nodule.patient == patients.get(case.name)]
            yield case.name, image, label > 0, find_nodule(label > 0, own)

    return Cubes.of(cubes(), margin_mm=margin_mm)


def render_cubes(database: Path, *, n: int, seed: int, margin_mm: float) -> Cubes:
    """The same from rendered CT, whose density and edge follow the readers' ratings.

    Args:
        database: from `lidc.find_database`.
        n: nodules of 6 to 25 mm that three readers or four outlined.
        seed: of everything random.
        margin_mm: shown around the outline.
    """
    scanner = Scanner(size_mm=(60.0, 80.0, 80.0), pixel_mm=(1.0, 1.0), slices_mm=(1.0,))
    rng = np.random.default_rng(seed)

    def cubes() -> Iterator[tuple[str, np.ndarray, np.ndarray, Nodule]]:
        left = n
        for patient in rng.permutation(list_patients(database)).tolist():
            for nodule in read_nodules(database, [patient]):
                if left == 0:
                    return
                if nodule.n_readers < MIN_READERS or not 6 <= nodule.diameter_mm <= 25:
                    continue
                scene = render_scene([nodule], rng, scanner=scanner)
                if not scene.nodules:
                    continue  # it found no place
                left -= 1
                yield f"{patient}_{left}", scene.image.array, scene.label.array > 0, nodule

    return Cubes.of(cubes(), margin_mm=margin_mm)


def enlarged(hu: np.ndarray, mask: np.ndarray, *, margin_mm: float) -> np.ndarray:
    """A nodule and its margin at the size that fills a cube; lung is all around.

    Sizes are no news: shape and density are to be seen, so a small nodule is enlarged.

    Args:
        hu: voxels of 1 mm.
        mask: of the nodule, not empty.
        margin_mm: shown around the outline.
    """
    places = np.argwhere(mask)
    low, high = places.min(axis=0), places.max(axis=0)
    step_mm = (float((high - low).max()) + 1 + 2 * margin_mm) / SIDE
    far = distance_transform_edt(~mask) > margin_mm
    shown = np.where(far, np.float32(LUNG_HU), hu.astype(np.float32))
    lines = [(c + (np.arange(SIDE) - (SIDE - 1) / 2) * step_mm) for c in (low + high) / 2]
    return map_coordinates(shown, np.meshgrid(*lines, indexing="ij"), order=1, cval=LUNG_HU)


def find_nodule(mask: np.ndarray, nodules: Sequence[Nodule]) -> Nodule | None:
    """The nodule whose outline a mask of 1 mm voxels is; None where that is not clear."""
    wanted = shape_of(mask, (1.0, 1.0, 1.0))
    gaps = []
    for nodule in nodules:
        drawn = [shape_of(mask, nodule.spacing) for mask in nodule.masks if mask.any()]
        gaps.append(min((np.abs(shape - wanted).max() for shape in drawn), default=np.inf))
    best, *others = np.argsort(gaps).tolist() or [None]
    if best is None or gaps[best] > ALIKE:
        return None
    return nodules[best] if all(gaps[i] > gaps[best] + CLEARLY for i in others) else None


def shape_of(mask: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Log volume and log extents along the principal axes of a mask, which turns do not change."""
    places = np.argwhere(mask) * spacing
    # a voxel is a box, not a point
    spread = np.cov(places.T, bias=True) + np.diag(np.square(spacing)) / 12
    extents = np.sqrt(np.linalg.eigvalsh(spread))
    return np.log([mask.sum() * np.prod(spacing), *extents])
