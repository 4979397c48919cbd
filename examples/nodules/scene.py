"""One rendered volume: a chest, its tubes, nodules in it, a scanner's blur and noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from blob import Blob
from chest import AIR_HU, TISSUE_HU, Chest
from effseg import Grid, Volume
from frame import Frame, average
from nodule import Nodule
from trees import Tubes, fill, grow


@dataclass(frozen=True)
class Scanner:
    """How images are taken; the defaults lean on LIDC-IDRI's scans, with coarser pixels for speed.

    Attributes:
        size_mm: what a volume covers, (z, y, x).
        pixel_mm: the range of the in-plane spacing (LIDC-IDRI: 0.46 to 0.98).
        slices_mm: the slice thicknesses to draw from.
        blur_mm: the range of the standard deviation of the in-plane point spread.
        noise_hu: the range of the noise's standard deviation in slices of 1.25 mm.
    """

    size_mm: tuple[float, float, float] = (100.0, 112.0, 112.0)
    pixel_mm: tuple[float, float] = (0.9, 1.1)
    slices_mm: tuple[float, ...] = (1.25, 1.25, 2.0, 2.5)
    blur_mm: tuple[float, float] = (0.5, 0.8)
    noise_hu: tuple[float, float] = (12.0, 35.0)


@dataclass(frozen=True, eq=False)
class Scene:
    """One rendered volume.

    Attributes:
        image: HU, int16.
        label: 0 background, 1 nodule, 2 ignore, uint8, on the same grid.
        nodules: those that found a place, in the order they were given.
        centres_mm: where each of them lies, (z, y, x) in the image's world.
    """

    image: Volume
    label: Volume
    nodules: tuple[Nodule, ...]
    centres_mm: tuple[tuple[float, float, float], ...]


def render_scene(nodules: Sequence[Nodule], rng: np.random.Generator, *, scanner: Scanner) -> Scene:
    """Render one volume around nodules; one that finds no place is left out."""
    frame = _draw_frame(rng, scanner)
    chest = Chest.draw(rng)
    depth_mm = chest.depth_mm(*frame.axes)
    lung_hu, body_hu = chest.hu(frame, rng)
    vessels, filled, filled_hu = _vessels_and_airways(chest, frame, rng)
    lung = np.clip(depth_mm / frame.spacing[2] + 0.5, 0, 1)
    hu = lung_hu * (1 - filled) + filled_hu
    hu = body_hu + lung * (hu - body_hu)
    label = np.zeros(frame.shape, np.uint8)
    taken: list[tuple[np.ndarray, float]] = []
    placed: list[tuple[Nodule, np.ndarray]] = []
    for nodule in nodules:
        blob = Blob.draw(nodule, frame, rng)
        centre = _find_place(blob, frame, depth_mm, lung, filled, vessels, taken, rng)
        if centre is None:
            continue
        blob.blend(hu, label, centre=centre, lung=lung)
        taken.append((centre * frame.spacing, blob.radius_mm))
        placed.append((nodule, centre))
    image = _scan(hu, frame, scanner, rng)
    if rng.random() < 0.5:  # the other lung
        image, label = image[..., ::-1], label[..., ::-1]
        placed = [(n, np.array([c[0], c[1], frame.shape[2] - 1 - c[2]])) for n, c in placed]
    grid = Grid(shape=frame.shape, spacing=frame.spacing, origin=(-200.0, -150.0, -150.0))
    return Scene(
        image=Volume(array=np.ascontiguousarray(image), grid=grid),
        label=Volume(array=np.ascontiguousarray(label), grid=grid),
        nodules=tuple(nodule for nodule, _ in placed),
        centres_mm=tuple(tuple(grid.index_to_world(c).tolist()) for _, c in placed),
    )


def _find_place(
    blob: Blob,
    frame: Frame,
    depth_mm: np.ndarray,
    lung: np.ndarray,
    filled: np.ndarray,
    vessels: np.ndarray,
    taken: list[tuple[np.ndarray, float]],
    rng: np.random.Generator,
) -> np.ndarray | None:
    """A voxel for a nodule's middle: free in the lung, at its wall, or at a vessel."""
    reach = np.asarray(blob.part.shape) // 2
    low, high = reach, np.asarray(frame.shape) - 1 - reach
    if (low > high).any():
        return None
    inner = depth_mm[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
    radius, size = blob.radius_mm, blob.part.sum()
    for where in rng.choice(["free", "wall", "vessel"], size=3, replace=False, p=[0.45, 0.3, 0.25]):
        if where == "vessel":
            away = rng.standard_normal(vessels.shape)
            away *= (0.9 * radius + 1) / np.linalg.norm(away, axis=1, keepdims=True)
            places = np.floor((vessels + away - frame.corner_mm) / frame.spacing).astype(int)
            places = places[((places >= low) & (places <= high)).all(axis=1)]
        else:
            fits = inner > radius + 2 if where == "free" else np.abs(inner - 0.75 * radius) < 0.6
            places = np.argwhere(fits) + low
        for place in places[rng.integers(len(places), size=60 if len(places) else 0)]:
            box = blob.box(place)
            in_lung = (blob.part * lung[box]).sum() / size
            is_clear = (blob.part * filled[box]).sum() <= 0.25 * size
            is_alone = all(
                np.linalg.norm(place * frame.spacing - other) > radius + other_radius + 5
                for other, other_radius in taken
            )
            if in_lung >= (0.75 if where == "wall" else 0.97) and is_clear and is_alone:
                return place
    return None


def _vessels_and_airways(
    chest: Chest, frame: Frame, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vessels and airways of a lung.

    Returns:
        Places (n, 3) in mm on vessels of 0.8 to 2.5 mm radius, (z, y, x); how much of each voxel
        tubes fill, 0 to 1; that part times its HU.
    """
    fine = frame.finer()
    # Trees ask thousands of times how deep they are: 3 mm is fine enough for that.
    coarse = Frame(shape=(70, 70, 50), spacing=(3.0, 3.0, 3.0), corner_mm=(-50.0, -105.0, 0.0))
    depth_mm = np.pad(chest.depth_mm(*coarse.axes), 1, constant_values=-1)

    def is_allowed(places: np.ndarray, radii: np.ndarray) -> np.ndarray:
        cells = np.floor((places - coarse.corner_mm) / coarse.spacing).astype(int) + 1
        depths = depth_mm[tuple(np.clip(cells, 0, np.asarray(depth_mm.shape) - 1).T)]
        # Only twigs come near the wall; all but those leave the root freely.
        is_root = np.linalg.norm(places - chest.hilum_mm, axis=1) < 25
        return depths > np.where(is_root, 0, 1 + 2.5 * radii)

    def tree(n_trunks: int, *, radius_mm: float, stop_mm: float, length: float) -> Tubes:
        z, y, x = chest.hilum_mm
        # Trunks fan out evenly over a half-ball, each with its own turn.
        angles = 2 * math.pi * (np.arange(n_trunks) + rng.uniform(0, 1)) / n_trunks
        slants = rng.uniform(0.15, 1.2, n_trunks)
        fan = np.stack([np.cos(angles), np.sin(angles), slants], axis=1)
        return grow(
            rng,
            root_mm=(z + rng.normal(0, 5), y + rng.normal(0, 5), x + 3),
            directions=fan,
            radius_mm=radius_mm,
            stop_mm=stop_mm,
            length=length,
            middle_mm=(z, y, x + 60),
            is_allowed=is_allowed,
        )

    vessels = [tree(5, radius_mm=r, stop_mm=0.45, length=9) for r in (4, 3.5)]
    airways = tree(4, radius_mm=3.5, stop_mm=0.8, length=8)
    walls = Tubes(centres_mm=airways.centres_mm, radii_mm=airways.radii_mm * 1.2 + 0.3)
    tissue = np.zeros(fine.shape, np.uint8)
    tissue[fill(walls, fine)] = 2
    for vessel in vessels:
        tissue[fill(vessel, fine)] = 1
    tissue[fill(airways, fine)] = 3
    parts = [average((tissue == kind).view(np.uint8), frame.cuts) for kind in (1, 2, 3)]
    hu = sum(
        part * np.float32(value)
        for part, value in zip(parts, (chest.blood_hu, TISSUE_HU - 40, AIR_HU + 30), strict=True)
    )
    twigs = [v.centres_mm[(v.radii_mm > 0.8) & (v.radii_mm < 2.5)] for v in vessels]
    return np.concatenate(twigs), sum(parts), hu


def _draw_frame(rng: np.random.Generator, scanner: Scanner) -> Frame:
    pixel = float(rng.uniform(*scanner.pixel_mm))
    spacing = (float(rng.choice(scanner.slices_mm)), pixel, pixel)
    nz, ny, nx = (max(1, round(n / step)) for n, step in zip(scanner.size_mm, spacing, strict=True))
    corner = (0.0, float(rng.uniform(-95, -15)), float(rng.uniform(12, 40)))
    return Frame(shape=(nz, ny, nx), spacing=spacing, corner_mm=corner)


def _scan(hu: np.ndarray, frame: Frame, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    """Blur and noise of a scanner, int16 HU."""
    blur = rng.uniform(*scanner.blur_mm)
    dz, dy, dx = frame.spacing
    seen = gaussian_filter(hu, (0.3, blur / dy, blur / dx), truncate=3, mode="nearest")
    # Reconstruction takes low frequencies out of the noise (the ramp filter), its kernel the high.
    white = rng.standard_normal(frame.shape, dtype=np.float32)
    noise = gaussian_filter(white, (0.4, blur / dy, blur / dx), truncate=3, mode="wrap")
    noise -= 0.7 * gaussian_filter(noise, (0, 2.5 * blur / dy, 2.5 * blur / dx), truncate=3)
    sigma = rng.uniform(*scanner.noise_hu) * math.sqrt(1.25 / dz)
    seen += noise * np.float32(sigma / noise.std())
    return np.clip(np.rint(seen), -1024, 3071).astype(np.int16)
