"""Norm, activation and 1x1 convolution of wide features, a tile of voxels at a time.

Features are rows here: (batch, voxels, channels), channels innermost, as `channels_last` memory
lies. A tile of rows fits the processor's cache, so the normalised, activated copy of the features
that a 1x1 convolution needs never exists in full, neither forward nor backward.

Each function is one operator to `torch.compile`, to autocast and to whoever counts memory: what is
allocated inside is one tile, a few MiB. Sums are kept in float32 (float64 for float64 features).
The activation is `max(t, slope * t)`: leaky ReLU, and ReLU where the slope is 0.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch
from torch import Tensor

TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}

SHARE = 1 << 16
"""Numbers a thread should have to work on: below it, waking it takes longer than the work."""

Tile = tuple[int, slice]
"""A sample and a range of its voxels."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over features of this type are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiles_of(rows: Tensor) -> list[Tile]:
    """The tiles of features (batch, voxels, channels), sample by sample."""
    n_samples, n_voxels, n_channels = rows.shape
    budget = TILE_BYTES.get(rows.device.type, TILE_BYTES["cuda"])
    step = max(256, budget // (4 * max(n_channels, 1)) // 256 * 256)
    return [
        (sample, slice(start, min(start + step, n_voxels)))
        for sample in range(n_samples)
        for start in range(0, n_voxels, step)
    ]


def _each_tile(rows: Tensor, work: Callable[[int, Tile], None]) -> None:
    """Call `work(index, tile)` for every tile.

    On a CPU a tile is one thread's work from its first operator to its last. Left to torch, each
    of these short operators would be split over all threads and end in a barrier; where another
    process wants a core, ten thousand barriers a step cost a hundred times the arithmetic.
    """
    tiles = tiles_of(rows)
    on_cpu = rows.device.type == "cpu"
    n_threads = min(torch.get_num_threads(), len(tiles), rows.numel() // SHARE) if on_cpu else 1
    if n_threads <= 1:
        for index, tile in enumerate(tiles):
            work(index, tile)
        return

    def share(first: int) -> None:
        with torch.no_grad():
            for index in range(first, len(tiles), n_threads):
                work(index, tiles[index])

    # `list` waits, and raises what a thread raised
    list(_crew(torch.get_num_threads()).map(share, range(n_threads)))


@cache
def _crew(n_threads: int) -> ThreadPoolExecutor:
    """Threads in which torch's operators do not split up further."""
    crew = ThreadPoolExecutor(n_threads, "effseg", initializer=partial(torch.set_num_threads, 1))
    list(crew.map(lambda _: None, range(n_threads)))
    torch.set_num_threads(n_threads)  # the threads' own setting also became that of later threads
    return crew


def _row(statistics: Tensor, tile: Tile) -> Tensor:
    """The statistics of a tile's sample; batch norm has one row for all of them."""
    return statistics[tile[0] if statistics.shape[0] > 1 else 0]


def _by_row(sums: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums of each tile, (2, tiles, channels), to two of each row of statistics."""
    n_rows, n_channels = statistics.shape
    one, other = sums.view(2, n_rows, -1, n_channels).sum(2)
    return one.clone(), other.clone()  # an operator's results may not share memory


def _activated(tile: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    """act(scale * tile + shift), a new tensor in the accumulator's type."""
    wide = torch.addcmul(shift, tile.to(scale.dtype), scale)
    return wide.relu_() if slope == 0 else torch.nn.functional.leaky_relu_(wide, slope)


def _slope_of(activated: Tensor, slope: float, gradient: Tensor) -> Tensor:
    """The gradient before the activation, from its result."""
    result: Tensor
    if slope == 0:
        result = torch.ops.aten.threshold_backward(gradient, activated, 0)
    else:
        result = torch.ops.aten.leaky_relu_backward(gradient, activated, slope, True)
    return result


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
    tiles = tiles_of(rows)
    counts = torch.tensor([voxels.stop - voxels.start for _, voxels in tiles], dtype=dtype)
    counts = counts.to(rows.device).unsqueeze(1)
    means = rows.new_empty(len(tiles), rows.shape[2], dtype=dtype)
    spreads = torch.empty_like(means)

    def work(index: int, tile: Tile) -> None:
        wide = rows[tile].to(dtype)
        torch.mean(wide, 0, out=means[index])
        away = wide - means[index]
        torch.sum(away.mul_(away), 0, out=spreads[index])

    _each_tile(rows, work)
    groups = 1 if over_batch else rows.shape[0]
    shape = (groups, -1, rows.shape[2])
    means, spreads, counts = means.view(shape), spreads.view(shape), counts.view(groups, -1, 1)
    total = counts.sum(1)
    mean = (means * counts).sum(1) / total
    away = means - mean.unsqueeze(1)
    return mean, (spreads.sum(1) + (away * away * counts).sum(1)) / total


@moments.register_fake
def _(rows: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    shape = (1 if over_batch else rows.shape[0], rows.shape[2])
    dtype = accumulator_dtype(rows.dtype)
    return rows.new_empty(shape, dtype=dtype), rows.new_empty(shape, dtype=dtype)


@torch.library.custom_op("effseg::affine_act_linear", mutates_args=())
def affine_act_linear(
    rows: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, slope: float
) -> Tensor:
    """Return act(scale * rows + shift) @ weight.T.

    Args:
        rows: (batch, voxels, channels), channels innermost; a slice of wider rows is read in place.
        scale: (1 or batch, channels), as is shift; in the accumulator's type.
        shift: the norm folded: beta - mean * scale.
        weight: (outputs, channels), in the rows' type.
        slope: of the activation below zero.

    Returns:
        (batch, voxels, outputs), in the rows' type.
    """
    n_samples, n_voxels, _ = rows.shape
    out = rows.new_empty(n_samples, n_voxels, weight.shape[0])
    right = weight.t()

    def work(_: int, tile: Tile) -> None:
        wide = _activated(rows[tile], _row(scale, tile), _row(shift, tile), slope)
        torch.mm(wide.to(rows.dtype), right, out=out[tile])

    _each_tile(rows, work)
    return out


@affine_act_linear.register_fake
def _(rows: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, slope: float) -> Tensor:
    return rows.new_empty(rows.shape[0], rows.shape[1], weight.shape[0])


@torch.library.custom_op("effseg::affine_act_linear_backward", mutates_args=("into",))
def affine_act_linear_backward(
    rows: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    slope: float,
    gradient: Tensor,
    into: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `affine_act_linear`; the rows' gradient is added into `into`, in place.

    Args:
        rows: as forward, as are scale, shift, weight and slope.
        scale: see forward.
        shift: see forward.
        weight: see forward.
        slope: see forward.
        gradient: (batch, voxels, outputs), of the forward's result.
        into: (batch, voxels, channels); `scale * g` is added, g the gradient before the
            activation. Statistics count as constants here: `deferred_terms` has the rest.

    Returns:
        The weight's gradient (outputs, channels), and per channel and row of statistics the sums
        of g and of g * rows: the norm's parameter gradients come from them.
    """
    dtype = scale.dtype
    n_tiles = len(tiles_of(rows))
    weight_gradients = weight.new_empty(n_tiles, *weight.shape)
    sums = scale.new_empty(2, n_tiles, scale.shape[1])

    def work(index: int, tile: Tile) -> None:
        given, factor = rows[tile].to(dtype), _row(scale, tile)
        wide = _activated(given, factor, _row(shift, tile), slope)
        torch.mm(gradient[tile].t(), wide.to(rows.dtype), out=weight_gradients[index])
        g = _slope_of(wide, slope, torch.mm(gradient[tile], weight).to(dtype))
        torch.sum(g, 0, out=sums[0, index])
        torch.sum(torch.mul(g, given, out=wide), 0, out=sums[1, index])
        target = into[tile]
        target.copy_(torch.addcmul(target.to(dtype), g, factor))

    _each_tile(rows, work)
    return weight_gradients.sum(0, dtype=dtype), *_by_row(sums, scale)


@affine_act_linear_backward.register_fake
def _(
    rows: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    slope: float,
    gradient: Tensor,
    into: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        weight.new_empty(weight.shape, dtype=scale.dtype),
        torch.empty_like(scale),
        torch.empty_like(scale),
    )


@torch.library.custom_op("effseg::affine_act", mutates_args=())
def affine_act(rows: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    """Return act(scale * rows + shift), (batch, voxels, channels), in the rows' type."""
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)

    def work(_: int, tile: Tile) -> None:
        out[tile] = _activated(rows[tile], _row(scale, tile), _row(shift, tile), slope)

    _each_tile(rows, work)
    return out


@affine_act.register_fake
def _(rows: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@torch.library.custom_op("effseg::activation_backward", mutates_args=("gradient",))
def activation_backward(
    gradient: Tensor, rows: Tensor, scale: Tensor, shift: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    """Turn the gradient of act(scale * rows + shift) into that before the activation, in place.

    Returns:
        The sums of g and of g * rows per channel and row of statistics.
    """
    dtype = scale.dtype
    sums = scale.new_empty(2, len(tiles_of(rows)), scale.shape[1])

    def work(index: int, tile: Tile) -> None:
        given = rows[tile].to(dtype)
        wide = _activated(given, _row(scale, tile), _row(shift, tile), slope)
        g = _slope_of(wide, slope, gradient[tile].to(dtype))
        gradient[tile] = g
        torch.sum(g, 0, out=sums[0, index])
        torch.sum(torch.mul(g, given, out=wide), 0, out=sums[1, index])

    _each_tile(rows, work)
    return _by_row(sums, scale)


@activation_backward.register_fake
def _(
    gradient: Tensor, rows: Tensor, scale: Tensor, shift: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scale), torch.empty_like(scale)


@torch.library.custom_op("effseg::affine_combine", mutates_args=("gradient",))
def affine_combine(
    gradient: Tensor, factor: Tensor, rows: Tensor, slope: Tensor, offset: Tensor
) -> None:
    """Set gradient = factor * gradient + slope * rows + offset in place, all per channel.

    What a norm's backward is once its sums are known; `slope` and `offset` come from
    `deferred_terms`.
    """

    def work(_: int, tile: Tile) -> None:
        wide = torch.addcmul(_row(offset, tile), rows[tile].to(factor.dtype), _row(slope, tile))
        target = gradient[tile]
        target.copy_(wide.addcmul_(target.to(factor.dtype), _row(factor, tile)))

    _each_tile(gradient, work)


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
