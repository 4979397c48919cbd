"""Heads whose logits the loss makes."""

from torch import nn

from effseg.errors import PlanError
from effseg.kernels import DeferredLogits, FoldedNorm
from effseg.kernels.tiles import to_rows
from effseg.networks.pointwise import NormActConv, compute_dtype
from effseg.types import Features


def defer_logits(head: NormActConv | nn.Conv2d | nn.Conv3d, features: Features) -> DeferredLogits:
    """What a head's logits are made of, for a loss to make them a tile at a time.

    Norm statistics are taken here, and running ones move, as in the head's own forward. Gradients
    reach features, norm and convolution through the loss.

    Args:
        head: to classes; a convolution alone, or with norm and activation before it.
        features: (N, C, *S).

    Raises:
        PlanError: for a convolution that reads more than its own voxel.
    """
    conv = head.conv if isinstance(head, NormActConv) else head
    if any(n != 1 for n in (*conv.kernel_size, *conv.stride, conv.groups)) or conv.padding not in (
        (0,) * len(conv.kernel_size),
        "valid",
    ):
        raise PlanError(
            f"{conv}; expected a 1x1 convolution of stride 1, without groups or padding"
        )
    dtype = compute_dtype(features)
    features = features.to(dtype)
    norm = None
    if isinstance(head, NormActConv):
        state = head.state((features,))
        scale, shift = state.affine(head.norm.weight, head.norm.bias)
        norm = FoldedNorm(
            scale=scale,
            shift=shift,
            mean=state.mean,
            rstd=state.rstd,
            n_values=state.n_values,
            slope=head.slope,
        )
    return DeferredLogits(
        rows=to_rows(features),
        weight=conv.weight.flatten(1).to(dtype),
        bias=None if conv.bias is None else conv.bias.to(dtype),
        norm=norm,
        space=tuple(features.shape[2:]),
    )
