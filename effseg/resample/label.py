"""Label maps, box by box: each label is interpolated as a 0/1 image, the strongest one wins."""

import numpy as np
from scipy import ndimage

from effseg.resample.mapping import Mapping
from effseg.types import Array, Slices3

_TIE = 1e-5  # shares this close are equal: float32 sums of the same weights differ by less
_DENSE = 1 << 16  # labels below this are looked up in a table, others sorted


def interpolate_label(voxels: Array, *, mapping: Mapping, given: Slices3, wanted: Slices3) -> Array:
    """The label with the largest share in each target voxel.

    Args:
        voxels: the source's labels in `given`, integer or bool.
        mapping: from the source's voxels to the target's.
        given: the source voxels that `wanted` needs.
        wanted: a box of the target.

    Returns:
        The labels of `wanted`, in the type they came in.
    """
    boxes = _label_boxes(voxels)
    # The shares of a voxel sum to 1, so one label need not be interpolated: the one that reaches
    # furthest, which is the background nearly always.
    rest = max(boxes, key=lambda label: (_n_voxels(boxes[label]), label == 0))
    shape = tuple(b.stop - b.start for b in wanted)
    winner = np.full(shape, rest, dtype=voxels.dtype)
    if len(boxes) == 1:
        return winner
    best = np.full(shape, -1.0, dtype=np.float32)
    left = np.ones(shape, dtype=np.float32)
    for label, inner in sorted(boxes.items()):
        if label == rest:
            continue
        reached = _meet(mapping.target_box(_moved(inner, given, 1)), wanted)
        if _n_voxels(reached) == 0:
            continue
        mask = (voxels[inner] == label).astype(np.float32)
        share = mapping.apply(mask, given=_moved(inner, given, 1), wanted=reached)
        here = _moved(reached, wanted, -1)
        left[here] -= share
        np.copyto(winner[here], winner.dtype.type(label), where=share >= best[here] - _TIE)
        np.maximum(best[here], share, out=best[here])
    wins = left > best + _TIE
    wins |= (left >= best - _TIE) & (winner < rest)
    np.copyto(winner, winner.dtype.type(rest), where=wins)
    return winner


def _label_boxes(labels: Array) -> dict[int, Slices3]:
    """The bounding box of each label; that of 0 may be wider than need be."""
    z, y, x = (slice(0, n) for n in labels.shape)
    low, high = int(labels.min()), int(labels.max())
    if low == high:
        return {low: (z, y, x)}
    if low < 0 or high >= _DENSE:
        values, codes = np.unique(labels, return_inverse=True)
        found = _objects(codes.reshape(labels.shape).astype(np.int32) + 1)
        return {int(values[code - 1]): box for code, box in found.items()}
    found = _objects(labels.view(np.uint8) if labels.dtype == np.bool_ else labels)
    return {0: (z, y, x), **found} if low == 0 else found


def _objects(codes: Array) -> dict[int, Slices3]:
    """The bounding box of each positive code."""
    boxes = enumerate(ndimage.find_objects(codes), start=1)
    return {code: (box[0], box[1], box[2]) for code, box in boxes if box is not None}


def _moved(box: Slices3, by: Slices3, sign: int) -> Slices3:
    """The box counted from the start of another one (-1), or back from the array's (1)."""
    z, y, x = (
        slice(b.start + sign * o.start, b.stop + sign * o.start)
        for b, o in zip(box, by, strict=True)
    )
    return (z, y, x)


def _meet(one: Slices3, other: Slices3) -> Slices3:
    z, y, x = (
        slice(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))
        for a, b in zip(one, other, strict=True)
    )
    return (z, y, x)


def _n_voxels(box: Slices3) -> int:
    return int(np.prod([b.stop - b.start for b in box]))
