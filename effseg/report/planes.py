"""A case in three planes: image, reference and prediction, cut where it is worth looking."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from effseg.errors import EffsegError, GeometryError
from effseg.io import read_volume
from effseg.plans import Plan
from effseg.report.charts import step_of
from effseg.report.outlines import outline, png_uri, shrink
from effseg.types import Array, Shape3, Slices3, Spacing
from effseg.volume import Volume

ROW_PX, HEIGHT_PX = 1064, 400
"""The page's width and the tallest that a plane may get in it."""

CONTEXT, LEAST_CONTEXT_MM = 0.3, 12.0
"""Shown around what is labelled: this share of its extent on each side, and never less."""

DENSE_MM = 5.0
"""Errors are dense where many lie in a cube of this edge."""

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
        ignored: outline of what was left out of the score.
        letters: what lies at the left, right, top and bottom.
    """

    name: str
    caption: str
    size_mm: tuple[float, float]
    picture: tuple[str, tuple[float, float]] | None
    reference: str
    prediction: str
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
    plan: Plan,
    ignore_label: int | None,
    through: Literal["error", "centre"],
) -> View:
    """Cut one case in three planes.

    Args:
        prediction: file of the predicted label map.
        reference: file of the reference label map.
        image: file of the image, of which the first channel is shown; None: outlines alone.
        plan: gives the intensity window of a CT.
        ignore_label: reference voxels of this value count neither as right nor as wrong.
        through: the place where errors are densest, or the reference's centre.

    Returns:
        The view. A file that is missing or does not fit makes no exception but a sentence.
    """
    try:
        volumes = _read_pair(prediction, reference)
    except (EffsegError, OSError) as error:
        return View(planes=(), problem=str(error))
    predicted, expected = volumes
    picture, problem = None, ""
    if image is not None:
        try:
            picture = _read_image(image, expected)
        except (EffsegError, OSError) as error:
            problem = f"Outlines without the image: {error}"
    truth, guess = expected.array, predicted.array
    ignored = np.zeros(expected.grid.shape, bool)
    if ignore_label is not None:
        # As in the scores: unknown counts in neither map, and predicting it is background.
        ignored = truth == ignore_label
        truth, guess = (np.where(ignored | (m == ignore_label), 0, m) for m in (truth, guess))
    place, where = _place(truth, guess, expected.grid.spacing, through=through)
    box = _box((truth > 0) | (guess > 0), expected.grid.spacing)
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
            maps=(truth, guess, ignored),
            window=window,
        )
        for name, axis, letters in _PLANES
    )
    return _laid_out(planes, where=where, problem=problem)


def _read_pair(prediction: str, reference: str) -> tuple[Volume, Volume]:
    predicted, expected = (
        volume.reordered(volume.grid.canonical_axes())
        for volume in (read_volume(prediction), read_volume(reference))
    )
    difference = expected.grid.difference(predicted.grid)
    if difference is not None:
        raise GeometryError(f"{prediction} and {reference} differ in {difference}")
    return predicted, expected


def _read_image(path: str, like: Volume) -> Array:
    """The first channel, in the axis order of `like`."""
    image = read_volume(path, channel=0)
    image = image.reordered(image.grid.canonical_axes())
    difference = like.grid.difference(image.grid)
    if difference is not None:
        raise GeometryError(f"{path} and the reference differ in {difference}")
    return image.array if image.array.ndim == 3 else image.array[0]


def _place(
    truth: Array, guess: Array, spacing: Spacing, *, through: Literal["error", "centre"]
) -> tuple[Shape3, str]:
    """The voxel through which to cut, and words for it."""
    wrong = truth != guess
    if wrong.any() and (through == "error" or not truth.any()):
        size = [max(1, 2 * round(DENSE_MM / s / 2) + 1) for s in spacing]
        near = _around(wrong)
        density = ndimage.uniform_filter(wrong[near].astype(np.float32), size=size, mode="constant")
        found = np.unravel_index(np.argmax(density * wrong[near]), density.shape)
        z, y, x = (int(i) + part.start for i, part in zip(found, near, strict=True))
        return (z, y, x), "planes where errors are densest"
    if truth.any():
        return _centre(truth > 0), "planes through the centre of the reference"
    z, y, x = (n // 2 for n in truth.shape)
    return (z, y, x), "planes through the middle: nothing is labelled"


def _centre(mask: Array) -> Shape3:
    """A set voxel next to the centre, which of a curved shape may lie outside it."""
    sums = (mask.sum(axis=(1, 2)), mask.sum(axis=(0, 2)), mask.sum(axis=(0, 1)))
    middle = [float(n @ np.arange(n.size)) / float(n.sum()) for n in sums]
    (filled,) = np.nonzero(sums[0])
    z = int(filled[np.abs(filled - middle[0]).argmin()])
    plane = np.argwhere(mask[z])
    y, x = plane[((plane - middle[1:]) ** 2).sum(axis=1).argmin()].tolist()
    return z, y, x


def _around(mask: Array) -> Slices3:
    """The bounding box of what is set; the whole array where nothing is."""
    found = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        (at,) = np.nonzero(mask.any(axis=others))
        found.append(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, mask.shape[axis]))
    return (found[0], found[1], found[2])


def _box(mask: Array, spacing: Spacing) -> Slices3:
    """What is shown: the bounding box and context around it, inside the volume."""
    parts = []
    for part, n, step in zip(_around(mask), mask.shape, spacing, strict=True):
        extent_mm = (part.stop - part.start) * step
        margin = round(max(CONTEXT * extent_mm, LEAST_CONTEXT_MM) / step)
        parts.append(slice(max(0, part.start - margin), min(n, part.stop + margin)))
    return (parts[0], parts[1], parts[2])


def _window(array: Array, plan: Plan) -> tuple[float, float]:
    normalisation = plan.channels[0].normalisation
    if normalisation.low is not None and normalisation.high is not None:
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
    window: tuple[float, float],
) -> Plane:
    truth, guess, ignored = (_slice(volume, axis, place=place, box=box) for volume in maps)
    rows_mm, columns_mm = (spacing[other] for other in range(3) if other != axis)
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
