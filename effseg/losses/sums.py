"""Five sums per class, from which overlap and likelihood losses are made, and their gradient.

Dice, Tversky, cross-entropy, focal loss and their kin read a network's output only through sums
over voxels (`effseg.kernels.class_sums` names them). So a loss takes two passes over tiles of
voxels: one adds the sums up; the loss is plain arithmetic on them; the other turns its slope on the
sums into a gradient. Neither softmax nor one-hot of the whole batch ever exists.

Of logits that exist, only they and the labels are kept from forward to backward. Of deferred logits
(`effseg.kernels.DeferredLogits`) only features and labels are: each pass makes the logits anew, a
tile at a time.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from jaxtyping import Float64, Integer
from torch import Tensor

from effseg.kernels import DeferredLogits, FoldedNorm, refuse_second_derivative
from effseg.kernels.class_sums import (
    N_SUMS,
    head_sums,
    head_sums_backward,
    tile_gradient,
    tile_sums,
)
from effseg.kernels.norm import affine_combine, deferred_terms
from effseg.kernels.tiles import accumulator_dtype
from effseg.types import Logits

Labels: TypeAlias = Integer[Tensor, " batch *space"]
"""A class, or the ignore label, for each voxel; no channel axis."""

CHUNKS = 32
SMALLEST_CHUNK = 2**18


def class_sums(
    logits: Logits | DeferredLogits,
    labels: Labels,
    *,
    ignore_label: int | None,
    focal_gamma: float = 0.0,
) -> Float64[Tensor, "batch 5 classes"]:
    """The five sums of each class and sample, differentiable once on what makes the logits.

    Args:
        logits: (N, C, *S); any floating type, summed in float32 (float64 logits in float64).
        labels: (N, *S); any integer type.
        ignore_label: voxels with this label count nowhere and get no gradient.
        focal_gamma: of the fifth sum, at least 0.

    Returns:
        (N, 5, C): intersection, predicted, reference, log_likelihood, focal. All zero where every
        voxel is ignored. A label that is neither a class nor ignored counts as predicted alone.
    """
    # torch leaves apply untyped
    if isinstance(logits, DeferredLogits):
        norm = logits.norm
        fold = (None, None, None, None) if norm is None else _fold(norm)
        sums: Tensor = _HeadSums.apply(  # type: ignore[no-untyped-call]
            logits.rows,
            logits.weight,
            logits.bias,
            *fold,
            None if norm is None else norm.n_values,
            0.0 if norm is None else norm.slope,
            labels.flatten(1),
            ignore_label,
            focal_gamma,
        )
    else:
        sums = _ClassSums.apply(  # type: ignore[no-untyped-call]
            logits, labels.flatten(1), ignore_label, focal_gamma
        )
    return sums


def voxel_chunks(n_samples: int, n_classes: int, n_voxels: int) -> Iterator[tuple[int, slice]]:
    """Sample and voxels of each chunk: a 32nd of all logits, or 2^18 of them where that is more.

    The share bounds the temporaries and the number of kernels launched; the floor is a chunk that
    stays in a core's cache.
    """
    size = max(SMALLEST_CHUNK, n_samples * n_classes * n_voxels // CHUNKS)
    step = max(1, size // n_classes)
    for sample in range(n_samples):
        for start in range(0, n_voxels, step):
            yield sample, slice(start, min(start + step, n_voxels))


class _ClassSums(torch.autograd.Function):
    """`class_sums` of logits that exist; keeps them and the labels as they came."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_label: int | None, focal_gamma: float
    ) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.counting = {"ignore_label": ignore_label, "focal_gamma": focal_gamma}
        flat = logits.flatten(2)
        sums = torch.zeros(
            (logits.shape[0], N_SUMS, logits.shape[1]), dtype=torch.float64, device=logits.device
        )
        for sample, voxels in voxel_chunks(*flat.shape):
            sums[sample] += tile_sums(
                _wide(flat[sample, :, voxels]), labels[sample, voxels], **ctx.counting
            )
        return sums

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative(*SECOND_DERIVATIVE)
        logits, labels = ctx.saved_tensors
        slope = slope.to(accumulator_dtype(logits.dtype))
        flat = logits.flatten(2)
        gradient = torch.empty_like(flat)
        for sample, voxels in voxel_chunks(*flat.shape):
            gradient[sample, :, voxels] = tile_gradient(
                _wide(flat[sample, :, voxels]),
                labels[sample, voxels],
                slope[sample],
                **ctx.counting,
            )
        return gradient.view(logits.shape), None, None, None


class _HeadSums(torch.autograd.Function):
    """`class_sums` of deferred logits; keeps the features and the labels as they came."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        n_values: int | None,
        slope: float,
        labels: Tensor,
        ignore_label: int | None,
        focal_gamma: float,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, scale, shift, mean, rstd, labels)
        ctx.n_values, ctx.slope = n_values, slope
        ctx.ignore_label, ctx.focal_gamma = ignore_label, focal_gamma
        sums: Tensor = head_sums(
            rows, weight, bias, scale, shift, slope, labels, ignore_label, focal_gamma
        )
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(*SECOND_DERIVATIVE)
        rows, weight, bias, scale, shift, mean, rstd, labels = ctx.saved_tensors
        into, of_weight, of_bias, of_scale, of_shift = head_sums_backward(
            rows,
            weight,
            bias,
            scale,
            shift,
            ctx.slope,
            labels,
            ctx.ignore_label,
            ctx.focal_gamma,
            gradient,
        )
        if ctx.n_values is not None:
            # of xhat: scale is rstd times the gain
            sum_h = scale / rstd * of_shift
            sum_hx = scale * (of_scale - mean * of_shift)
            terms = deferred_terms(sum_h, sum_hx, mean, rstd, ctx.n_values)
            affine_combine(into, torch.ones_like(mean), rows, *terms)
        return (
            into,
            of_weight.to(weight.dtype),
            None if bias is None else of_bias.to(bias.dtype),
            None if scale is None else of_scale,
            None if scale is None else of_shift,
            *(None,) * 7,
        )


SECOND_DERIVATIVE = ("a loss of sums per class", "write it in torch's own operators")


def _fold(norm: FoldedNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm.scale, norm.shift, norm.mean, norm.rstd


def _wide(logits: Tensor) -> Tensor:
    """In the type that is summed in."""
    return logits.to(accumulator_dtype(logits.dtype))
