"""Norm, activation and 1x1 convolution of wide features, a tile of voxels at a time.

A tile of rows fits the processor's cache, so the normalised, activated copy of the features that a
1x1 convolution needs never exists in full, neither forward nor backward. Features are read in
segments (`tiles`), so what is concatenated is never copied together.

Each function is one operator to `torch.compile`, to autocast and to whoever counts memory: what is
allocated inside is a tile or two a thread, a few MiB. Sums are kept in float32 (float64 for float64
features). The activation is `max(t, slope * t)`: leaky ReLU, and ReLU where the slope is 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from effseg.kernels.tiles import Tile, by_row, each_tile, merged, row_of, strips_of


@torch.library.custom_op("effseg::affine_act_linear", mutates_args=())
def affine_act_linear(
    segments: Sequence[Tensor], scale: Tensor, shift: Tensor, weight: Tensor, slope: float
) -> Tensor:
    """Return act(scale * rows + shift) @ weight.T, the rows given in segments.

    Args:
        segments: each (batch, voxels, some of the channels), channels innermost, of one type; a
            slice of wider rows is read in place.
        scale: (1 or batch, channels), as is shift; in the accumulator's type.
        shift: the norm folded: beta - mean * scale.
        weight: (outputs, channels), in the segments' type.
        slope: of the activation below zero.

    Returns:
        (batch, voxels, outputs), in the segments' type.
    """
    n_samples, n_voxels, _ = segments[0].shape
    out = segments[0].new_empty(n_samples, n_voxels, weight.shape[0])
    *segments, target = merged([*segments, out], scale)
    right = weight.t()

    def work(_: int, tile: Tile) -> None:
        wide = activated(
            _joined(segments, tile).to(scale.dtype),
            row_of(scale, tile),
            row_of(shift, tile),
            slope,
        )
        torch.mm(wide.to(out.dtype), right, out=target[tile])

    each_tile(segments, work)
    return out


@affine_act_linear.register_fake
def _(
    segments: Sequence[Tensor], scale: Tensor, shift: Tensor, weight: Tensor, slope: float
) -> Tensor:
    return segments[0].new_empty(*segments[0].shape[:2], weight.shape[0])


@torch.library.custom_op("effseg::affine_act_linear_backward", mutates_args=("into",))
def affine_act_linear_backward(
    segments: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    slope: float,
    gradient: Tensor,
    into: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `affine_act_linear`, whose first five arguments it takes again.

    Args:
        segments: see `affine_act_linear`.
        scale: see `affine_act_linear`.
        shift: see `affine_act_linear`.
        weight: see `affine_act_linear`.
        slope: see `affine_act_linear`.
        gradient: (batch, voxels, outputs), of the forward's result.
        into: as the segments; `scale * g` is added in place, g the gradient before the activation.
            Statistics count as constants here: `norm.deferred_terms` has the rest.

    Returns:
        The weight's gradient (outputs, channels), and per channel and row of statistics the sums
        of g and of g * rows: the norm's parameter gradients come from them.
    """
    dtype, n_segments = scale.dtype, len(segments)
    gradient, *rows = merged([gradient, *segments, *into], scale)
    segments, into = rows[:n_segments], rows[n_segments:]
    n_strips = len(strips_of(segments))
    weight_gradients = scale.new_zeros(n_strips, *weight.shape)
    sums = scale.new_zeros(2, n_strips, scale.shape[1])

    def work(index: int, tile: Tile) -> None:
        given, factor = _joined(segments, tile).to(dtype), row_of(scale, tile)
        wide = activated(given, factor, row_of(shift, tile), slope)
        side = gradient[tile]
        weight_gradients[index].add_(torch.mm(side.t(), wide.to(weight.dtype)))
        g = slope_of(wide, slope, torch.mm(side, weight).to(dtype))
        sums[0, index].add_(g.sum(0))
        sums[1, index].add_(torch.mul(g, given, out=wide).sum(0))
        start = 0
        for segment in into:
            own = slice(start, start + segment.shape[2])
            segment[tile].addcmul_(g[:, own], factor[own])
            start = own.stop

    each_tile(segments, work)
    return weight_gradients.sum(0), *by_row(sums, scale)


@affine_act_linear_backward.register_fake
def _(
    segments: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    slope: float,
    gradient: Tensor,
    into: Sequence[Tensor],
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
    _write_activated(out, rows, scale, shift, slope)
    return out


@affine_act.register_fake
def _(rows: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@torch.library.custom_op("effseg::affine_act_", mutates_args=("rows",))
def affine_act_(rows: Tensor, scale: Tensor, shift: Tensor, slope: float) -> None:
    """Set rows to act(scale * rows + shift) in place."""
    _write_activated(rows, rows, scale, shift, slope)


@affine_act_.register_fake
def _(rows: Tensor, scale: Tensor, shift: Tensor, slope: float) -> None:
    return None


@torch.library.custom_op("effseg::activation_backward", mutates_args=("gradient",))
def activation_backward(
    gradient: Tensor, rows: Tensor, scale: Tensor, shift: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    """Turn the gradient of act(scale * rows + shift) into that before the activation, in place.

    Returns:
        The sums of g and of g * rows per channel and row of statistics.
    """
    dtype = scale.dtype
    gradient, rows = merged([gradient, rows], scale)
    sums = scale.new_zeros(2, len(strips_of([rows])), scale.shape[1])

    def work(index: int, tile: Tile) -> None:
        given = rows[tile].to(dtype)
        wide = activated(given, row_of(scale, tile), row_of(shift, tile), slope)
        target = gradient[tile]
        g = slope_of(wide, slope, target.to(dtype))
        if g.data_ptr() != target.data_ptr():
            target.copy_(g)
        sums[0, index].add_(g.sum(0))
        sums[1, index].add_(torch.mul(g, given, out=wide).sum(0))

    each_tile([rows], work)
    return by_row(sums, scale)


@activation_backward.register_fake
def _(
    gradient: Tensor, rows: Tensor, scale: Tensor, shift: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scale), torch.empty_like(scale)


def _joined(segments: Sequence[Tensor], tile: Tile) -> Tensor:
    """A tile of all segments side by side; a view where there is one."""
    if len(segments) == 1:
        return segments[0][tile]
    return torch.cat([segment[tile] for segment in segments], dim=1)


def _write_activated(out: Tensor, rows: Tensor, scale: Tensor, shift: Tensor, slope: float) -> None:
    out, rows = merged([out, rows], scale)

    def work(_: int, tile: Tile) -> None:
        given = rows[tile].to(scale.dtype)
        out[tile] = activated(given, row_of(scale, tile), row_of(shift, tile), slope)

    each_tile([rows], work)


def activated(tile: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    """act(scale * tile + shift), a new tensor in the accumulator's type, as the tile is."""
    wide = torch.addcmul(shift, tile, scale)
    return wide.relu_() if slope == 0 else torch.nn.functional.leaky_relu_(wide, slope)


def slope_of(after: Tensor, slope: float, gradient: Tensor) -> Tensor:
    """Turn a gradient into that before the activation, in place, from what came after it."""
    aten = torch.ops.aten
    if slope == 0:
        aten.threshold_backward.grad_input(gradient, after, 0, grad_input=gradient)
    else:
        aten.leaky_relu_backward.grad_input(gradient, after, slope, True, grad_input=gradient)
    return gradient
