"""The box of voxels that is rendered, and what is finer than its voxels."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter


@dataclass(frozen=True)
class Frame:
    """The box of voxels that is rendered.

    Attributes:
        shape: voxels along (z, y, x).
        spacing: millimetres along (z, y, x).
        corner_mm: the outer corner of voxel (0, 0, 0), (z, y, x).
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    corner_mm: tuple[float, float, float]

    @property
    def cuts(self) -> tuple[int, int, int]:
        """How many parts to cut voxels into, (z, y, x): at least two, of about half a mm."""
        z, y, x = (max(2, round(step / 0.55)) for step in self.spacing)
        return (z, y, x)

    @property
    def axes(self) -> tuple[np.ndarray, ...]:
        """Voxel centres in mm: shapes (z, 1, 1), (1, y, 1) and (1, 1, x)."""
        lines = [
            (corner + step * (np.arange(n) + 0.5)).astype(np.float32)
            for n, step, corner in zip(self.shape, self.spacing, self.corner_mm, strict=True)
        ]
        return tuple(np.ix_(*lines))

    def finer(self) -> "Frame":
        """The same box with every voxel cut into `cuts`."""
        nz, ny, nx = (n * cut for n, cut in zip(self.shape, self.cuts, strict=True))
        dz, dy, dx = (step / cut for step, cut in zip(self.spacing, self.cuts, strict=True))
        return Frame(shape=(nz, ny, nx), spacing=(dz, dy, dx), corner_mm=self.corner_mm)

    def noise(self, rng: np.random.Generator, *, sigma_mm: float) -> np.ndarray:
        """A smooth random field of mean 0 and standard deviation 1, float32."""
        white = rng.standard_normal(self.shape, dtype=np.float32)
        sigma = [sigma_mm / step for step in self.spacing]
        smooth = gaussian_filter(white, sigma, mode="wrap", truncate=3)
        return smooth / smooth.std()


def average(fine: np.ndarray, cuts: tuple[int, int, int]) -> np.ndarray:
    """Means of blocks of `cuts` voxels, which is what a voxel of their size would hold, float32."""
    fz, fy, fx = cuts
    total = np.zeros([n // f for n, f in zip(fine.shape, cuts, strict=True)], np.float32)
    for z in range(fz):
        for y in range(fy):
            for x in range(fx):
                total += fine[z::fz, y::fy, x::fx]
    return total / np.float32(fz * fy * fx)
