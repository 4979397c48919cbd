"""What a loss refuses before it reads a value: shapes, types and class counts that do not fit."""

import math

import torch
from torch import Tensor

from effseg.errors import DataError, GeometryError, PlanError
from effseg.kernels import DeferredLogits


def check_batch(
    logits: Tensor | DeferredLogits, labels: Tensor, *, ignore_label: int | None
) -> None:
    """Refuse logits and labels that cannot be a batch of a loss; reads no values, only shapes.

    Raises:
        GeometryError: if the shapes do not fit each other or hold no voxel.
        DataError: if the types are not floating and integer, or do not hold the ignore label.
        PlanError: for an ignore label that is also a class.
    """
    expected = (logits.shape[0], *logits.shape[2:])
    if len(logits.shape) < 3 or labels.shape != expected:
        raise GeometryError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (N, C, *S) "
            f"and (N, *S), without a channel axis: labels[:, 0] takes one off"
        )
    if math.prod(logits.shape) == 0:
        raise GeometryError(f"logits {tuple(logits.shape)} hold no voxel; expected at least one")
    if not logits.dtype.is_floating_point:
        raise DataError(f"logits are {logits.dtype}; expected a floating type, as a network gives")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"labels are {labels.dtype}; expected integers: labels.to(torch.uint8)")
    check_classes(classes_of(logits.shape[1]), ignore_label=ignore_label)
    held = torch.iinfo(labels.dtype)
    # torch compares modulo 256 here: in uint8 a 255 equals -1
    if ignore_label is not None and not held.min <= ignore_label <= held.max:
        raise DataError(
            f"labels are {labels.dtype} ({held.min} to {held.max}), which cannot hold the ignore "
            f"label {ignore_label}; give labels.to(torch.int64), or another ignore label"
        )


def check_classes(n_classes: int, *, ignore_label: int | None) -> None:
    """Refuse an ignore label that is also a class.

    Raises:
        PlanError: if it is one.
    """
    if ignore_label is not None and 0 <= ignore_label < n_classes:
        raise PlanError(
            f"ignore_label {ignore_label} is also a class of 0 to {n_classes - 1}; "
            "give ignored voxels another value, such as 255"
        )


def classes_of(n_channels: int) -> int:
    """How many classes so many channels tell apart: one channel is foreground or not."""
    return max(2, n_channels)
