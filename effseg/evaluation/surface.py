"""Distances between the surfaces of two masks, in mm.

The convention, because tools differ by about a millimetre on the same masks:

- A mask's surface is the set of its voxels that have one of their six face neighbours outside it
  (the mask minus its 6-neighbour erosion). Distances run between voxel centres.
- Where knowledge ends there is no surface: neither where the mask is cut by the edge of the
  volume, nor where it meets ignored voxels. The CHAOS challenge evaluates like this; MONAI counts
  the cut at the volume's edge as surface.
- HD95 is the larger of the two directed 95th percentiles, interpolated linearly; ASSD the mean
  over the voxels of both surfaces together; surface Dice the share of these within the tolerance.

Distances are looked up in a k-d tree of surface voxels, not in a distance map of the box: the same
numbers, in memory that grows with the surface alone.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree

from effseg.types import Array, FloatArray, Slices3, Spacing

CONVENTION = (
    "surface: mask voxels with a face neighbour outside the mask (6-neighbour erosion), none where "
    "the mask meets the edge of the volume or ignored voxels; distances between voxel centres; "
    "hd95_mm: larger directed 95th percentile; assd_mm: mean over both surfaces together; "
    "surface_dice: share of both surfaces within tolerance_mm"
)

TOLERANCE_SLACK = 1e-6
"""Relative: a distance of exactly the tolerance counts, though spacings are stored in float32."""


@dataclass(frozen=True)
class SurfaceDistances:
    """How far each surface voxel lies from the other surface.

    Attributes:
        prediction_mm: from each voxel of the prediction's surface to the reference's.
        reference_mm: from each voxel of the reference's surface to the prediction's.

    Where only one mask has a surface its distances are infinite and the other's empty; where
    neither has, both are empty.
    """

    prediction_mm: FloatArray
    reference_mm: FloatArray

    @property
    def defined(self) -> bool:
        """Whether both masks have a surface."""
        return self.prediction_mm.size > 0 and self.reference_mm.size > 0

    def scores(self, tolerance_mm: float) -> dict[str, float | None]:
        """Surface Dice, Hausdorff distance, its 95th percentile and the mean distance.

        Surface Dice after Nikolov et al., J Med Internet Res 23(7), 2021, on voxels; HD95 and ASSD
        after Heimann et al., IEEE TMI 28, 2009. Neither surface: all None. One: surface Dice 0,
        distances None.
        """
        sides = (self.prediction_mm, self.reference_mm)
        n = sum(side.size for side in sides)
        limit = tolerance_mm * (1 + TOLERANCE_SLACK)
        near = sum(int(np.count_nonzero(side <= limit)) for side in sides)
        defined = self.defined
        return {
            "surface_dice": near / n if n else None,
            "hd_mm": max(float(side.max()) for side in sides) if defined else None,
            "hd95_mm": max(float(np.percentile(side, 95)) for side in sides) if defined else None,
            "assd_mm": sum(float(side.sum()) for side in sides) / n if defined else None,
        }


def surface_distances(
    prediction: Array, reference: Array, *, ignored: Array, spacing: Spacing
) -> SurfaceDistances:
    """Measure every surface voxel's distance to the other mask's surface.

    Args:
        prediction: bool (z, y, x).
        reference: bool (z, y, x).
        ignored: bool (z, y, x), voxels of unknown truth; neither mask may hold them.
        spacing: mm between voxel centres.
    """
    one = np.argwhere(_surface(prediction, ignored))
    other = np.argwhere(_surface(reference, ignored))
    return SurfaceDistances(
        prediction_mm=_nearest_mm(one, other, spacing),
        reference_mm=_nearest_mm(other, one, spacing),
    )


def grow_box(box: Slices3, shape: tuple[int, ...]) -> Slices3:
    """The box, one voxel larger on each side where the array goes on: what `_surface` must see."""
    z, y, x = (
        slice(max(side.start - 1, 0), min(side.stop + 1, n))
        for side, n in zip(box, shape, strict=True)
    )
    return (z, y, x)


def _surface(mask: Array, ignored: Array) -> Array:
    solid = mask | ignored
    inner = mask.copy()
    for axis in range(3):
        kept, body = np.moveaxis(inner, axis, 0), np.moveaxis(solid, axis, 0)
        kept[1:] &= body[:-1]
        kept[:-1] &= body[1:]
    inner ^= mask
    return inner


def _nearest_mm(points: Array, targets: Array, spacing: Spacing) -> FloatArray:
    if len(points) == 0 or len(targets) == 0:
        return np.full(len(points), np.inf)
    _, nearest = KDTree(targets * spacing).query(points * spacing)
    # From whole voxels again: differences of coordinates would miss an exact tolerance by rounding.
    return np.asarray(np.sqrt((((points - targets[nearest]) * spacing) ** 2).sum(axis=1)))
