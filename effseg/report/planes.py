"""A case in three planes: image, reference and prediction, cut where it is worth looking."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from effseg.errors import EffsegError, GeometryError
from effseg.io import read_volume
from effseg.plans import Plan
from effseg.report.charts import step_of
from effseg.report.outlines import outline, png_uri, shrink
from effseg.report.places import Point, find_place, nearest_voxel, shown_box
from effseg.types import Array, Shape3, Slices3, Spacing
from effseg.volume import Volume

ROW_PX, HEIGHT_PX = 1064, 400
"""The page's width and the tallest that a plane may get in it."""

_PLANES = (
    # name, the axis that is cut, the letters at left, right, top and bottom (world is LPS)
    ("axial", 0, ("R", "L", "A", "P")),
    ("coronal", 1, ("R", "L", "S", "I")),
    ("sagittal", 2, ("A", "P", "S", "I")),
)


@dataclass(frozen=True)
class Plane:
    """One cut, in mm from its top left corner.

    Attributes:
        name: axial, coronal or sagittal.
        caption: which slice of how many.
        size_mm: (height, width).
        picture: data URI of the image and its (height, width) in mm; None without an image.
        reference: SVG path of each label's outline, all in one.
        prediction: the same.
        other: the same of a second prediction.
        ignored: outline of what was left out of the score.
        letters: what lies at the left, right, top and bottom.
    """

    name: str
    caption: str
    size_mm: tuple[float, float]
    picture: tuple[str, tuple[float, float]] | None
    reference: str
    prediction: str
    other: str
    ignored: str
    letters: tuple[str, str, str, str]


@dataclass(frozen=True)
class View:
    """Three planes at one scale, or the reason why there are none.

    Attributes:
        planes: axial, coronal, sagittal; empty where nothing could be drawn.
        where: what the planes go through, in words.
        problem: what could not be shown, in a sentence; empty if all is there.
        width_px: of the row of planes on a wide page.
        mm_per_px: in that row.
        bar_mm: length of the scale bar.
    """

    planes: tuple[Plane, ...]
    where: str = ""
    problem: str = ""
    width_px: int = 0
    mm_per_px: float = 1.0
    bar_mm: float = 10.0


def view_case(
    prediction: str,
    reference: str,
    *,
    image: str | None,
    plan: Plan | None,
    ignore_label: int | None,
    through: Literal["error", "centre"] | Point,
    other: str | None = None,
) -> View:
    """Cut one case in three planes.

    Args:
        prediction: file of the predicted label map.
        reference: file of the reference label map.
        image: file of the image, of which the first channel is shown; None: outlines alone.
        plan: gives the intensity window of a CT; None: the image itself does.
        ignore_label: reference voxels of this value count neither as right nor as wrong.
        through: the place where errors are densest (with `other`: where the two predictions
            differ), the reference's centre, or a point of the world, (z, y, x) in mm.
        other: file of a second predicted label map.

    Returns:
        The view. A file that is missing or does not fit makes no exception but a sentence.
    """
    try:
        expected, *predicted = _read_maps(reference, prediction, *([other] if other else []))
    except (EffsegError, OSError) as error:
        return View(planes=(), problem=str(error))
    picture, problem = None, ""
    if image is not None:
        try:
            picture = _read_image(image, expected)
        except (EffsegError, OSError) as error:
            problem = f"Outlines without the image: {error}"
    maps = [volume.array for volume in (expected, *predicted)]
    ignored = np.zeros(expected.grid.shape, bool)
    if ignore_label is not None:
        # As in the scores: unknown counts in neither map, and predicting it is background.
        ignored = maps[0] == ignore_label
        maps = [np.where(ignored | (m == ignore_label), 0, m) for m in maps]
    if isinstance(through, tuple):
        place, where = nearest_voxel(expected.grid, through), ""
    else:
        most = "errors are densest" if other is None else "the predictions differ most"
        wrong, spacing = maps[-2] != maps[-1], expected.grid.spacing
        place, where = find_place(maps[0], wrong, spacing, through=through, most=most)
    shown = maps[0] > 0
    for array in maps[1:]:
        shown |= array > 0
    shown[place] = True
    box = shown_box(shown, expected.grid.spacing)
    window = (0.0, 1.0)
    if picture is not None:
        window = _window(picture[box], plan)
    planes = tuple(
        _cut(
            name,
            axis,
            letters,
            place=place,
            box=box,
            spacing=expected.grid.spacing,
            picture=picture,
            maps=(maps[0], maps[1], ignored),
            other=maps[2] if other else None,
            window=window,
        )
        for name, axis, letters in _PLANES
    )
    return _laid_out(planes, where=where, problem=problem)


def _read_maps(reference: str, *predictions: str) -> list[Volume]:
    volumes = [
        volume.reordered(volume.grid.canonical_axes())
        for volume in (read_volume(path) for path in (reference, *predictions))
    ]
    for path, volume in zip(predictions, volumes[1:], strict=True):
        difference = volumes[0].grid.difference(volume.grid)
        if difference is not None:
            raise GeometryError(f"{path} and {reference} differ in {difference}")
    return volumes


def _read_image(path: str, like: Volume) -> Array:
    """The first channel, in the axis order of `like`."""
    image = read_volume(path, channel=0)
    image = image.reordered(image.grid.canonical_axes())
    difference = like.grid.difference(image.grid)
    if difference is not None:
        raise GeometryError(f"{path} and the reference differ in {difference}")
    return image.array if image.array.ndim == 3 else image.array[0]


def _window(array: Array, plan: Plan | None) -> tuple[float, float]:
    normalisation = None if plan is None else plan.channels[0].normalisation
    if normalisation and normalisation.low is not None and normalisation.high is not None:
        return normalisation.low, normalisation.high
    values = array[np.isfinite(array)]
    if values.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, (0.5, 99.5))
    return float(low), float(high)


def _cut(
    name: str,
    axis: int,
    letters: tuple[str, str, str, str],
    *,
    place: Shape3,
    box: Slices3,
    spacing: Spacing,
    picture: Array | None,
    maps: tuple[Array, Array, Array],
    other: Array | None,
    window: tuple[float, float],
) -> Plane:
    truth, guess, ignored = (_slice(volume, axis, place=place, box=box) for volume in maps)
    second = None if other is None else _slice(other, axis, place=place, box=box)
    rows_mm, columns_mm = (spacing[i] for i in range(3) if i != axis)
    shown = None
    if picture is not None:
        small, factor = shrink(_slice(picture, axis, place=place, box=box))
        size = (small.shape[0] * factor * rows_mm, small.shape[1] * factor * columns_mm)
        shown = (png_uri(small, window=window), size)
    steps = (rows_mm, columns_mm)
    return Plane(
        name=name,
        caption=f"{name}, slice {place[axis] + 1} of {maps[0].shape[axis]}",
        size_mm=(truth.shape[0] * rows_mm, truth.shape[1] * columns_mm),
        picture=shown,
        reference=_outlines(truth, steps),
        prediction=_outlines(guess, steps),
        other="" if second is None else _outlines(second, steps),
        ignored=outline(ignored, spacing=steps),
        letters=letters,
    )


def _slice(array: Array, axis: int, *, place: Shape3, box: Slices3) -> Array:
    """Head up, front up or left, the patient's right at the left."""
    index: list[int | slice] = list(box)
    index[axis] = place[axis]
    plane: Array = array[tuple(index)]
    return plane if axis == 0 else plane[::-1]


def _outlines(labels: Array, spacing: tuple[float, float]) -> str:
    return " ".join(
        outline(labels == value, spacing=spacing) for value in np.unique(labels) if value != 0
    )


def _laid_out(planes: tuple[Plane, ...], *, where: str, problem: str) -> View:
    """All planes side by side at one scale, no wider than the page, no taller than pleasant."""
    across = sum(plane.size_mm[1] for plane in planes)
    tallest = max(plane.size_mm[0] for plane in planes)
    mm_per_px = max(across / ROW_PX, tallest / HEIGHT_PX)
    narrowest = min(plane.size_mm[1] for plane in planes)
    return View(
        planes=planes,
        where=where,
        problem=problem,
        width_px=round(across / mm_per_px),
        mm_per_px=mm_per_px,
        bar_mm=step_of(narrowest / 6, n_steps=1),
    )
