"""Sums per class over a tile of voxels, and the head whose logits they are taken from.

With p the softmax over classes and y the label of a voxel, the sums of class c are, in this order:

- intersection: of p_c over the voxels with y = c,
- predicted: of p_c over every voxel that is not ignored,
- reference: of 1 over the voxels with y = c,
- log_likelihood: of log p_c over the voxels with y = c,
- focal: of (1 - p_c)^gamma log p_c over the voxels with y = c (Lin et al. 2017, "Focal loss for
  dense object detection"); for gamma 0 it is log_likelihood.

`tile_sums` and `tile_gradient` work on logits that exist. `head_sums` and `head_sums_backward` are
one operator each: they make the logits of a tile, read them while they lie in the cache, and drop
them, so neither logits nor probabilities nor one-hot labels exist in full. What is allocated inside
is one tile a thread.

Where torch is told to be deterministic every step is, on CUDA too.
"""

import torch
from torch import Tensor

from effseg.kernels.pointwise import activated, slope_of
from effseg.kernels.tiles import Tile, accumulator_dtype, by_row, each_tile, row_of, strips_of

N_SUMS = 5
PREDICTED = 1

TILE_BYTES = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Of a tile's logits, or of its features where they are wider: a core's cache holds both, and what
is made of them."""


def tile_sums(
    logits: Tensor, labels: Tensor, *, ignore_label: int | None, focal_gamma: float
) -> Tensor:
    """The sums of some voxels of one sample, (5, classes) in float64.

    Args:
        logits: (classes, voxels), float32 or float64.
        labels: (voxels,), any integer type.
        ignore_label: voxels with this label count nowhere.
        focal_gamma: of the fifth sum, at least 0.
    """
    probabilities, index, known, log_p = _softmax(logits, labels, ignore_label)
    p = log_p.exp()
    values = torch.stack(
        (p, torch.zeros_like(p), torch.ones_like(p), log_p, _focal(log_p, focal_gamma))
    )
    # tiles add up without drift, and counts stay exact, in float64
    values = values.mul_(known).double()
    sums = values.new_zeros(N_SUMS, logits.shape[0])
    sums.scatter_add_(1, index.expand_as(values), values)
    sums[PREDICTED] = probabilities.sum(1)
    return sums


def tile_gradient(
    logits: Tensor, labels: Tensor, slope: Tensor, *, ignore_label: int | None, focal_gamma: float
) -> Tensor:
    """The gradient of the logits of some voxels of one sample.

    With P the slope on `predicted` and t that on the voxel's own log p, which the other sums add up
    to, the chain through the softmax is dL/dz_c = p_c (P_c - sum_k p_k P_k - t) + [c = y] t.

    Args:
        logits: as `tile_sums`.
        labels: as `tile_sums`.
        slope: of the loss on each of the sums, (5, classes) in the logits' type; that of
            `reference` is not used.
        ignore_label: as `tile_sums`.
        focal_gamma: as `tile_sums`.

    Returns:
        (classes, voxels), in the logits' type; zero on ignored voxels.
    """
    probabilities, index, known, log_p = _softmax(logits, labels, ignore_label)
    del logits  # the memory of a tile that nobody else holds
    intersection, _, _, log_likelihood, focal = slope.index_select(1, index).unbind()
    own = intersection * log_p.exp() + log_likelihood
    own.add_(focal.mul(_focal_slope(log_p, focal_gamma))).mul_(known)
    gradient = probabilities * slope[PREDICTED].unsqueeze(1)
    gradient.addcmul_(probabilities, gradient.sum(0).add_(own), value=-1)
    return gradient.scatter_add_(0, index.unsqueeze(0), own.unsqueeze(0))


def _softmax(
    logits: Tensor, labels: Tensor, ignore_label: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, zero on ignored voxels, and what a voxel's own label says.

    Returns:
        Probabilities; and of each voxel its label, 0 where that is no class; whether it is one; and
        log p of it.
    """
    index = labels.to(torch.int64, copy=True)
    known = (index >= 0) & (index < logits.shape[0])
    ignored = None if ignore_label is None else index == ignore_label
    index.mul_(known)
    log_p = logits.gather(0, index.unsqueeze(0)).squeeze(0).sub_(logits.amax(0))
    probabilities = torch.softmax(logits, 0)
    # the largest of them is 1 over the sum of exp(logit - largest logit)
    log_p.add_(probabilities.amax(0).log_())
    # a logit of -inf (a class ruled out) must not become -inf x 0 in a sum
    log_p.clamp_(min=torch.finfo(log_p.dtype).min)
    if ignored is not None:
        probabilities.mul_(~ignored)
    return probabilities, index, known, log_p


def _focal(log_p: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma log p."""
    return log_p if gamma == 0 else log_p.expm1().neg_().pow_(gamma).mul_(log_p)


def _focal_slope(log_p: Tensor, gamma: float) -> Tensor:
    """Of `_focal` on log p: (1 - p)^gamma (1 - gamma p log p / (1 - p))."""
    if gamma == 0:
        return torch.ones_like(log_p)
    rest = log_p.expm1().neg_()
    # log p / (1 - p) tends to -1 where p does to 1
    ratio = torch.where(rest > 0, log_p / rest, -1.0)
    return rest.pow_(gamma).mul_(1 - gamma * log_p.exp() * ratio)


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
        ignore_label: as `tile_sums`.
        focal_gamma: as `tile_sums`.

    Returns:
        (batch, 5, classes), in float64.
    """
    length = class_tile_length(rows, weight.shape[0])
    n_strips = len(strips_of([rows], length=length))
    shape = (n_strips, N_SUMS, weight.shape[0])
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
            ignore_label=ignore_label,
            focal_gamma=focal_gamma,
        )

    with torch.autocast(rows.device.type, enabled=False):
        each_tile([rows], work, length=length)
    return sums.view(rows.shape[0], -1, *shape[1:]).sum(1)


@head_sums.register_fake
def _(rows: Tensor, weight: Tensor, *_: object) -> Tensor:
    return rows.new_empty((rows.shape[0], N_SUMS, weight.shape[0]), dtype=torch.float64)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of `head_sums`.

    Args:
        rows: as forward, as are all others but the last.
        weight: see forward.
        bias: see forward.
        scale: see forward.
        shift: see forward.
        slope: see forward.
        labels: see forward.
        ignore_label: see forward.
        focal_gamma: see forward.
        gradient: of the sums, (batch, 5, classes).

    Returns:
        The gradients of rows, weight, bias, scale and shift; all but the first in the accumulator's
        type, those of scale and shift empty where there is none. Statistics count as constants:
        `norm.deferred_terms` has the rest.
    """
    dtype = accumulator_dtype(rows.dtype)
    slopes = gradient.to(dtype)
    length = class_tile_length(rows, weight.shape[0])
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
            ignore_label=ignore_label,
            focal_gamma=focal_gamma,
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
def _(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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


def class_tile_length(rows: Tensor, n_classes: int) -> int:
    """How many voxels: the wider of a tile's logits and features fills `TILE_BYTES` in float32."""
    budget = TILE_BYTES["cpu" if rows.device.type == "cpu" else "cuda"]
    return max(64, budget // (4 * max(n_classes, rows.shape[2])) // 64 * 64)
