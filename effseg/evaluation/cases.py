"""One case: a prediction against its reference, both in memory."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from scipy import ndimage

from effseg.errors import DataError, GeometryError
from effseg.evaluation.lesions import score_lesions
from effseg.evaluation.overlap import confusion, overlap_scores, present_labels
from effseg.evaluation.scores import CaseScore, LabelScore
from effseg.evaluation.surface import grow_box, surface_distances
from effseg.postprocess import foreground_box
from effseg.types import Array, Slices3
from effseg.volume import Grid, Volume

MAX_LABEL = 65535
"""Beyond 16 bits it is an image or a map of instances, not of labels."""


def evaluate_case(
    prediction: Volume,
    reference: Volume,
    *,
    case: str = "case",
    labels: Mapping[int, str] | None = None,
    ignore_label: int | None = None,
    tolerance_mm: float = 1.0,
) -> CaseScore:
    """Score one prediction.

    Args:
        prediction: integer label map; its voxels of `ignore_label` count as background.
        reference: integer label map on the same grid; stored in another axis order is fine.
        case: the name in messages and in the result.
        labels: value to name of every label that may occur, each scored; 0 is background and may be
            left out. None: the values that occur.
        ignore_label: the reference's value for "unknown"; such voxels are taken out of both masks.
        tolerance_mm: up to this distance surface Dice counts two surfaces as equal.

    Returns:
        Scores per label, in ascending order. A label that neither map holds has None everywhere
        (undefined, not perfect); one that a single map holds has Dice 0 and no distances.

    Raises:
        GeometryError: if the grids differ.
        DataError: if a map holds fractions, negative numbers or labels that were not declared, or
            an argument is impossible.
    """
    names = check_choices(labels, ignore_label=ignore_label, tolerance_mm=tolerance_mm)
    prediction, reference = _on_one_grid(prediction, reference, case)
    predicted = _label_map(prediction, f"{case}: prediction")
    true = _label_map(reference, f"{case}: reference")
    grid, box = reference.grid, _union(foreground_box(predicted), foreground_box(true))
    if box is not None:
        # One voxel more than the foreground, so that only the volume's own edge is an edge.
        box = grow_box(box, grid.shape)
        predicted, true, grid = predicted[box], true[box], grid.crop(box)
    else:
        predicted, true = predicted[:0], true[:0]
    in_prediction, in_reference = present_labels(predicted), present_labels(true)
    values = np.union1d(np.union1d(in_prediction, in_reference), [0])
    if names is None:
        names = {int(v): str(v) for v in values if v not in (0, ignore_label)}
    for found, role in ((in_prediction, "prediction"), (in_reference, "reference")):
        _check_declared(found, names, ignore_label, f"{case}: {role}")
    counts = confusion(predicted, true, values)[:, values != ignore_label]
    known = values[values != ignore_label]
    return CaseScore(
        case=case,
        labels=tuple(
            _score_label(
                label,
                name,
                n_both=int(counts[np.ix_(values == label, known == label)].sum()),
                n_prediction=int(counts[values == label].sum()),
                n_reference=int(counts[:, known == label].sum()),
                voxel_mm3=reference.grid.voxel_mm3,
                surface=surface,
            )
            for (label, name), surface in zip(
                names.items(),
                _surfaces(predicted, true, tuple(names), ignore_label, grid, tolerance_mm),
                strict=True,
            )
        ),
        lesions=score_lesions(
            predicted, true, labels=tuple(names), ignore_label=ignore_label, grid=grid
        ),
    )


def check_choices(
    labels: Mapping[int, str] | None, *, ignore_label: int | None, tolerance_mm: float
) -> dict[int, str] | None:
    """The foreground labels, ascending, once all arguments make sense together.

    Raises:
        DataError: if one does not.
    """
    if not math.isfinite(tolerance_mm) or tolerance_mm < 0:
        raise DataError(f"tolerance_mm {tolerance_mm}; expected a finite distance of 0 mm or more")
    if ignore_label is not None and not 1 <= ignore_label <= MAX_LABEL:
        raise DataError(f"ignore_label {ignore_label}; expected 1 to {MAX_LABEL}, or None")
    if labels is None:
        return None
    names = {value: name for value, name in sorted(labels.items()) if value != 0}
    if not names or min(names) < 0 or max(names) > MAX_LABEL:
        raise DataError(f"labels {sorted(labels)}; expected at least one from 1 to {MAX_LABEL}")
    if ignore_label in names:
        raise DataError(
            f"ignore_label {ignore_label} is also a label to score; drop one of the two"
        )
    return names


def _score_label(
    label: int,
    name: str,
    *,
    n_both: int,
    n_prediction: int,
    n_reference: int,
    voxel_mm3: float,
    surface: dict[str, float | None],
) -> LabelScore:
    overlap = overlap_scores(n_both, n_prediction, n_reference)
    return LabelScore(
        label=label,
        name=name,
        dice=overlap["dice"],
        iou=overlap["iou"],
        voe=overlap["voe"],
        surface_dice=surface["surface_dice"],
        hd_mm=surface["hd_mm"],
        hd95_mm=surface["hd95_mm"],
        assd_mm=surface["assd_mm"],
        relative_volume_difference=overlap["relative_volume_difference"],
        reference_mm3=n_reference * voxel_mm3,
        prediction_mm3=n_prediction * voxel_mm3,
    )


def _surfaces(
    prediction: Array,
    reference: Array,
    labels: tuple[int, ...],
    ignore_label: int | None,
    grid: Grid,
    tolerance_mm: float,
) -> Iterator[dict[str, float | None]]:
    """Surface scores of each label, computed on the box around that label alone."""
    boxes = [_boxes(prediction, labels), _boxes(reference, labels)]
    for label in labels:
        box = _union(boxes[0].get(label), boxes[1].get(label))
        near = (slice(0, 0),) * 3 if box is None else grow_box(box, prediction.shape)
        true = reference[near]
        ignored = np.zeros(true.shape, bool) if ignore_label is None else true == ignore_label
        yield surface_distances(
            (prediction[near] == label) & ~ignored,
            true == label,
            ignored=ignored,
            spacing=grid.spacing,
        ).scores(tolerance_mm)


def _boxes(label_map: Array, labels: tuple[int, ...]) -> dict[int, Slices3]:
    """The box of each label that occurs."""
    if label_map.size == 0 or not labels:
        return {}
    found = ndimage.find_objects(label_map, max_label=max(labels))
    boxes: dict[int, Slices3] = {}
    for label in labels:
        box = found[label - 1]
        if box is not None:
            boxes[label] = (box[0], box[1], box[2])
    return boxes


def _union(one: Slices3 | None, other: Slices3 | None) -> Slices3 | None:
    if one is None or other is None:
        return one or other
    z, y, x = (
        slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )
    return (z, y, x)


def _on_one_grid(prediction: Volume, reference: Volume, case: str) -> tuple[Volume, Volume]:
    difference = prediction.grid.difference(reference.grid)
    if difference is None:
        return prediction, reference
    # The same box may be stored in another axis order; turning both the same way loses nothing.
    turned = [v.reordered(v.grid.canonical_axes()) for v in (prediction, reference)]
    if turned[0].grid.difference(turned[1].grid) is None:
        return turned[0], turned[1]
    raise GeometryError(
        f"{case}: prediction and reference differ in {difference}; "
        "bring the prediction over with resample_like(...)"
    )


def _label_map(volume: Volume, where: str) -> Array:
    """The voxels as integers from 0 to MAX_LABEL, (z, y, x)."""
    array = np.asarray(volume.array)
    if volume.n_channels != 1:
        raise DataError(f"{where} has {volume.n_channels} channels; expected one label map")
    array = array.reshape(volume.grid.shape)
    if array.dtype.kind == "b":
        return array.view(np.uint8)
    if array.dtype.kind not in "iuf":
        raise DataError(f"{where} holds {array.dtype} values; expected integer labels")
    for z, plane in enumerate(array if array.dtype.kind == "f" else ()):
        broken = ~(plane == np.floor(plane)) | ~np.isfinite(plane)
        if broken.any():
            y, x = (int(i) for i in np.argwhere(broken)[0])
            raise DataError(
                f"{where} holds {plane[y, x]:.6g} at (z, y, x) = ({z}, {y}, {x}); expected integer "
                "labels: take the argmax of probabilities, or resample labels by label"
            )
    low, high = array.min(), array.max()
    if low < 0 or high > MAX_LABEL:
        raise DataError(
            f"{where} holds values from {low} to {high}; expected labels from 0 to {MAX_LABEL}: "
            "is it the image?"
        )
    if array.dtype.kind in "iu" and array.dtype.isnative:
        return array
    return array.astype(np.uint16 if high > 255 else np.uint8)


def _check_declared(
    found: Array, names: Mapping[int, str], ignore_label: int | None, where: str
) -> None:
    strange = [int(v) for v in found if v != 0 and v != ignore_label and int(v) not in names]
    if strange:
        listed = ", ".join(str(v) for v in strange[:8]) + (", ..." if len(strange) > 8 else "")
        raise DataError(
            f"{where} holds label {listed}; expected 0 and {', '.join(str(v) for v in names)}: "
            "declare it, or correct the file"
        )
