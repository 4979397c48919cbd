"""One DICOM series, in a folder or a zip, as a volume: whole and evenly spaced, or refused.

What is not an image (XML, reports, structure sets) may lie among the slices and is passed over.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effseg.errors import DataError, MemoryBudgetError
from effseg.io.dicom_slice import Slice, read_slice, read_values
from effseg.io.header import grid_of
from effseg.io.members import Member, members
from effseg.io.voxels import room_for
from effseg.types import Array, FloatArray
from effseg.volume import Grid, Volume

_UNEVEN = 1e-2
"""How far a gap may differ from the median gap, as a share of it."""
_TILT = 1e-3
"""How far a slice may lie beside the normal of the first, as a share of the way along it."""


def read_series(path: Path) -> Volume:
    """Read a series: true values, int16 or int32 where they are whole numbers, else float32.

    Takes the array and one slice; where int16 turns out too narrow half-way, both arrays.

    Raises:
        DataError: if pydicom is missing, or the slices are not one whole, even series.
        MemoryBudgetError: if there is no memory for the array.
    """
    with members(path) as files:
        slices, grid = _series(path, files)
        is_whole = all(one.is_whole for one in slices)
        try:
            array: Array = np.empty(grid.shape, dtype=np.int16 if is_whole else np.float32)
            for index, one in enumerate(slices):
                values = read_values(one)
                if is_whole:
                    array = array.astype(_wide_enough(one, array.dtype, values), copy=False)
                array[index] = values
        except MemoryError as error:
            raise MemoryBudgetError(
                f"{path}: {grid.n_voxels * 2} bytes or more for {grid.shape} voxels (z, y, x) are "
                "not to be had; use a machine with more memory"
            ) from error
    return Volume(array=array, grid=grid)


def read_series_grid(path: Path) -> Grid:
    """The grid of a series, from the headers of all its slices.

    Raises:
        DataError: if pydicom is missing, or the slices are not one whole, even series.
    """
    with members(path) as files:
        return _series(path, files)[1]


def read_series_facts(path: Path) -> "tuple[Grid, np.dtype[np.generic]]":
    """The grid of a series and the type of `read_series`'s array; reads it, a slice at a time.

    Raises:
        DataError: as `read_series`.
    """
    with members(path) as files:
        slices, grid = _series(path, files)
        if not all(one.is_whole for one in slices):
            return grid, np.dtype(np.float32)
        dtype: np.dtype[np.generic] = np.dtype(np.int16)
        for one in slices:
            dtype = _wide_enough(one, dtype, read_values(one))
    return grid, dtype


def read_series_slabs(
    path: Path, thickness: int, *, grid: Grid, dtype: "np.dtype[np.generic]"
) -> Iterator[tuple[int, Array]]:
    """A series in slabs of `thickness` slices and a last one of what is left, each with its start.

    Args:
        path: of the series.
        thickness: slices a slab.
        grid: as `read_series_facts` found it.
        dtype: likewise.

    Raises:
        DataError: as `read_series`, and if the series has changed.
        MemoryBudgetError: if there is no memory for a slab.
    """
    with members(path) as files:
        slices, found = _series(path, files)
        if found != grid:
            raise DataError(f"{path}: the series has changed while it was read; begin anew")
        for start in range(0, len(slices), thickness):
            part = slices[start : start + thickness]
            slab = room_for(path, (len(part), *grid.shape[1:]), dtype)
            for plane, one in zip(slab, part, strict=True):
                values = read_values(one)
                if dtype.kind == "i" and _wide_enough(one, dtype, values) != dtype:
                    raise DataError(f"{path}: the series has changed while it was read; begin anew")
                plane[...] = values
            yield start, slab


def _series(path: Path, files: Sequence[Member]) -> tuple[list[Slice], Grid]:
    """The slices from first to last along their normal, and the grid they make."""
    slices = [one for one in map(read_slice, files) if one is not None]
    if not slices:
        raise DataError(f"{path}: no DICOM images among {len(files)} file(s); expected one series")
    _check_alike(path, slices)
    first = slices[0]
    normal = np.cross(first.along_row, first.along_column)
    slices.sort(key=lambda one: float(one.position @ normal))
    _check_stack(path, slices, normal)
    first, last = slices[0], slices[-1]
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.gaps[1]
    affine[:3, 1] = first.along_column * first.gaps[0]
    affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    affine[:3, 3] = first.position
    shape_xyz = (first.shape[1], first.shape[0], len(slices))
    return slices, grid_of(path, shape_xyz, affine, source="its ImageOrientationPatient")


def _check_alike(path: Path, slices: Sequence[Slice]) -> None:
    series = Counter(one.series for one in slices)
    if len(series) > 1:
        words = ", ".join(f"{uid} ({n} slices)" for uid, n in series.most_common(5))
        raise DataError(f"{path}: {len(series)} series: {words}; expected one, in its own folder")
    first = slices[0]
    if len(slices) == 1:
        raise DataError(
            f"{path}: one slice, {first.member.where.name}; expected two or more: one alone has no "
            "spacing along its normal"
        )
    for one in slices[1:]:
        for what, ours, theirs, tolerance in (
            ("rows and columns", first.shape, one.shape, 0.0),
            ("pixel spacing", first.gaps, one.gaps, 1e-4 * first.gaps.min()),
            ("row direction", first.along_row, one.along_row, 1e-4),
            ("column direction", first.along_column, one.along_column, 1e-4),
        ):
            if np.abs(np.subtract(ours, theirs)).max() > tolerance:
                raise _unlike(path, first, one, what, np.asarray(ours), np.asarray(theirs))
        if first.frame != one.frame:
            raise _unlike(path, first, one, "frame of reference", first.frame, one.frame)


def _unlike(
    path: Path, first: Slice, one: Slice, what: str, ours: Array | str, theirs: Array | str
) -> DataError:
    return DataError(
        f"{path}: {first.member.where.name} and {one.member.where.name} differ in {what}, {ours} "
        f"vs {theirs}; expected one series of equal slices"
    )


def _check_stack(path: Path, slices: Sequence[Slice], normal: FloatArray) -> None:
    """One slice at each of evenly spaced places, on a line along the normal."""
    offsets = np.asarray([one.position - slices[0].position for one in slices])
    heights = offsets @ normal
    gaps = np.diff(heights)
    names = [one.member.where.name for one in slices]
    usual = float(np.median(gaps))
    for index, gap in enumerate(gaps):
        if gap <= max(_UNEVEN * usual, 1e-3):
            raise DataError(
                f"{path}: {names[index]} and {names[index + 1]} lie at the same place, "
                f"{heights[index]:.2f} mm from the first slice; expected one slice at each place"
            )
    for index, gap in enumerate(gaps):
        if abs(gap - usual) > _UNEVEN * usual:
            n_missing = round(gap / usual) - 1
            hint = f": {n_missing} slice(s) missing" if n_missing > 0 else ""
            raise DataError(
                f"{path}: {gap:.3f} mm between {names[index]} and {names[index + 1]}, slices "
                f"{index + 1} and {index + 2} of {len(slices)}, {usual:.3f} mm elsewhere; "
                f"expected even gaps{hint}"
            )
    beside = np.linalg.norm(offsets - heights[:, None] * normal, axis=1)
    worst = int(np.argmax(beside - _TILT * heights))
    if beside[worst] > _TILT * heights[worst] + 0.01:  # positions are written to 0.01 mm or so
        angle = np.degrees(np.arctan2(beside[worst], heights[worst]))
        raise DataError(
            f"{path}: {names[worst]} lies {beside[worst]:.2f} mm beside the normal of the first "
            f"slice ({angle:.2f} degrees, a gantry tilt?); expected a straight stack: resample the "
            "series to orthogonal axes first"
        )


def _wide_enough(one: Slice, dtype: "np.dtype[Any]", values: Array) -> "np.dtype[Any]":
    """The type, or int32 where the values do not fit it."""
    low, high = int(values.min()), int(values.max())
    for wide in (dtype, np.dtype(np.int32)):
        limits = np.iinfo(wide)
        if limits.min <= low and high <= limits.max:
            return wide
    raise DataError(f"{one.member.where}: values from {low} to {high}; expected 32 bits at most")
