"""Sums per class, from which overlap and likelihood losses are made, and their gradient.

Dice, Jaccard, Tversky, cross-entropy, focal loss and their kin read a network's output only through
sums over voxels (`effseg.kernels.class_tiles` names them). So a loss takes two passes over tiles of
voxels: one adds the sums up; the loss is plain arithmetic on them; the other turns its slope on the
sums into a gradient. Neither softmax nor one-hot of the whole batch ever exists.

Of logits that exist, only they and the labels are kept from forward to backward. Of deferred logits
(`effseg.kernels.DeferredLogits`) only features and labels are: each pass makes the logits anew, a
tile at a time.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float64, Integer, UInt8
from torch import Tensor
from torch.nn.functional import pad

from effseg.kernels import DeferredLogits, FoldedNorm, refuse_second_derivative
from effseg.kernels.class_sums import head_sums, head_sums_backward
from effseg.kernels.class_tiles import Counting, tile_gradient, tile_sums
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
    counting: Counting,
    *,
    closeness: UInt8[Tensor, " batch *space"] | None = None,
) -> Float64[Tensor, "batch sums classes"]:
    """The sums of each class and sample, differentiable once on what makes the logits.

    Args:
        logits: (N, C, *S); any floating type, summed in float32 (float64 logits in float64). One
            channel z counts as two, (0, z), whose softmax is the sigmoid of z.
        labels: (N, *S); any integer type.
        counting: which sums, in which order. Ignored voxels count nowhere and get no gradient.
        closeness: to an edge of the label, (N, *S); with an `edge_weight`.

    Returns:
        (N, sums, C). All zero where every voxel is ignored. A label that is neither a class nor
        ignored counts as predicted alone.
    """
    close = None if closeness is None else closeness.flatten(1)
    # torch leaves apply untyped
    if isinstance(logits, DeferredLogits):
        logits = _two_channels(logits)
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
            close,
            counting,
        )
    else:
        sums = _ClassSums.apply(  # type: ignore[no-untyped-call]
            logits, labels.flatten(1), close, counting
        )
    return sums


def _two_channels(logits: DeferredLogits) -> DeferredLogits:
    """A head of one channel as one of two, whose first is 0."""
    if logits.shape[1] > 1:
        return logits
    bias = None if logits.bias is None else pad(logits.bias, (1, 0))
    return replace(logits, weight=pad(logits.weight, (0, 0, 1, 0)), bias=bias)


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
        ctx: Any, logits: Tensor, labels: Tensor, closeness: Tensor | None, counting: Counting
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, closeness)
        ctx.counting = counting
        flat = logits.flatten(2)
        n_samples, n_channels, _ = flat.shape
        shape = (n_samples, len(counting.names), max(2, n_channels))
        sums = torch.zeros(shape, dtype=torch.float64, device=logits.device)
        for sample, voxels in voxel_chunks(*flat.shape):
            sums[sample] += tile_sums(
                _wide(flat[sample, :, voxels]),
                labels[sample, voxels],
                counting,
                None if closeness is None else closeness[sample, voxels],
            )
        return sums

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative(*SECOND_DERIVATIVE)
        logits, labels, closeness = ctx.saved_tensors
        slope = slope.to(accumulator_dtype(logits.dtype))
        flat = logits.flatten(2)
        gradient = torch.empty_like(flat)
        for sample, voxels in voxel_chunks(*flat.shape):
            of_tile = tile_gradient(
                _wide(flat[sample, :, voxels]),
                labels[sample, voxels],
                slope[sample],
                ctx.counting,
                None if closeness is None else closeness[sample, voxels],
            )
            gradient[sample, :, voxels] = of_tile[-flat.shape[1] :]
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
        closeness: Tensor | None,
        counting: Counting,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, scale, shift, mean, rstd, labels, closeness)
        ctx.n_values, ctx.slope, ctx.counting = n_values, slope, counting
        sums: Tensor = head_sums(
            rows,
            weight,
            bias,
            scale,
            shift,
            slope,
            labels,
            counting.ignore_label,
            counting.focal_gamma,
            counting.one_vs_rest,
            counting.squared,
            counting.edge_weight,
            closeness,
        )
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(*SECOND_DERIVATIVE)
        rows, weight, bias, scale, shift, mean, rstd, labels, closeness = ctx.saved_tensors
        counting = ctx.counting
        into, of_weight, of_bias, of_scale, of_shift = head_sums_backward(
            rows,
            weight,
            bias,
            scale,
            shift,
            ctx.slope,
            labels,
            counting.ignore_label,
            counting.focal_gamma,
            gradient,
            counting.one_vs_rest,
            counting.squared,
            counting.edge_weight,
            closeness,
        )
        if ctx.n_values is not None:
            through_statistics(into, rows, (scale, mean, rstd), (of_scale, of_shift), ctx.n_values)
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


def through_statistics(
    into: Tensor,
    rows: Tensor,
    norm: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    n_values: int,
) -> None:
    """Add to a gradient of rows what reaches them through the statistics of the folded norm.

    Args:
        into: the gradient that takes statistics for constants; changed in place.
        rows: as forward read them.
        norm: scale, mean and rstd of each row.
        gradients: of scale and shift.
        n_values: that each statistic was taken over.
    """
    (scale, mean, rstd), (of_scale, of_shift) = norm, gradients
    # of xhat: scale is rstd times the gain
    sum_h = scale / rstd * of_shift
    sum_hx = scale * (of_scale - mean * of_shift)
    terms = deferred_terms(sum_h, sum_hx, mean, rstd, n_values)
    affine_combine(into, torch.ones_like(mean), rows, *terms)


def _wide(logits: Tensor) -> Tensor:
    """Of two channels at least, in the type that is summed in."""
    wide = logits.to(accumulator_dtype(logits.dtype))
    return wide if len(wide) > 1 else pad(wide, (0, 0, 1, 0))
