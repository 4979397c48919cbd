"""A dense block's layers as one function that stores every feature once.

Norm over a concatenation is per channel, so the mean and the deviation of a feature are the same
for every later layer that reads it; only gain and bias differ. One buffer holds the block's
features side by side. Each layer writes its own in place, their statistics are taken once, and the
normalised input of a layer's 1x1 convolution exists only a tile at a time (`kernels`). Backward
recomputes norm, activation and the 1x1 convolution, never the spatial one; gradients add up in one
buffer, and the norm's own backward is applied once a channel, when its last reader is done.

With C channels in the end and m = bottleneck x growth rate, forward and backward take 2 C + 2 m
channels and a layer's own: the features, their gradient, and a layer's middle with its activation
or its gradient. Autograd takes sum(2 C_i + 2 m) + C over the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from effseg.kernels import refuse_second_derivative
from effseg.kernels.norm import affine_combine, deferred_terms
from effseg.kernels.ownership import sole_holders, writable
from effseg.kernels.pointwise import (
    activation_backward,
    affine_act,
    affine_act_,
    affine_act_linear,
    affine_act_linear_backward,
)
from effseg.kernels.shortcut import call
from effseg.kernels.tiles import CHANNELS_LAST, accumulator_dtype, from_rows, to_rows
from effseg.networks.norm import NormState, measured_state
from effseg.networks.pointwise import SECOND_DERIVATIVE


class LayerTensors(NamedTuple):
    """The parameters of one layer, in the order in which the function takes them."""

    gain1: Tensor
    bias1: Tensor
    weight1: Tensor
    gain2: Tensor
    bias2: Tensor
    weight2: Tensor


class Step(NamedTuple):
    """What the function needs to know beside tensors.

    Attributes:
        n_layers: how many.
        growth_rate: channels each adds.
        joined: the features come as one tensor and leave with the new ones behind them, in one
            buffer; else they stay where they are, in segments, and the new ones leave as one more.
        padding: of the spatial convolution.
        slope: of the activation below zero.
        eps: of the norms.
        over_batch: statistics over the batch, or one row a sample.
        fixed: of each layer, its two norms' running state in eval mode; else empty.
        masks: of each layer, (N, growth_rate), what dropout multiplies with; None: nothing.
        dtype: to compute in; the segments' own, where they are not joined.
    """

    n_layers: int
    growth_rate: int
    joined: bool
    padding: tuple[int, ...]
    slope: float
    eps: float
    over_batch: bool
    fixed: tuple[tuple[NormState, NormState], ...]
    masks: tuple[Tensor | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Wide:
    """All features of a block, or their gradients: what came in segments, and the block's own.

    All (N, channels, *space), channels-last.
    """

    outside: list[Tensor]
    own: Tensor

    def first(self, n_channels: int) -> list[Tensor]:
        """The first channels, in segments of rows."""
        n_own = n_channels - self._n_outside
        own = [self.own[:, :n_own]] if n_own else []
        return [to_rows(segment) for segment in (*self.outside, *own)]

    def slot(self, channels: slice) -> Tensor:
        """Some of the block's own channels."""
        before = self._n_outside
        return self.own[:, channels.start - before : channels.stop - before]

    def segments(self) -> list[tuple[slice, Tensor]]:
        """What came in segments, each with its channels."""
        parts, start = [], 0
        for segment in self.outside:
            parts.append((slice(start, start + segment.shape[1]), segment))
            start += segment.shape[1]
        return parts

    @property
    def _n_outside(self) -> int:
        return sum(segment.shape[1] for segment in self.outside)


@dataclass(frozen=True)
class _Statistics:
    """Of every feature of the block, filled as the features are written; (rows, channels)."""

    mean: Tensor
    variance: Tensor
    rstd: Tensor
    n_values: int

    @classmethod
    def empty(cls, features: Tensor, n_channels: int, step: Step) -> Self:
        n_rows = 1 if step.over_batch else features.shape[0]
        mean = features.new_empty(n_rows, n_channels, dtype=accumulator_dtype(step.dtype))
        n_values = features[:, 0].numel() // n_rows
        return cls(mean, torch.empty_like(mean), torch.empty_like(mean), n_values)

    def take(self, features: Tensor, channels: slice, step: Step) -> None:
        """Measure some channels."""
        new, variance = measured_state(to_rows(features), over_batch=step.over_batch, eps=step.eps)
        self.mean[:, channels], self.rstd[:, channels] = new.mean, new.rstd
        self.variance[:, channels] = variance

    def state(self) -> NormState:
        return NormState(self.mean, self.rstd, self.n_values)


def shared_dense(
    segments: Sequence[Tensor], layers: Sequence[LayerTensors], step: Step
) -> tuple[Tensor, ...]:
    """Run the layers.

    Args:
        segments: the features (N, C, *S), in one piece of any kind if joined; else in one or more,
            channels-last and of the step's type.
        layers: their parameters.
        step: all else.

    Returns:
        The features, channels-last, in as many segments as `Step.joined` says; then, unless the
        statistics are fixed, mean and biased variance of every feature, and those of each layer's
        middle, all (rows, channels) and not differentiable. The segments given are returned, so
        that their later readers' gradients come here to be added to, not beside the block's.
    """
    parameters = [parameter for layer in layers for parameter in layer]
    result: tuple[Tensor, ...] = _SharedDense.apply(  # type: ignore[no-untyped-call]
        step, len(segments), *segments, *parameters
    )
    return result


class _SharedDense(torch.autograd.Function):
    """Saves its first result, what it came from in segments, and a few numbers a channel."""

    @staticmethod
    def forward(ctx: Any, step: Step, n_segments: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        segments, parameters = tensors[:n_segments], tensors[n_segments:]
        x, k = segments[0], step.growth_rate
        space, c0 = x.shape[2:], sum(segment.shape[1] for segment in segments)
        end = c0 + k * step.n_layers
        n_own = end if step.joined else end - c0
        own = torch.empty(
            (x.shape[0], n_own, *space),
            dtype=step.dtype,
            device=x.device,
            memory_format=CHANNELS_LAST[x.ndim],
        )
        wide = _Wide([] if step.joined else list(segments), own)
        statistics = _Statistics.empty(own, end, step)
        middles: list[NormState] = []
        variances: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            if step.joined:
                own[:, :c0] = x
            if not step.fixed:
                given = [(slice(0, c0), own[:, :c0])] if step.joined else wide.segments()
                for channels, features in given:
                    statistics.take(features, channels, step)
            for i, layer in enumerate(_by_layer(parameters)):
                n_in = c0 + i * k
                outer = step.fixed[i][0] if step.fixed else statistics.state().first(n_in)
                z = call(
                    affine_act_linear,
                    wide.first(n_in),
                    *outer.affine(layer.gain1, layer.bias1),
                    layer.weight1.flatten(1).to(step.dtype),
                    step.slope,
                )
                if step.fixed:
                    middle = step.fixed[i][1]
                else:
                    middle, variance = measured_state(z, over_batch=step.over_batch, eps=step.eps)
                    variances.append(variance)
                call(affine_act_, z, *middle.affine(layer.gain2, layer.bias2), step.slope)
                new = _convolve(from_rows(z, space), layer.weight2.to(step.dtype), step.padding)
                del z
                slot = wide.slot(slice(n_in, n_in + k))
                slot.copy_(_dropped(new, step.masks[i]))
                del new
                middles.append(middle)
                if not step.fixed and i + 1 < step.n_layers:
                    statistics.take(slot, slice(n_in, n_in + k), step)
        ctx.step = step
        ctx.n_values = None if step.fixed else statistics.n_values
        ctx.n_middles = [middle.n_values for middle in middles]
        ctx.save_for_backward(
            own,
            statistics.mean,
            statistics.rstd,
            *(t for middle in middles for t in (middle.mean, middle.rstd)),
            *parameters,
            *(() if step.joined else segments),
        )
        numbers: tuple[Tensor, ...] = ()
        if not step.fixed:
            pairs = zip(middles, variances, strict=True)
            numbers = (statistics.mean, statistics.variance)
            numbers += tuple(t for middle, variance in pairs for t in (middle.mean, variance))
        ctx.mark_non_differentiable(*numbers)
        ctx.set_materialize_grads(False)
        return (own, *numbers) if step.joined else (*segments, own, *numbers)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        sole = sole_holders(given)
        refuse_second_derivative(*SECOND_DERIVATIVE)
        step: Step = ctx.step
        n, k = step.n_layers, step.growth_rate
        own, mean, rstd, *rest = ctx.saved_tensors
        n_parameters = n * len(LayerTensors._fields)
        middles, rest = rest[: 2 * n], rest[2 * n :]
        layers, segments = _by_layer(rest[:n_parameters]), rest[n_parameters:]
        space, end = own.shape[2:], mean.shape[1]
        c0 = end - n * k
        wide = _Wide(list(segments), own)
        # None: nobody else reads this segment
        *outside, own_gradient = (
            torch.zeros_like(features)
            if gradient is None
            else writable(gradient, step.dtype, sole_holder=alone)
            for features, gradient, alone in zip([*segments, own], given, sole, strict=False)
        )
        del given
        into = _Wide(outside, own_gradient)
        state = NormState(mean, rstd, ctx.n_values)
        sum_h, sum_hx = torch.zeros_like(mean), torch.zeros_like(mean)
        gradients: list[Tensor] = []

        def finish(part: Tensor, features: Tensor, channels: slice) -> Tensor:
            """Make whole the gradient of some channels, in place: their last reader is done."""
            if ctx.n_values is not None and channels.stop < end:
                terms = deferred_terms(
                    sum_h[:, channels],
                    sum_hx[:, channels],
                    mean[:, channels],
                    rstd[:, channels],
                    ctx.n_values,
                )
                ones = torch.ones_like(terms[0])
                call(affine_combine, to_rows(part), ones, to_rows(features), *terms)
            return part

        def finished_slot(channels: slice) -> Tensor:
            """That of the block's own channels, a tensor apart."""
            apart = into.slot(channels).contiguous(memory_format=CHANNELS_LAST[own.ndim])
            return finish(apart, wide.slot(channels), channels)

        with torch.autocast(own.device.type, enabled=False):
            for i in reversed(range(n)):
                layer, n_in = layers[i], c0 + i * k
                outer = step.fixed[i][0] if step.fixed else state.first(n_in)
                middle = NormState(middles[2 * i], middles[2 * i + 1], ctx.n_middles[i])
                affine1 = outer.affine(layer.gain1, layer.bias1)
                affine2 = middle.affine(layer.gain2, layer.bias2)
                weight1 = layer.weight1.flatten(1).to(step.dtype)
                weight2 = layer.weight2.to(step.dtype)

                new = _dropped(finished_slot(slice(n_in, n_in + k)), step.masks[i])
                z = call(affine_act_linear, wide.first(n_in), *affine1, weight1, step.slope)
                activated = from_rows(call(affine_act, z, *affine2, step.slope), space)
                weight2_gradient = _weight_gradient(new, activated, weight2, step.padding)
                del activated
                # the input's gradient needs nothing of the input but its shape, which z has too
                like_input = from_rows(z, space)
                g = to_rows(_input_gradient(new, like_input, weight2, step.padding)).contiguous()
                del new, like_input
                sum_g, sum_gx = call(activation_backward, g, z, *affine2, step.slope)
                gain2_gradient = middle.gain_gradient(sum_g, sum_gx)
                if middle.n_values is None:
                    g.mul_(affine2[0].to(g.dtype).unsqueeze(1))
                else:
                    gain = layer.gain2.to(sum_g.dtype)
                    terms = deferred_terms(
                        gain * sum_g,
                        gain * gain2_gradient,
                        middle.mean,
                        middle.rstd,
                        middle.n_values,
                    )
                    call(affine_combine, g, affine2[0], z, *terms)
                del z
                bias2_gradient = sum_g.sum(0)
                weight1_gradient, sum_g, sum_gx = call(
                    affine_act_linear_backward,
                    wide.first(n_in),
                    *affine1,
                    weight1,
                    step.slope,
                    g,
                    into.first(n_in),
                )
                del g
                gain1_gradient = outer.gain_gradient(sum_g, sum_gx)
                if not step.fixed:
                    gain = layer.gain1.to(sum_g.dtype)
                    sum_h[:, :n_in] += gain * sum_g
                    sum_hx[:, :n_in] += gain * gain1_gradient
                of_layer = LayerTensors(
                    gain1_gradient.sum(0),
                    sum_g.sum(0),
                    weight1_gradient,
                    gain2_gradient.sum(0),
                    bias2_gradient,
                    weight2_gradient,
                )
                gradients[:0] = map(_laid_out, of_layer, layer)
            inputs: list[Tensor | None] = [None]
            if not step.joined:
                pairs = zip(into.segments(), segments, strict=True)
                inputs = [finish(part, x, channels) for (channels, part), x in pairs]
            elif ctx.needs_input_grad[2]:
                inputs = [finished_slot(slice(0, c0))]
        return (None, None, *inputs, *gradients)


def _by_layer(parameters: Sequence[Tensor]) -> list[LayerTensors]:
    n = len(LayerTensors._fields)
    return [LayerTensors(*parameters[i : i + n]) for i in range(0, len(parameters), n)]


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in its parameter's type and strides; autograd copies any other to keep it."""
    gradient = gradient.view(parameter.shape)
    if gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _dropped(new: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's new features, or their gradient, without what dropout takes; in place."""
    return new if mask is None else new.mul_(mask.view(*mask.shape, *(1,) * (new.ndim - 2)))


def _convolve(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    ones, zeros = [1] * len(padding), [0] * len(padding)
    result: Tensor = torch.ops.aten.convolution(
        x, weight, None, ones, padding, ones, False, zeros, 1
    )
    return result


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    _, result, _ = _convolve_backward(gradient, x, weight, padding, [False, True, False])
    return result


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    result, _, _ = _convolve_backward(gradient, x, weight, padding, [True, False, False])
    return result


def _convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    ones, zeros = [1] * len(padding), [0] * len(padding)
    x_gradient, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, ones, padding, ones, False, zeros, 1, wanted
    )
    return x_gradient, weight_gradient, bias_gradient
