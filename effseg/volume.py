"""Where voxels lie (`Grid`) and voxels that lie there (`Volume`).

World coordinates are LPS millimetres as in ITK and DICOM, but written (z, y, x) like every other
triple: the first component grows towards the head, the second towards the back, the third towards
the patient's left.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import permutations, product
from typing import Self

import numpy as np

from effseg.errors import GeometryError
from effseg.types import Array, FloatArray, Shape3, Slices3, Spacing

Matrix3 = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]

IDENTITY: Matrix3 = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class AxisOrder:
    """A reordering of the three array axes, with reversals: one of the 48 ways to store a box.

    Attributes:
        order: new axis i is old axis `order[i]`.
        flips: whether new axis i runs backwards.
    """

    order: Shape3
    flips: tuple[bool, bool, bool]

    def apply(self, array: Array) -> Array:
        """Reorder the last three axes of `array`; a view, nothing is copied."""
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + axis for axis in self.order))
        steps = tuple(slice(None, None, -1 if flip else None) for flip in self.flips)
        return moved[(..., *steps)]

    def inverse(self) -> "AxisOrder":
        """The order that undoes this one."""
        back = tuple(self.order.index(axis) for axis in range(3))
        return AxisOrder(
            order=(back[0], back[1], back[2]),
            flips=(self.flips[back[0]], self.flips[back[1]], self.flips[back[2]]),
        )


@dataclass(frozen=True)
class Grid:
    """The place of a box of voxels in the world.

    Attributes:
        shape: voxels along (z, y, x).
        spacing: millimetres between voxel centres along (z, y, x).
        origin: world position (z, y, x) in mm of the centre of voxel (0, 0, 0).
        direction: column a is the unit world vector (z, y, x) along which array axis a runs.

    Raises:
        GeometryError: if the shape is empty, a spacing is not positive and finite, or the
            direction is not orthonormal to 1e-3.
    """

    shape: Shape3
    spacing: Spacing = (1.0, 1.0, 1.0)
    origin: Spacing = (0.0, 0.0, 0.0)
    direction: Matrix3 = field(default=IDENTITY)

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or any(n < 1 for n in self.shape):
            raise GeometryError(
                f"shape {self.shape}; expected three lengths of at least one voxel (z, y, x)"
            )
        if any(not math.isfinite(s) or s <= 0 for s in self.spacing):
            raise GeometryError(f"spacing {self.spacing} mm; expected finite, positive (z, y, x)")
        if any(not math.isfinite(o) for o in self.origin):
            raise GeometryError(f"origin {self.origin} mm; expected finite numbers (z, y, x)")
        matrix = np.asarray(self.direction, dtype=np.float64)
        if not np.isfinite(matrix).all() or not np.allclose(
            matrix.T @ matrix, np.eye(3), atol=1e-3
        ):
            raise GeometryError(
                f"direction {self.direction}; expected orthonormal columns: "
                "a sheared or scaled image must be resampled by the tool that made it"
            )

    @classmethod
    def from_affine(cls, shape: Shape3, affine: FloatArray) -> Self:
        """The grid of a 4 x 4 matrix that takes voxel indices (z, y, x, 1) to the world."""
        columns = np.asarray(affine, dtype=np.float64)[:3, :3]
        spacing = np.linalg.norm(columns, axis=0)
        if not np.isfinite(spacing).all() or (spacing <= 0).any():
            raise GeometryError(f"affine with column lengths {spacing.tolist()}; expected positive")
        return cls(
            shape=shape,
            spacing=_triple(spacing),
            origin=_triple(np.asarray(affine)[:3, 3]),
            direction=_matrix(columns / spacing),
        )

    @property
    def affine(self) -> FloatArray:
        """4 x 4, float64: voxel indices (z, y, x, 1) to world millimetres (z, y, x, 1)."""
        matrix = np.eye(4)
        matrix[:3, :3] = np.asarray(self.direction) * np.asarray(self.spacing)
        matrix[:3, 3] = self.origin
        return matrix

    @property
    def voxel_mm3(self) -> float:
        """The volume of one voxel."""
        return math.prod(self.spacing)

    @property
    def n_voxels(self) -> int:
        """How many voxels the grid has."""
        return math.prod(self.shape)

    def index_to_world(self, index: Array) -> FloatArray:
        """Voxel indices (..., 3), fractional allowed, to world millimetres (..., 3)."""
        affine = self.affine
        return np.asarray(np.asarray(index) @ affine[:3, :3].T + affine[:3, 3])

    def world_to_index(self, world: Array) -> FloatArray:
        """World millimetres (..., 3) to voxel indices (..., 3), fractional."""
        affine = self.affine
        return np.asarray((np.asarray(world) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T)

    def with_spacing(self, spacing: Spacing) -> "Grid":
        """A grid of exactly this spacing over the same field of view, about the same centre."""
        shape = tuple(
            max(1, round(n * old / new))
            for n, old, new in zip(self.shape, self.spacing, spacing, strict=True)
        )
        centre = self.index_to_world((np.asarray(self.shape) - 1) / 2)
        half = np.asarray(self.direction) @ (np.asarray(spacing) * (np.asarray(shape) - 1) / 2)
        return Grid(
            shape=(shape[0], shape[1], shape[2]),
            spacing=spacing,
            origin=_triple(centre - half),
            direction=self.direction,
        )

    def crop(self, box: Slices3) -> "Grid":
        """The grid of `array[box]`; steps other than 1 are not allowed."""
        starts, stops = [], []
        for part, n in zip(box, self.shape, strict=True):
            start, stop, step = part.indices(n)
            if step != 1:
                raise GeometryError(f"crop with step {step}; expected 1")
            starts.append(start)
            stops.append(stop)
        z, y, x = (stop - start for start, stop in zip(starts, stops, strict=True))
        return replace(
            self, shape=(z, y, x), origin=_triple(self.index_to_world(np.asarray(starts)))
        )

    def reordered(self, axes: AxisOrder) -> "Grid":
        """The grid of `axes.apply(array)`: the same voxels at the same places."""
        corner = [0, 0, 0]
        for axis, flip in zip(axes.order, axes.flips, strict=True):
            corner[axis] = self.shape[axis] - 1 if flip else 0
        signs = np.where(axes.flips, -1.0, 1.0)
        direction = np.asarray(self.direction)[:, list(axes.order)] * signs
        a, b, c = axes.order
        return Grid(
            shape=(self.shape[a], self.shape[b], self.shape[c]),
            spacing=(self.spacing[a], self.spacing[b], self.spacing[c]),
            origin=_triple(self.index_to_world(np.asarray(corner))),
            direction=_matrix(direction),
        )

    def canonical_axes(self) -> AxisOrder:
        """The reordering after which array axes run along +z, +y, +x as nearly as they can.

        Lossless: of the 48 axis orders the one whose direction is closest to the identity.
        """
        direction = np.asarray(self.direction)
        order = max(
            permutations(range(3)),
            key=lambda p: sum(abs(direction[i, p[i]]) for i in range(3)),
        )
        flips = tuple(bool(direction[i, order[i]] < 0) for i in range(3))
        return AxisOrder(order=(order[0], order[1], order[2]), flips=(flips[0], flips[1], flips[2]))

    def difference(self, other: "Grid", *, tolerance: float = 1e-3) -> str | None:
        """Say how `other` differs, or None where the two agree.

        Grids agree when their shapes are equal and no corner lies further from its counterpart
        than `tolerance` times the smallest spacing; the words name what differs most tellingly.
        """
        if self.shape != other.shape:
            return f"shape, {self.shape} vs {other.shape} voxels"
        ends = [(0.0, n - 1.0) for n in self.shape]
        corners = np.asarray(list(product(*ends)))
        gap = np.linalg.norm(self.index_to_world(corners) - other.index_to_world(corners), axis=-1)
        limit = tolerance * min(self.spacing)
        if gap.max() <= limit:
            return None
        if not np.allclose(self.spacing, other.spacing, rtol=tolerance):
            return f"spacing, {_words(self.spacing)} vs {_words(other.spacing)} mm"
        if not np.allclose(self.direction, other.direction, atol=tolerance):
            return "direction, by up to " + f"{np.degrees(_angle(self, other)):.2f} degrees"
        return f"origin, {_words(self.origin)} vs {_words(other.origin)} mm"


@dataclass(frozen=True)
class Volume:
    """Voxels on a grid.

    Attributes:
        array: shape `grid.shape`, or channels first, `(C, *grid.shape)`; any array-like of numpy's
            protocol, a memory map for one.
        grid: where the voxels lie.

    Raises:
        GeometryError: if the array's shape is not the grid's.
    """

    array: Array
    grid: Grid

    def __post_init__(self) -> None:
        if self.array.ndim not in (3, 4) or tuple(self.array.shape[-3:]) != self.grid.shape:
            raise GeometryError(
                f"array of shape {tuple(self.array.shape)} on a grid of {self.grid.shape} voxels; "
                "expected the grid's shape, with or without channels in front"
            )

    @property
    def n_channels(self) -> int:
        """How many channels; 1 where the array has no channel axis."""
        return int(self.array.shape[0]) if self.array.ndim == 4 else 1

    def reordered(self, axes: AxisOrder) -> "Volume":
        """The same voxels at the same places, stored in another axis order; a view."""
        return Volume(array=axes.apply(self.array), grid=self.grid.reordered(axes))

    def crop(self, box: Slices3) -> "Volume":
        """The voxels of a box; a view."""
        return Volume(array=self.array[(..., *box)], grid=self.grid.crop(box))


def _triple(values: Array) -> Spacing:
    z, y, x = (float(v) for v in values)
    return (z, y, x)


def _matrix(values: Array) -> Matrix3:
    return (_triple(values[0]), _triple(values[1]), _triple(values[2]))


def _words(values: Spacing) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"


def _angle(one: Grid, other: Grid) -> float:
    turn = np.asarray(one.direction).T @ np.asarray(other.direction)
    return float(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
