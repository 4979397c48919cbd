"""A nodule as voxels of a rendered volume: a real outline, a density by its readers' ratings."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

from frame import Frame, average
from nnunet import IGNORE, MIN_READERS, NODULE
from nodule import Nodule

DENSITY_HU = {1: (-640, -560), 2: (-560, -400), 3: (-480, -60), 4: (-180, 0), 5: (0, 40)}
"""HU at the rim and in the core of a nodule, by the readers' texture: ground glass to solid."""


@dataclass(frozen=True, eq=False)
class Blob:
    """A nodule turned at random, sampled on the voxels of a volume.

    Attributes:
        alpha: how much of a voxel it covers, 0 to 1; its edge as soft as the readers' "margin".
        hu: its density there.
        part: how much of a voxel lies inside its outline, 0 to 1.
        value: NODULE or IGNORE.
        radius_mm: of a ball of its volume.
    """

    alpha: np.ndarray
    hu: np.ndarray
    part: np.ndarray
    value: int
    radius_mm: float

    @classmethod
    def draw(cls, nodule: Nodule, frame: Frame, rng: np.random.Generator) -> "Blob":
        """Turn a nodule about the long axis of the body, perhaps mirror it, and sample it.

        Targets have the outline of their readers' consensus, others that of any reader.
        """
        is_target = nodule.n_readers >= MIN_READERS
        mask = np.pad(nodule.consensus if is_target else nodule.union, 4)
        # Between slices the outline is where the distance to it, interpolated, is 0: Raya SP,
        # Udupa JK, "Shape-based interpolation", IEEE Trans Med Imaging 9:32-42, 1990.
        depth = distance_transform_edt(mask, nodule.spacing)
        depth -= distance_transform_edt(~mask, nodule.spacing)
        depth = gaussian_filter(depth, (0, 0.7, 0.7))
        fine = frame.finer().spacing
        places = np.argwhere(mask) * nodule.spacing
        centre = places.mean(axis=0)
        reach_mm = np.linalg.norm(places - centre, axis=1).max() + 4
        reach = np.ceil(reach_mm / np.asarray(frame.spacing)).astype(int)
        axes = [
            (np.arange((2 * n + 1) * f) + 0.5) * step - (n + 0.5) * f * step
            for n, f, step in zip(reach, frame.cuts, fine, strict=True)
        ]
        z, y, x = np.meshgrid(*axes, indexing="ij")
        angle = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        signs = rng.choice([-1.0, 1.0], 2)
        turned = np.stack([z * signs[0], cos * y - sin * x, (sin * y + cos * x) * signs[1]])
        places = (turned + centre[:, None, None, None]) / np.reshape(nodule.spacing, (3, 1, 1, 1))
        depth = map_coordinates(depth, places, order=1, mode="nearest")
        # Smoothing shrinks what is small; the level that keeps the volume is the outline.
        n_inside = round(mask.sum() * math.prod(nodule.spacing) / math.prod(fine))
        depth -= np.partition(depth.ravel(), -n_inside)[-n_inside]
        alpha, hu = _density(nodule, depth, rng)
        covered = average(alpha, frame.cuts)
        return cls(
            alpha=covered,
            hu=average(alpha * hu, frame.cuts) / np.maximum(covered, 1e-6),
            part=average((depth > 0).astype(np.float64), frame.cuts),
            value=NODULE if is_target else IGNORE,
            radius_mm=float(np.cbrt(mask.sum() * math.prod(nodule.spacing) * 0.75 / math.pi)),
        )

    def box(self, centre: np.ndarray) -> tuple[slice, slice, slice]:
        """Where it lies with its middle at voxel `centre`."""
        z, y, x = (
            slice(int(c) - n // 2, int(c) + n // 2 + 1)
            for c, n in zip(centre, self.part.shape, strict=True)
        )
        return (z, y, x)

    def blend(
        self, hu: np.ndarray, label: np.ndarray, *, centre: np.ndarray, lung: np.ndarray
    ) -> None:
        """Draw it into an image and its label, in place; what lies in the wall stays wall."""
        box = self.box(centre)
        # What is denser than it - a vessel behind ground glass - shines through.
        hu[box] += self.alpha * np.maximum(self.hu - hu[box], 0)
        # What is to be ignored may fill less of a voxel: it should not vanish.
        share = 0.5 if self.value == NODULE else 0.25
        label[box][(self.part >= share) & (lung[box] >= 0.5)] = self.value


def _density(
    nodule: Nodule, depth: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """How opaque a nodule is and its HU, by depth in mm and its readers' ratings."""
    # Unrated counts as what is most frequent: sharp, solid, without lime.
    margin, texture, calcification = (
        np.nan_to_num(nodule.rating(name), nan=usual)
        for name, usual in (("margin", 5), ("texture", 5), ("calcification", 6))
    )
    soft_mm = 0.3 + 0.4 * (5 - margin)
    alpha = np.clip(depth / soft_mm + 0.5, 0, 1)
    levels = np.array([DENSITY_HU[level] for level in sorted(DENSITY_HU)])
    rim, core = (np.interp(texture, sorted(DENSITY_HU), levels[:, i]) for i in (0, 1))
    inside = np.clip(depth / max(float(depth.max()), 1e-3), 0, 1)
    hu = rim + (core - rim) * np.clip((inside - 0.2) / 0.3, 0, 1) + rng.normal(0, 20)
    if texture < 4:
        grain = gaussian_filter(rng.standard_normal(depth.shape), 2)
        hu += 40 * grain / grain.std()
    lime = np.zeros_like(depth)
    match round(calcification):
        case 1:  # popcorn: coarse grains
            grains = gaussian_filter(rng.standard_normal(depth.shape), 1.5)
            lime = (grains / grains.std() > 0.8) * (inside > 0.2)
        case 2:  # laminated: a shell
            lime = np.clip(1 - np.abs(inside - 0.6) / 0.2, 0, 1)
        case 3:  # solid: all of it
            lime = np.clip(inside / 0.3, 0, 1)
        case 4:  # a spot beside the middle
            lime = np.roll(np.clip((inside - 0.6) / 0.2, 0, 1), depth.shape[2] // 12, axis=2)
        case 5:  # the middle
            lime = np.clip((inside - 0.4) / 0.2, 0, 1)
    return alpha, hu + lime * rng.uniform(250, 700)
