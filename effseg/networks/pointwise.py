"""Norm, activation and 1x1 convolution as one layer: what stands between dense blocks.

`NormActConv` reads wide features and writes few: a transition, a skip, a head. In "shared" memory
it keeps nothing but its input and two numbers a channel. What it reads may come in segments, as if
concatenated; they are never copied together.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effseg.kernels import refuse_second_derivative
from effseg.kernels.norm import affine_combine, deferred_terms
from effseg.kernels.pointwise import affine_act_linear, affine_act_linear_backward
from effseg.kernels.shortcut import call
from effseg.kernels.tiles import accumulator_dtype, channels_last, from_rows, to_rows
from effseg.memory.recompute import recompute
from effseg.networks.norm import (
    Norm,
    NormState,
    build_norm,
    fixed_statistics,
    measured_state,
    running_state,
    update_running,
)
from effseg.types import Features

Act = Literal["relu", "leaky_relu"]
MemoryMode = Literal["shared", "checkpoint", "plain"]

CONVS: dict[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
SLOPES: dict[str, float] = {"relu": 0.0, "leaky_relu": 0.01}


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


def segments_of(features: Features | Sequence[Features]) -> tuple[Tensor, ...]:
    """Features in segments; one tensor is one segment."""
    return (features,) if isinstance(features, Tensor) else tuple(features)


def concatenated(segments: Sequence[Tensor]) -> Tensor:
    """The segments side by side, in the type of the last."""
    if len(segments) == 1:
        return segments[0]
    return torch.cat([segment.to(segments[-1].dtype) for segment in segments], dim=1)


def checkpointed(module: nn.Module, *segments: Tensor) -> Tensor:
    """Run a module's plain forward and recompute it in backward."""
    forward = module.plain_forward
    assert callable(forward)
    result: Tensor = recompute(module, forward, *segments)
    return result


SECOND_DERIVATIVE = ('memory="shared"', 'build the network with memory="plain"')
"""What has none, and the way to one."""


class _SharedNormActConv(torch.autograd.Function):
    """The layer as one function of gain, bias, weight and segments: it saves its arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        state: NormState,
        slope: float,
        gain: Tensor,
        bias: Tensor,
        weight: Tensor,
        *segments: Tensor,
    ) -> Tensor:
        dtype = segments[0].dtype
        with torch.autocast(weight.device.type, enabled=False):
            out = call(
                affine_act_linear,
                [to_rows(segment) for segment in segments],
                *state.affine(gain, bias),
                weight.flatten(1).to(dtype),
                slope,
            )
        ctx.save_for_backward(gain, bias, weight, state.mean, state.rstd, *segments)
        ctx.n_values, ctx.slope = state.n_values, slope
        return from_rows(out, segments[0].shape[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(*SECOND_DERIVATIVE)
        gain, bias, weight, mean, rstd, *segments = ctx.saved_tensors
        state = NormState(mean, rstd, ctx.n_values)
        rows = [to_rows(segment) for segment in segments]
        into = [torch.zeros_like(segment) for segment in segments]
        weight_gradient, sum_g, sum_gx = call(
            affine_act_linear_backward,
            rows,
            *state.affine(gain, bias),
            weight.flatten(1).to(rows[0].dtype),
            ctx.slope,
            to_rows(channels_last(gradient, rows[0].dtype)),
            [to_rows(part) for part in into],
        )
        gain_gradient = state.gain_gradient(sum_g, sum_gx)
        if ctx.n_values is not None:
            wide = gain.to(rstd.dtype)
            terms = deferred_terms(wide * sum_g, wide * gain_gradient, mean, rstd, ctx.n_values)
            start = 0
            for part, given in zip(into, rows, strict=True):
                own = slice(start, start + part.shape[1])
                slope, offset = (term[:, own] for term in terms)
                call(affine_combine, to_rows(part), torch.ones_like(slope), given, slope, offset)
                start = own.stop
        return (
            None,
            None,
            gain_gradient.sum(0).to(gain.dtype),
            sum_g.sum(0).to(bias.dtype),
            weight_gradient.view_as(weight).to(weight.dtype),
            *into,
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

    def forward(self, features: Features | Sequence[Features]) -> Features:
        """Run the layer; with "shared" the result lies in channels-last memory.

        Args:
            features: (N, in, *S), or segments of it along the channels.
        """
        segments = segments_of(features)
        if self.memory == "shared":
            return self._shared(segments)
        if self.memory == "checkpoint" and torch.is_grad_enabled():
            return checkpointed(self, *segments)
        return self.plain_forward(*segments)

    def plain_forward(self, *segments: Tensor) -> Tensor:
        """The layer in torch's own operators, concatenation included."""
        result: Tensor = self.conv(activate(self.norm(concatenated(segments)), self.slope))
        return result

    def _shared(self, segments: tuple[Tensor, ...]) -> Tensor:
        dtype = compute_dtype(segments[0])
        segments = tuple(channels_last(segment, dtype) for segment in segments)
        state = self.state(segments)
        result: Tensor = _SharedNormActConv.apply(  # type: ignore[no-untyped-call]
            state, self.slope, self.norm.weight, self.norm.bias, self.conv.weight, *segments
        )
        if self.conv.bias is not None:
            result = result + self.conv.bias.to(dtype).view(-1, *(1,) * (result.ndim - 2))
        return result

    @torch.no_grad()
    def state(self, segments: Sequence[Tensor]) -> NormState:
        """The norm's state for features in the type to compute in; running statistics move."""
        if fixed_statistics(self.norm):
            return running_state(self.norm, accumulator_dtype(segments[0].dtype))
        measured = [
            measured_state(to_rows(segment), over_batch=self.over_batch, eps=self.norm.eps)
            for segment in segments
        ]
        states, variances = zip(*measured, strict=True)
        n_values = states[0].n_values
        mean = torch.cat([state.mean for state in states], dim=1)
        rstd = torch.cat([state.rstd for state in states], dim=1)
        update_running(self.norm, mean, torch.cat(variances, dim=1), n_values)
        return NormState(mean, rstd, n_values)
