"""Norm layers by name, and what one does to its channels in this step."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from effseg.kernels.norm import moments
from effseg.kernels.shortcut import call

Norm = Literal["batch", "instance"]
NormLayer = nn.BatchNorm2d | nn.BatchNorm3d | nn.InstanceNorm2d | nn.InstanceNorm3d

NORMS: dict[tuple[str, int], type[NormLayer]] = {
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
}


def build_norm(kind: Norm, n_channels: int, spatial_dims: int) -> NormLayer:
    """A batch norm, or an instance norm with gain and bias."""
    return NORMS[kind, spatial_dims](n_channels, affine=True)


class NormState(NamedTuple):
    """What a norm does to its channels in this step.

    Attributes:
        mean: (rows, channels): one row for the batch, or one a sample.
        rstd: 1 / sqrt(variance + eps), (rows, channels).
        n_values: values behind each row, where the statistics come from the features themselves;
            None where they are fixed (batch norm in eval mode) and count as constants.
    """

    mean: Tensor
    rstd: Tensor
    n_values: int | None

    def affine(self, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The norm folded into scale and shift, each (rows, channels)."""
        scale = self.rstd * gain.to(self.rstd.dtype)
        return scale, bias.to(self.rstd.dtype) - self.mean * scale

    def first(self, n_channels: int) -> "NormState":
        """The state of the first channels."""
        return NormState(self.mean[:, :n_channels], self.rstd[:, :n_channels], self.n_values)

    def gain_gradient(self, sum_g: Tensor, sum_gx: Tensor) -> Tensor:
        """The gain's gradient for each row of statistics, (rows, channels)."""
        return self.rstd * (sum_gx - self.mean * sum_g)


def fixed_statistics(norm: NormLayer) -> bool:
    """Whether a norm uses running statistics rather than those of its input."""
    return not norm.training and bool(norm.track_running_stats)


def measured_state(rows: Tensor, *, over_batch: bool, eps: float) -> tuple[NormState, Tensor]:
    """The state that the features' own statistics give, and their biased variance."""
    mean, variance = call(moments, rows, over_batch)
    n_values = rows.shape[1] * (rows.shape[0] if over_batch else 1)
    return NormState(mean, torch.rsqrt(variance + eps), n_values), variance


def running_state(norm: NormLayer, dtype: torch.dtype) -> NormState:
    """The state that a batch norm's running statistics give."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    rstd = torch.rsqrt(variance.to(dtype) + norm.eps)
    return NormState(mean.to(dtype).unsqueeze(0), rstd.unsqueeze(0), None)


@torch.no_grad()
def update_running(norm: NormLayer, mean: Tensor, variance: Tensor, n_values: int) -> None:
    """Move a training batch norm's running statistics towards the batch's, once a step.

    Args:
        norm: nothing happens unless it trains and tracks statistics.
        mean: (1, channels).
        variance: biased, (1, channels).
        n_values: behind each; the running variance is the unbiased one, as torch keeps it.
    """
    if not (norm.training and norm.track_running_stats):
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    unbiased = variance[0] * (n_values / max(n_values - 1, 1))
    norm.running_mean.lerp_(mean[0].to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)
