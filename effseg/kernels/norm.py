"""A norm's statistics, and the part of its backward that comes from their dependence on x."""

import torch
from torch import Tensor

from effseg.kernels.tiles import Tile, accumulator_dtype, each_tile, merged, row_of, strips_of


@torch.library.custom_op("effseg::moments", mutates_args=())
def moments(rows: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, over voxels or over voxels and samples.

    Two passes over each tile while it lies in the cache; tiles are merged by Chan, Golub and
    LeVeque's formula ("Algorithms for computing the sample variance", 1983).

    Args:
        rows: (batch, voxels, channels).
        over_batch: one row of statistics for the whole batch (batch norm) or one a sample.

    Returns:
        Two tensors (1 or batch, channels) in the accumulator's type.
    """
    dtype = accumulator_dtype(rows.dtype)
    mean = rows.new_empty(1 if over_batch else rows.shape[0], rows.shape[2], dtype=dtype)
    (rows,) = merged([rows], mean)
    tiles = [tile for strip in strips_of([rows]) for tile in strip]
    place_of = {(sample, voxels.start): i for i, (sample, voxels) in enumerate(tiles)}
    means = mean.new_empty(len(tiles), rows.shape[2])
    variances = torch.empty_like(means)

    def work(_: int, tile: Tile) -> None:
        place = place_of[tile[0], tile[1].start]
        wide = rows[tile].to(dtype)
        torch.mean(wide, 0, out=means[place])
        squares = torch.ops.aten.mse_loss(wide, means[place].expand_as(wide), reduction=0)
        torch.mean(squares, 0, out=variances[place])

    each_tile([rows], work)
    n_values = torch.tensor([voxels.stop - voxels.start for _, voxels in tiles], dtype=dtype)
    shares = (n_values / (rows.shape[1] * len(rows) / len(mean))).to(rows.device)
    shape = (len(mean), -1, rows.shape[2])
    means, variances, shares = (
        means.view(shape),
        variances.view(shape),
        shares.view(len(mean), -1, 1),
    )
    mean = (means * shares).sum(1)
    away = means - mean.unsqueeze(1)
    return mean, (torch.addcmul(variances, away, away) * shares).sum(1)


@moments.register_fake
def _(rows: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    shape = (1 if over_batch else rows.shape[0], rows.shape[2])
    dtype = accumulator_dtype(rows.dtype)
    return rows.new_empty(shape, dtype=dtype), rows.new_empty(shape, dtype=dtype)


@torch.library.custom_op("effseg::affine_combine", mutates_args=("gradient",))
def affine_combine(
    gradient: Tensor, factor: Tensor, rows: Tensor, slope: Tensor, offset: Tensor
) -> None:
    """Set gradient = factor * gradient + slope * rows + offset in place, all per channel.

    What a norm's backward is once its sums are known; `slope` and `offset` come from
    `deferred_terms`.
    """
    gradient, rows = merged([gradient, rows], factor)

    def work(_: int, tile: Tile) -> None:
        target = gradient[tile]
        wide = torch.addcmul(row_of(offset, tile), rows[tile].to(factor.dtype), row_of(slope, tile))
        target.copy_(wide.addcmul_(target.to(factor.dtype), row_of(factor, tile)))

    each_tile([gradient], work)


@affine_combine.register_fake
def _(gradient: Tensor, factor: Tensor, rows: Tensor, slope: Tensor, offset: Tensor) -> None:
    return None


def deferred_terms(
    sum_g: Tensor, sum_gx: Tensor, mean: Tensor, rstd: Tensor, n_values: int
) -> tuple[Tensor, Tensor]:
    """Slope and offset of a norm's backward: what the statistics' own dependence adds.

    With xhat = rstd (x - mean) and H the gradient of xhat summed over every reader of x, the
    norm's backward is rstd (H - mean(H) - xhat mean(H xhat)). Readers add rstd H directly; the
    rest is affine in x, so it is applied once a channel when its last reader is done.

    Args:
        sum_g: sum of H over the values that share the statistics, (rows, channels).
        sum_gx: sum of H * xhat, (rows, channels).
        mean: of x, (rows, channels).
        rstd: 1 / sqrt(variance + eps), (rows, channels).
        n_values: how many values share one row of statistics.

    Returns:
        (slope, offset), each (rows, channels): add `slope * x + offset` to the gradient.
    """
    slope = -(rstd * rstd) * sum_gx / n_values
    return slope, -rstd * sum_g / n_values - slope * mean
