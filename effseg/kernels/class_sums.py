"""A head whose logits are made a tile at a time, and only their sums per class are kept.

`class_tiles` has the sums. `head_sums` and `head_sums_backward` are one operator each: they make
the logits of a tile, read them while they lie in the cache, and drop them, so neither logits nor
probabilities nor one-hot labels exist in full. What is allocated inside is one tile a thread.

Where torch is told to be deterministic every step is, on CUDA too.
"""

import torch
from torch import Tensor

from effseg.kernels.class_tiles import N_SUMS, Counting, tile_gradient, tile_sums
from effseg.kernels.pointwise import activated, slope_of
from effseg.kernels.tiles import Tile, accumulator_dtype, by_row, each_tile, row_of, strips_of

TILE_BYTES = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Of a tile's logits, or of its features where they are wider: a core's cache holds both, and what
is made of them."""

UNUSUAL = 8
"""How many times smaller a tile is on a card for sums that have no kernel there, and so are always
taken by torch's operators, with up to eight tiles of temporaries."""


@torch.library.custom_op("effseg::head_sums", mutates_args=())
def head_sums(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: float,
    labels: Tensor,
    ignore_label: int | None,
    focal_gamma: float,
    one_vs_rest: bool = False,
    squared: bool = False,
    edge_weight: float = 0.0,
    closeness: Tensor | None = None,
) -> Tensor:
    """Return the sums of the logits act(scale * rows + shift) @ weight.T + bias.

    Args:
        rows: (batch, voxels, channels), in any memory layout.
        weight: (classes, channels), in the rows' type.
        bias: (classes,), in the rows' type; None: none.
        scale: (1 or batch, channels), as is shift, in the accumulator's type; None for both: the
            rows are read as they are.
        shift: see scale.
        slope: of the activation below zero; not used without scale.
        labels: (batch, voxels).
        ignore_label: as `Counting` has it, as all up to the last.
        focal_gamma: see ignore_label.
        one_vs_rest: see ignore_label.
        squared: see ignore_label.
        edge_weight: see ignore_label.
        closeness: to an edge, (batch, voxels), as `tile_sums` takes it.

    Returns:
        (batch, sums, classes), in float64.
    """
    counting = Counting(ignore_label, focal_gamma, one_vs_rest, squared, edge_weight)
    length = class_tile_length(rows, weight.shape[0], usual=len(counting.names) == N_SUMS)
    n_strips = len(strips_of([rows], length=length))
    shape = (n_strips, len(counting.names), weight.shape[0])
    sums = torch.zeros(shape, dtype=torch.float64, device=rows.device)

    def work(index: int, tile: Tile) -> None:
        features = rows[tile]
        if scale is not None and shift is not None:
            given = features.to(scale.dtype)
            wide = activated(given, row_of(scale, tile), row_of(shift, tile), slope)
            features = wide.to(rows.dtype)
        sums[index] += tile_sums(
            _logits(features, weight, bias),
            labels[tile],
            counting,
            None if closeness is None else closeness[tile],
        )

    with torch.autocast(rows.device.type, enabled=False):
        each_tile([rows], work, length=length)
    return sums.view(rows.shape[0], -1, *shape[1:]).sum(1)


@head_sums.register_fake
def _(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: float,
    labels: Tensor,
    ignore_label: int | None,
    focal_gamma: float,
    one_vs_rest: bool = False,
    squared: bool = False,
    edge_weight: float = 0.0,
    closeness: Tensor | None = None,
) -> Tensor:
    del bias, scale, shift, slope, labels, closeness
    counting = Counting(ignore_label, focal_gamma, one_vs_rest, squared, edge_weight)
    shape = (rows.shape[0], len(counting.names), weight.shape[0])
    return rows.new_empty(shape, dtype=torch.float64)


@torch.library.custom_op("effseg::head_sums_backward", mutates_args=())
def head_sums_backward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: float,
    labels: Tensor,
    ignore_label: int | None,
    focal_gamma: float,
    gradient: Tensor,
    one_vs_rest: bool = False,
    squared: bool = False,
    edge_weight: float = 0.0,
    closeness: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of `head_sums`.

    Args:
        rows: as forward, as are all others but the gradient.
        weight: see forward.
        bias: see forward.
        scale: see forward.
        shift: see forward.
        slope: see forward.
        labels: see forward.
        ignore_label: see forward.
        focal_gamma: see forward.
        gradient: of the sums, (batch, sums, classes).
        one_vs_rest: see forward.
        squared: see forward.
        edge_weight: see forward.
        closeness: see forward.

    Returns:
        The gradients of rows, weight, bias, scale and shift; all but the first in the accumulator's
        type, those of scale and shift empty where there is none. Statistics count as constants:
        `norm.deferred_terms` has the rest.
    """
    counting = Counting(ignore_label, focal_gamma, one_vs_rest, squared, edge_weight)
    dtype = accumulator_dtype(rows.dtype)
    slopes = gradient.to(dtype)
    length = class_tile_length(rows, weight.shape[0], usual=len(counting.names) == N_SUMS)
    n_strips = len(strips_of([rows], length=length))
    into = torch.empty_like(rows)
    weight_gradient = weight.new_zeros((n_strips, *weight.shape), dtype=dtype)
    bias_gradient = weight.new_zeros((n_strips, weight.shape[0]), dtype=dtype)
    n_norm = (0,) if scale is None else scale.shape[1:]
    norm_gradient = weight.new_zeros((2, n_strips, *n_norm), dtype=dtype)

    def work(index: int, tile: Tile) -> None:
        given = features = rows[tile]
        factor = wide = None
        if scale is not None and shift is not None:
            given, factor = given.to(dtype), row_of(scale, tile)
            wide = activated(given, factor, row_of(shift, tile), slope)
            features = wide.to(rows.dtype)
        g = tile_gradient(
            _logits(features, weight, bias),
            labels[tile],
            slopes[tile[0]],
            counting,
            None if closeness is None else closeness[tile],
        )
        bias_gradient[index] += g.sum(1)
        g = g.to(rows.dtype)
        weight_gradient[index] += torch.mm(g, features)
        back = torch.mm(g.t(), weight)
        if factor is not None and wide is not None:
            back = slope_of(wide, slope, back.to(dtype))
            norm_gradient[0, index] += torch.mul(back, given, out=wide).sum(0)
            norm_gradient[1, index] += back.sum(0)
            back.mul_(factor)
        into[tile] = back

    with torch.autocast(rows.device.type, enabled=False):
        each_tile([rows], work, length=length)
    if scale is None:
        of_scale, of_shift = (weight.new_empty((0, 0), dtype=dtype) for _ in range(2))
    else:
        of_scale, of_shift = by_row(norm_gradient, scale)
    return into, weight_gradient.sum(0), bias_gradient.sum(0), of_scale, of_shift


@head_sums_backward.register_fake
def head_gradients_like(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the shapes and types of a head's gradients: rows, weight, bias, scale and shift."""
    del bias
    dtype = accumulator_dtype(rows.dtype)
    n_norm = (0, 0) if scale is None else scale.shape
    return (
        torch.empty_like(rows),
        weight.new_empty(weight.shape, dtype=dtype),
        weight.new_empty(weight.shape[:1], dtype=dtype),
        weight.new_empty(n_norm, dtype=dtype),
        weight.new_empty(n_norm, dtype=dtype),
    )


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(classes, voxels) of (voxels, channels), in the accumulator's type."""
    right = features.t()
    if bias is None:
        logits = torch.mm(weight, right)
    else:
        logits = torch.addmm(bias.unsqueeze(1), weight, right)
    return logits.to(accumulator_dtype(features.dtype))


def class_tile_length(rows: Tensor, n_classes: int, *, usual: bool = True) -> int:
    """How many voxels: the wider of a tile's logits and features fills `TILE_BYTES` in float32.

    Args:
        rows: the features.
        n_classes: of the logits.
        usual: whether the sums are those that have a kernel on a card.
    """
    on_cpu = rows.device.type == "cpu"
    budget = TILE_BYTES["cpu" if on_cpu else "cuda"] // (1 if usual or on_cpu else UNUSUAL)
    return max(64, budget // (4 * max(n_classes, rows.shape[2])) // 64 * 64)
