"""Overlap of two label maps, from one confusion count over all labels."""

import numpy as np

from effseg.types import Array


def present_labels(labels: Array) -> Array:
    """The values that occur, ascending, 0 included; `labels` (z, y, x), 0 or above."""
    # A presence table, plane by plane: np.unique would sort a copy of the volume.
    seen = np.zeros(int(labels.max(initial=0)) + 1, dtype=bool)
    for plane in labels:
        seen[plane] = True
    return np.flatnonzero(seen)


def confusion(prediction: Array, reference: Array, values: Array) -> Array:
    """Count voxels by predicted and reference label, without any one-hot map.

    Args:
        prediction: integers (z, y, x), each among `values`.
        reference: integers (z, y, x), each among `values`.
        values: the labels, ascending, not negative.

    Returns:
        int64 (n, n): entry [i, j] counts the voxels predicted `values[i]` whose reference is
        `values[j]`.
    """
    n = len(values)
    code = np.zeros(int(values.max(initial=0)) + 1, dtype=np.int64)
    code[values] = np.arange(n)
    counts = np.zeros(n * n, dtype=np.int64)
    # Plane by plane: bincount takes 8 bytes a voxel.
    for predicted, true in zip(prediction, reference, strict=True):
        joint = code[predicted]
        joint *= n
        joint += code[true]
        counts += np.bincount(joint.ravel(), minlength=n * n)
    return counts.reshape(n, n)


def overlap_scores(n_both: int, n_prediction: int, n_reference: int) -> dict[str, float | None]:
    """Dice, IoU, VOE and relative volume difference from three voxel counts.

    Dice = 2 |P and R| / (|P| + |R|) (Dice, Ecology 26, 1945); IoU = |P and R| / |P or R|
    (Jaccard, 1912); VOE = 1 - IoU and RVD = (|P| - |R|) / |R|, signed (Heimann et al., IEEE TMI 28,
    2009). Both empty: all None. One empty: Dice 0, IoU 0, VOE 1; RVD None without a reference.
    """
    n_either = n_prediction + n_reference - n_both
    iou = n_both / n_either if n_either else None
    return {
        "dice": 2 * n_both / (n_prediction + n_reference) if n_either else None,
        "iou": iou,
        "voe": None if iou is None else 1 - iou,
        "relative_volume_difference": (
            (n_prediction - n_reference) / n_reference if n_reference else None
        ),
    }
