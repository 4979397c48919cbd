"""Sums per class over a tile of voxels, and the gradient of its logits.

With p_c the probability of class c at a voxel and y the voxel's label, the sums of class c are, in
this order:

- intersection: of p_c over the voxels with y = c,
- predicted: of p_c over every voxel that is not ignored,
- reference: of 1 over the voxels with y = c,
- log_likelihood: of log p_c over the voxels with y = c,
- focal: of w (1 - p_c)^gamma log p_c over the voxels with y = c (Lin et al. 2017, "Focal loss for
  dense object detection"); for gamma 0 and w = 1 it is log_likelihood;

and where they are asked for

- squared: of p_c^2 over every voxel that is not ignored,
- rejected: of w p_c^gamma log(1 - p_c) over the other voxels with y != c,
- weighed: of w over the voxels with y = c.

The probabilities are a softmax over classes; or, one class against the rest, sigmoids. The weight w
of a voxel is 1, or grows by `edge_weight` towards the edge of a label.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PREDICTED = 1
N_SUMS = 5
"""Of those that are always there."""

CLOSEST = 255
"""Of a voxel at an edge, in the bytes that say how close a voxel is."""


@dataclass(frozen=True)
class Counting:
    """Which sums are taken, and of what.

    Attributes:
        ignore_label: voxels with this label count nowhere.
        focal_gamma: of `focal` and `rejected`, at least 0.
        one_vs_rest: sigmoids instead of a softmax; there is `rejected` then.
        squared: whether there is `squared`.
        edge_weight: what is added to the weight of a voxel at an edge; above 0 there is `weighed`.
    """

    ignore_label: int | None = None
    focal_gamma: float = 0.0
    one_vs_rest: bool = False
    squared: bool = False
    edge_weight: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sums, in their order."""
        more = {
            "squared": self.squared,
            "rejected": self.one_vs_rest,
            "weighed": self.edge_weight > 0,
        }
        always = ("intersection", "predicted", "reference", "log_likelihood", "focal")
        return (*always, *(name for name, wanted in more.items() if wanted))


def tile_sums(
    logits: Tensor, labels: Tensor, counting: Counting, closeness: Tensor | None = None
) -> Tensor:
    """The sums of some voxels of one sample, (sums, classes) in float64.

    Args:
        logits: (classes, voxels), float32 or float64.
        labels: (voxels,), any integer type.
        counting: which sums.
        closeness: of each voxel to an edge, (voxels,), 0 to `CLOSEST`; with an `edge_weight`.
    """
    probabilities, own, log_q = _probabilities(logits, labels, counting)
    p = own.log_p.exp()
    each = torch.ones_like(p)
    weight = _weights(closeness, counting, p.dtype)
    focal = _focal(own.log_p, own.log_q, counting.focal_gamma)
    rows = [p, torch.zeros_like(p), each, own.log_p, focal if weight is None else focal * weight]
    if weight is not None:
        rows.append(weight)
    # tiles add up without drift, and counts stay exact, in float64
    values = torch.stack(rows).mul_(own.known).double()
    del rows
    n_classes = logits.shape[0]
    sums = values.new_zeros(len(values), n_classes)
    sums.scatter_add_(1, own.index.expand_as(values), values)
    sums[PREDICTED] = probabilities.sum(1)
    if len(counting.names) == N_SUMS:
        return sums
    found = dict(zip((*counting.names[:N_SUMS], "weighed"), sums.unbind(), strict=False))
    if log_q is not None:
        # (0 at p = 0 where gamma is 0 too, since log q is)
        others = log_q if counting.focal_gamma == 0 else _rejected(log_q, probabilities, counting)
        others = others.mul(own.counts).scatter_(0, own.index.unsqueeze(0), 0.0)
        found["rejected"] = (others if weight is None else others.mul_(weight)).sum(1).double()
    if counting.squared:
        found["squared"] = probabilities.square_().sum(1).double()
    return torch.stack([found[name] for name in counting.names])


def tile_gradient(
    logits: Tensor,
    labels: Tensor,
    slope: Tensor,
    counting: Counting,
    closeness: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits of some voxels of one sample.

    With s_c the slope on p_c, and t that on the voxel's own log p, which the other sums add up to,
    the chain through the softmax is dL/dz_c = p_c (s_c - sum_k p_k s_k - t) + [c = y] t. A sigmoid
    has dp/dz = p (1 - p) and d log p / dz = 1 - p, and no class sees another.

    Args:
        logits: as `tile_sums`.
        labels: as `tile_sums`.
        slope: of the loss on each of the sums, (sums, classes) in the logits' type; those of
            `reference` and `weighed` are not used.
        counting: as `tile_sums`.
        closeness: as `tile_sums`.

    Returns:
        (classes, voxels), in the logits' type; zero on ignored voxels.
    """
    probabilities, own, log_q = _probabilities(logits, labels, counting)
    del logits  # the memory of a tile that nobody else holds
    weight = _weights(closeness, counting, slope.dtype)
    t, _, _, on_log_likelihood, on_focal = slope[:N_SUMS].index_select(1, own.index).unbind()
    t.mul_(own.log_p.exp()).add_(on_log_likelihood)
    if counting.focal_gamma > 0:
        on_focal.mul_(_focal_slope(own.log_p, own.log_q, counting.focal_gamma))
    t.add_(on_focal if weight is None else on_focal.mul_(weight)).mul_(own.known)
    more = dict(zip(counting.names[N_SUMS:], slope[N_SUMS:].unbind(), strict=True))
    per_p = slope[PREDICTED].unsqueeze(1)
    if counting.squared:
        per_p = probabilities * (2 * more["squared"]).unsqueeze(1) + per_p
    gradient = probabilities * per_p
    if log_q is None:
        gradient.addcmul_(probabilities, gradient.sum(0).add_(t), value=-1)
        return gradient.scatter_add_(0, own.index.unsqueeze(0), t.unsqueeze(0))
    q = log_q.exp()
    gradient.mul_(q)
    others = _rejected_slope(log_q, probabilities, q, counting.focal_gamma)
    others.mul_(own.counts).mul_(more["rejected"].unsqueeze(1))
    if weight is not None:
        others.mul_(weight)
    gradient.add_(others.scatter_(0, own.index.unsqueeze(0), 0.0))
    t.mul_(q.gather(0, own.index.unsqueeze(0)).squeeze(0))
    return gradient.scatter_add_(0, own.index.unsqueeze(0), t.unsqueeze(0))


@dataclass(frozen=True)
class _Own:
    """What each voxel's own label says, (voxels,) each.

    Attributes:
        index: the label, 0 where that is no class.
        known: whether it is a class.
        counts: whether it is not ignored; True where nothing is.
        log_p: of that class.
        log_q: log(1 - p) of it, where that is at hand.
    """

    index: Tensor
    known: Tensor
    counts: Tensor | bool
    log_p: Tensor
    log_q: Tensor | None


def _probabilities(
    logits: Tensor, labels: Tensor, counting: Counting
) -> tuple[Tensor, _Own, Tensor | None]:
    """Probabilities, zero on ignored voxels; a voxel's own; log(1 - p) of sigmoids."""
    index = labels.to(torch.int64, copy=True)
    known = (index >= 0) & (index < logits.shape[0])
    counts = True if counting.ignore_label is None else index != counting.ignore_label
    index.mul_(known)
    at = index.unsqueeze(0)
    lowest = torch.finfo(logits.dtype).min
    log_q = None
    if counting.one_vs_rest:
        probabilities = torch.sigmoid(logits)
        log_q = logsigmoid(-logits).clamp_(min=lowest)
        log_p = logsigmoid(logits.gather(0, at)).squeeze(0)
    else:
        log_p = logits.gather(0, at).squeeze(0).sub_(logits.amax(0))
        probabilities = torch.softmax(logits, 0)
        # the largest of them is 1 over the sum of exp(logit - largest logit)
        log_p.add_(probabilities.amax(0).log_())
    # a logit of -inf (a class ruled out) must not become -inf x 0 in a sum
    log_p.clamp_(min=lowest)
    if not isinstance(counts, bool):
        probabilities.mul_(counts)
    own_log_q = None if log_q is None else log_q.gather(0, at).squeeze(0)
    return probabilities, _Own(index, known, counts, log_p, own_log_q), log_q


def _weights(closeness: Tensor | None, counting: Counting, dtype: torch.dtype) -> Tensor | None:
    """Of each voxel; None where all are 1."""
    if closeness is None or counting.edge_weight == 0:
        return None
    return closeness.to(dtype).mul_(counting.edge_weight / CLOSEST).add_(1.0)


def _focal(log_p: Tensor, log_q: Tensor | None, gamma: float) -> Tensor:
    """(1 - p)^gamma log p."""
    if gamma == 0:
        return log_p
    if log_q is not None:
        return log_q.mul(gamma).exp_().mul_(log_p)
    return log_p.expm1().neg_().pow_(gamma).mul_(log_p)


def _focal_slope(log_p: Tensor, log_q: Tensor | None, gamma: float) -> Tensor:
    """Of `_focal` on log p: (1 - p)^gamma (1 - gamma p log p / (1 - p)), gamma above 0."""
    rest = log_p.expm1().neg_() if log_q is None else log_q.exp()
    # log p / (1 - p) tends to -1 where p does to 1
    ratio = torch.where(rest > 0, log_p / rest, -1.0)
    return rest.pow_(gamma).mul_(1 - gamma * log_p.exp() * ratio)


def _rejected(log_q: Tensor, probabilities: Tensor, counting: Counting) -> Tensor:
    """p^gamma log(1 - p)."""
    return probabilities.pow(counting.focal_gamma).mul_(log_q)


def _rejected_slope(log_q: Tensor, p: Tensor, q: Tensor, gamma: float) -> Tensor:
    """Of p^gamma log q on the logit: p^gamma (gamma q log q - p)."""
    if gamma == 0:
        return p.neg()
    return (log_q * q).mul_(gamma).sub_(p).mul_(p.pow(gamma))
