"""How close each voxel lies to the edge of a label, in one byte a voxel.

An edge is where two neighbours along an axis have different labels, neither of them ignored; both
lie at it. With d the distance to the nearest voxel at an edge, closeness is 255 exp(-d^2 / (2
sigma^2)). A Gaussian is a product over the axes, so the nearest voxel is found axis by axis, as the
largest product; beyond three sigma along an axis there is none.

Two passes, `edges_in_planes` and `edges_across`, take a byte a voxel each, and float32 for a few
planes at a time.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effseg.kernels.class_tiles import CLOSEST

PLANES_BYTES = 1 << 21
"""Of the planes under way, in float32."""
REACH = 3.0
"""In sigma."""


def edge_closeness(labels: Tensor, *, ignore_label: int | None, sigmas: Sequence[float]) -> Tensor:
    """Of each voxel, (batch, *space) in uint8; 255 at an edge.

    Args:
        labels: (batch, *space), any integer type.
        ignore_label: makes no edge.
        sigmas: along each axis, in voxels, above 0.
    """
    flat: Tensor = edges_in_planes(labels, ignore_label, list(sigmas))
    closeness: Tensor = edges_across(flat, sigmas[0])
    return closeness


@torch.library.custom_op("effseg::edges_in_planes", mutates_args=())
def edges_in_planes(labels: Tensor, ignore_label: int | None, sigmas: list[float]) -> Tensor:
    """Return the closeness to edges of the same plane; planes are those along the first axis."""
    closeness = torch.empty_like(labels, dtype=torch.uint8)
    n_planes = labels.shape[1]
    for start, stop in _runs(labels):
        first, last = max(0, start - 1), min(n_planes, stop + 1)
        edges = _edges(labels[:, first:last], ignore_label)[:, start - first : stop - first]
        near = edges.to(torch.float32)
        for axis, sigma in enumerate(sigmas[1:], start=2):
            near = _spread(near, axis, sigma)
        closeness[:, start:stop] = near.mul_(CLOSEST).round_()
    return closeness


@torch.library.custom_op("effseg::edges_across", mutates_args=())
def edges_across(in_planes: Tensor, sigma: float) -> Tensor:
    """Return the closeness to edges of all planes, of that to edges of the same."""
    closeness = torch.empty_like(in_planes)
    n_planes, reach = in_planes.shape[1], math.ceil(REACH * sigma)
    for start, stop in _runs(in_planes):
        first, last = max(0, start - reach), min(n_planes, stop + reach)
        near = _spread(in_planes[:, first:last].to(torch.float32), 1, sigma)
        closeness[:, start:stop] = near[:, start - first : stop - first].round_()
    return closeness


@edges_in_planes.register_fake
def _(labels: Tensor, *_: object) -> Tensor:
    return torch.empty_like(labels, dtype=torch.uint8)


@edges_across.register_fake
def _(in_planes: Tensor, *_: object) -> Tensor:
    return torch.empty_like(in_planes)


def _runs(labels: Tensor) -> list[tuple[int, int]]:
    """From which plane to which, of all samples."""
    n_planes = labels.shape[1]
    of_plane = 4 * labels[:, 0].numel()
    step = max(1, PLANES_BYTES // of_plane)
    return [(start, min(start + step, n_planes)) for start in range(0, n_planes, step)]


def _edges(labels: Tensor, ignore_label: int | None) -> Tensor:
    """Which voxels have a neighbour of another label."""
    found = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    for axis in range(1, labels.ndim):
        n = labels.shape[axis]
        if n < 2:
            continue
        one, other = labels.narrow(axis, 0, n - 1), labels.narrow(axis, 1, n - 1)
        differ = one != other
        if ignore_label is not None:
            differ &= (one != ignore_label) & (other != ignore_label)
        found.narrow(axis, 0, n - 1).logical_or_(differ)
        found.narrow(axis, 1, n - 1).logical_or_(differ)
    return found


def _spread(near: Tensor, axis: int, sigma: float) -> Tensor:
    """The largest product of a neighbour along an axis and the Gaussian of its distance."""
    n, best = near.shape[axis], near.clone()
    for distance in range(1, min(n - 1, math.ceil(REACH * sigma)) + 1):
        faded = near * math.exp(-(distance**2) / (2 * sigma**2))
        for here, there in ((0, distance), (distance, 0)):
            part = best.narrow(axis, here, n - distance)
            torch.maximum(part, faded.narrow(axis, there, n - distance), out=part)
    return best
