"""Norm, activation and 1x1 convolution as one layer: what stands between dense blocks.

`NormActConv` reads wide features and writes few: the bottleneck of a dense layer, a transition, a
skip, a head. In "shared" memory it keeps nothing but its input and two numbers a channel.
"""

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effseg.kernels import tiles
from effseg.types import Features

Norm = Literal["batch", "instance"]
Act = Literal["relu", "leaky_relu"]
MemoryMode = Literal["shared", "checkpoint", "plain"]

NormLayer = nn.BatchNorm2d | nn.BatchNorm3d | nn.InstanceNorm2d | nn.InstanceNorm3d

NORMS: dict[tuple[str, int], type[NormLayer]] = {
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
}
TRACKING = (nn.BatchNorm2d, nn.BatchNorm3d)
CONVS: dict[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
SLOPES: dict[str, float] = {"relu": 0.0, "leaky_relu": 0.01}


def build_norm(kind: Norm, n_channels: int, spatial_dims: int) -> NormLayer:
    """A batch norm, or an instance norm with gain and bias."""
    return NORMS[kind, spatial_dims](n_channels, affine=True)


def activate(features: Tensor, slope: float) -> Tensor:
    """ReLU where the slope below zero is 0, else leaky ReLU."""
    if slope == 0:
        return torch.nn.functional.relu(features)
    return torch.nn.functional.leaky_relu(features, slope)


def compute_dtype(features: Tensor) -> torch.dtype:
    """The type to compute in: autocast's where it is on for this device, else the features'."""
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return features.dtype


def to_rows(features: Tensor) -> Tensor:
    """(batch, channels, *space) to (batch, voxels, channels); a view of channels-last features."""
    return features.movedim(1, -1).flatten(1, -2)


def from_rows(rows: Tensor, space: torch.Size) -> Tensor:
    """(batch, voxels, channels) to (batch, channels, *space) in channels-last memory; a view."""
    return rows.view(rows.shape[0], *space, rows.shape[2]).movedim(-1, 1)


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

    def narrow(self, n_channels: int) -> "NormState":
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
    mean, variance = tiles.moments(rows, over_batch)
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


def checkpointed(module: nn.Module, features: Tensor) -> Tensor:
    """Run a module and recompute it in backward; running statistics are updated once.

    torch's own checkpoint updates batch norm's statistics a second time when it recomputes.
    """
    norms = [part for part in module.modules() if isinstance(part, TRACKING)]
    result: Tensor = checkpoint(
        module.plain_forward,
        features,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), FrozenStatistics(norms)),
    )
    return result


class FrozenStatistics:
    """A context in which batch norms compute as before but leave their running statistics alone."""

    def __init__(self, norms: list[nn.BatchNorm2d | nn.BatchNorm3d]) -> None:
        self.norms = norms
        self.before: list[tuple[float | None, Tensor]] = []

    def __enter__(self) -> None:
        for norm in self.norms:
            assert norm.num_batches_tracked is not None
            self.before.append((norm.momentum, norm.num_batches_tracked.clone()))
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            assert norm.num_batches_tracked is not None
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
        self.before.clear()


def refuse_second_derivative() -> None:
    """Raise in a backward that is itself to be differentiated.

    torch's `once_differentiable` stays silent where the incoming gradient is a constant, and the
    second derivative would be wrong.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            'memory="shared" has no second derivative (create_graph=True); build the network with '
            'memory="plain" for it'
        )


class _SharedNormActConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        gain: Tensor,
        bias: Tensor,
        weight: Tensor,
        state: NormState,
        slope: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            rows = to_rows(features)
            matrix = weight.flatten(1).to(dtype)
            out = tiles.affine_act_linear(rows, *state.affine(gain, bias), matrix, slope)
        ctx.save_for_backward(features, gain, bias, weight, state.mean, state.rstd)
        ctx.n_values, ctx.slope = state.n_values, slope
        return from_rows(out, features.shape[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        features, gain, bias, weight, mean, rstd = ctx.saved_tensors
        state = NormState(mean, rstd, ctx.n_values)
        rows = to_rows(features)
        into = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        matrix = weight.flatten(1).to(rows.dtype)
        weight_gradient, sum_g, sum_gx = tiles.affine_act_linear_backward(
            rows,
            *state.affine(gain, bias),
            matrix,
            ctx.slope,
            to_rows(gradient).to(rows.dtype).contiguous(),
            into,
        )
        gain_gradient = state.gain_gradient(sum_g, sum_gx)
        if ctx.n_values is not None:
            wide = gain.to(rstd.dtype)
            terms = tiles.deferred_terms(
                wide * sum_g, wide * gain_gradient, mean, rstd, ctx.n_values
            )
            tiles.affine_combine(into, torch.ones_like(mean), rows, *terms)
        return (
            from_rows(into, features.shape[2:]),
            gain_gradient.sum(0).to(gain.dtype),
            sum_g.sum(0).to(bias.dtype),
            weight_gradient.view_as(weight).to(weight.dtype),
            None,
            None,
            None,
        )


class NormActConv(nn.Module):
    """Norm, activation, 1x1 convolution: (N, in, *S) -> (N, out, *S).

    The norm and the activation of the input never exist in full with `memory="shared"`; the
    three memory modes share one state dict (`norm`, `conv`) and give the same numbers.

    Args:
        in_channels: channels read.
        out_channels: channels written.
        norm: "batch" or "instance", over each channel.
        act: "relu" or "leaky_relu" (slope 0.01).
        bias: whether the convolution has one.
        memory: "shared" (nothing saved but the input), "checkpoint" (torch's recomputation) or
            "plain" (torch's autograd).
        spatial_dims: 2 or 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: Norm = "batch",
        act: Act = "relu",
        bias: bool = False,
        memory: MemoryMode = "shared",
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        self.norm = build_norm(norm, in_channels, spatial_dims)
        self.conv = CONVS[spatial_dims](in_channels, out_channels, 1, bias=bias)
        self.slope = SLOPES[act]
        self.over_batch = norm == "batch"
        self.memory = memory

    def forward(self, features: Features) -> Features:
        """Run the layer; with "shared" the result lies in channels-last memory."""
        if self.memory == "shared":
            return self._shared(features)
        if self.memory == "checkpoint" and torch.is_grad_enabled():
            return checkpointed(self, features)
        return self.plain_forward(features)

    def plain_forward(self, features: Tensor) -> Tensor:
        """The layer in torch's own operators."""
        result: Tensor = self.conv(activate(self.norm(features), self.slope))
        return result

    def _shared(self, features: Tensor) -> Tensor:
        dtype = compute_dtype(features)
        features = features.to(dtype)
        wide = tiles.accumulator_dtype(dtype)
        if fixed_statistics(self.norm):
            state = running_state(self.norm, wide)
        else:
            with torch.no_grad():
                state, variance = measured_state(
                    to_rows(features),
                    over_batch=self.over_batch,
                    eps=self.norm.eps,
                )
            if state.n_values is not None:
                update_running(self.norm, state.mean, variance, state.n_values)
        result: Tensor = _SharedNormActConv.apply(  # type: ignore[no-untyped-call]
            features, self.norm.weight, self.norm.bias, self.conv.weight, state, self.slope, dtype
        )
        if self.conv.bias is not None:
            result = result + self.conv.bias.to(dtype).view(-1, *(1,) * (result.ndim - 2))
        return result
