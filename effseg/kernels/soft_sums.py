"""Cross-entropy against soft targets over tiles of voxels, and the targets made of heads' logits.

With p the softmax over classes of logits over a temperature, and q a voxel's target, the sum is
that of -sum_c q_c log p_c. All three operators make the logits of a tile, read them while they lie
in the cache, and drop them: beside the targets nothing of classes x voxels exists in full. What is
allocated inside is a few tiles a thread.

Targets are rows, (batch, voxels, classes), so that those of a tile lie together.
"""

import torch
from torch import Tensor

from effseg.kernels.class_sums import class_tile_length, head_gradients_like
from effseg.kernels.pointwise import activated, slope_of
from effseg.kernels.tiles import Tile, accumulator_dtype, by_row, each_tile, row_of, strips_of


@torch.library.custom_op("effseg::soft_sums", mutates_args=())
def soft_sums(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: float,
    targets: Tensor,
    temperature: float,
) -> Tensor:
    """Return the sum of each sample, of the logits act(scale * rows + shift) @ weight.T + bias.

    Args:
        rows: (batch, voxels, channels), in any memory layout.
        weight: (classes, channels), in the rows' type.
        bias: (classes,), in the rows' type; None: none.
        scale: (1 or batch, channels), as is shift, in the accumulator's type; None for both: the
            rows are read as they are.
        shift: see scale.
        slope: of the activation below zero; not used without scale.
        targets: (batch, voxels, classes), any floating type.
        temperature: above 0.

    Returns:
        (batch,), in float64.
    """
    length = class_tile_length(rows, weight.shape[0])
    n_strips = len(strips_of([rows], length=length))
    sums = torch.zeros(n_strips, dtype=torch.float64, device=rows.device)

    def work(index: int, tile: Tile) -> None:
        features, _ = _features(rows, scale, shift, slope, tile)
        logits = _logits(features, weight, bias).div_(temperature)
        target = targets[tile].to(logits.dtype)
        # the largest logit goes, so that what is summed is small
        logits.sub_(logits.amax(1, keepdim=True))
        norms = logits.exp().sum(1).log_()
        # the targets are not ours to change, and may be of this very type
        sums[index] += (norms.mul_(target.sum(1)) - logits.mul_(target).sum(1)).double().sum()

    with torch.autocast(rows.device.type, enabled=False):
        each_tile([rows], work, length=length)
    return sums.view(rows.shape[0], -1).sum(1)


@soft_sums.register_fake
def _(rows: Tensor, *_: object) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.float64)


@torch.library.custom_op("effseg::soft_sums_backward", mutates_args=())
def soft_sums_backward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: float,
    targets: Tensor,
    temperature: float,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of `soft_sums`: of the logits it is (p sum_c q_c - q) / temperature.

    Args:
        rows: as forward, as are all others but the last.
        weight: see forward.
        bias: see forward.
        scale: see forward.
        shift: see forward.
        slope: see forward.
        targets: see forward; they get no gradient.
        temperature: see forward.
        gradient: of the sums, (batch,).

    Returns:
        The gradients of rows, weight, bias, scale and shift; all but the first in the accumulator's
        type, those of scale and shift empty where there is none. Statistics count as constants:
        `norm.deferred_terms` has the rest.
    """
    dtype = accumulator_dtype(rows.dtype)
    factors = gradient.to(dtype) / temperature
    length = class_tile_length(rows, weight.shape[0])
    n_strips = len(strips_of([rows], length=length))
    into = torch.empty_like(rows)
    weight_gradient = weight.new_zeros((n_strips, *weight.shape), dtype=dtype)
    bias_gradient = weight.new_zeros((n_strips, weight.shape[0]), dtype=dtype)
    n_norm = (0,) if scale is None else scale.shape[1:]
    norm_gradient = weight.new_zeros((2, n_strips, *n_norm), dtype=dtype)

    def work(index: int, tile: Tile) -> None:
        features, wide = _features(rows, scale, shift, slope, tile)
        target = targets[tile].to(dtype)
        g = torch.softmax(_logits(features, weight, bias).div_(temperature), 1)
        g.mul_(target.sum(1, keepdim=True)).sub_(target).mul_(factors[tile[0]])
        bias_gradient[index] += g.sum(0)
        g = g.to(rows.dtype)
        weight_gradient[index] += torch.mm(g.t(), features)
        back = torch.mm(g, weight)
        if scale is not None and wide is not None:
            back = slope_of(wide, slope, back.to(dtype))
            norm_gradient[0, index] += torch.mul(back, rows[tile].to(dtype), out=wide).sum(0)
            norm_gradient[1, index] += back.sum(0)
            back.mul_(row_of(scale, tile))
        into[tile] = back

    with torch.autocast(rows.device.type, enabled=False):
        each_tile([rows], work, length=length)
    if scale is None:
        of_scale, of_shift = (weight.new_empty((0, 0), dtype=dtype) for _ in range(2))
    else:
        of_scale, of_shift = by_row(norm_gradient, scale)
    return into, weight_gradient.sum(0), bias_gradient.sum(0), of_scale, of_shift


soft_sums_backward.register_fake(head_gradients_like)


@torch.library.custom_op("effseg::add_softened", mutates_args=("targets",))
def add_softened(
    targets: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: float,
    temperature: float,
    share: float,
) -> None:
    """Add a share of the softmax of logits over a temperature to some targets, in place.

    Args:
        targets: (batch, voxels, classes), any floating type.
        rows: as `soft_sums`, as are weight, bias, scale, shift, slope and temperature.
        weight: see rows.
        bias: see rows.
        scale: see rows.
        shift: see rows.
        slope: see rows.
        temperature: see rows.
        share: what each probability is multiplied by.
    """

    def work(_: int, tile: Tile) -> None:
        features, _wide = _features(rows, scale, shift, slope, tile)
        p = torch.softmax(_logits(features, weight, bias).div_(temperature), 1).mul_(share)
        targets[tile] = p.add_(targets[tile])

    with torch.autocast(rows.device.type, enabled=False):
        each_tile([rows], work, length=class_tile_length(rows, weight.shape[0]))


@add_softened.register_fake
def _(targets: Tensor, *_: object) -> None:
    del targets


def _features(
    rows: Tensor, scale: Tensor | None, shift: Tensor | None, slope: float, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """What the convolution reads of a tile; and that in the accumulator's type, where it is new."""
    given = rows[tile]
    if scale is None or shift is None:
        return given, None
    wide = activated(given.to(scale.dtype), row_of(scale, tile), row_of(shift, tile), slope)
    return wide.to(rows.dtype), wide


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(voxels, classes) of (voxels, channels), in the accumulator's type."""
    right = weight.t()
    logits = torch.mm(features, right) if bias is None else torch.addmm(bias, features, right)
    return logits.to(accumulator_dtype(features.dtype))
