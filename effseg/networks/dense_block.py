"""The dense block that stores every feature once.

Norm over a concatenation is per channel, so the mean and the deviation of a feature are the same
for every later layer that reads it; only gain and bias differ. In "shared" memory one buffer holds
the input and every layer's features side by side. Each layer writes its own features in place,
their statistics are taken once, and the normalised input of a layer's 1x1 convolution exists only
a tile at a time (`tiles`). Backward recomputes norm, activation and the 1x1 convolution, never the
spatial one; gradients add up in one buffer, and the norm's own backward is applied once a channel,
when its last reader is done.

Dense blocks: Huang et al., "Densely connected convolutional networks", CVPR 2017. Recomputation
of their cheap parts: Pleiss et al., "Memory-efficient implementation of DenseNets", 2017.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effseg.errors import PlanError
from effseg.kernels import tiles
from effseg.networks.pointwise import (
    CONVS,
    SLOPES,
    Act,
    MemoryMode,
    Norm,
    NormState,
    activate,
    build_norm,
    checkpointed,
    compute_dtype,
    fixed_statistics,
    from_rows,
    measured_state,
    refuse_second_derivative,
    running_state,
    to_rows,
    update_running,
)
from effseg.types import Features

PARAMETERS_PER_LAYER = 6


class DenseLayer(nn.Module):
    """norm1, act, conv1 (1x1), norm2, act, conv2 (spatial), dropout: (N, C, *S) -> (N, k, *S)."""

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        *,
        kernel_size: Sequence[int],
        bottleneck: int,
        norm: Norm,
        act: Act,
        dropout: float,
    ) -> None:
        super().__init__()
        spatial_dims = len(kernel_size)
        middle = bottleneck * growth_rate
        conv = CONVS[spatial_dims]
        self.norm1 = build_norm(norm, in_channels, spatial_dims)
        self.conv1 = conv(in_channels, middle, 1, bias=False)
        self.norm2 = build_norm(norm, middle, spatial_dims)
        self.conv2 = conv(
            middle,
            growth_rate,
            tuple(kernel_size),  # type: ignore[arg-type]
            padding=tuple(k // 2 for k in kernel_size),  # type: ignore[arg-type]
            bias=False,
        )
        self.slope = SLOPES[act]
        self.dropout = dropout

    def plain_forward(self, features: Tensor) -> Tensor:
        """The layer in torch's own operators."""
        middle = self.conv1(activate(self.norm1(features), self.slope))
        new: Tensor = self.conv2(activate(self.norm2(middle), self.slope))
        mask = self.dropout_mask(new, new.dtype)
        return new if mask is None else new * mask.view(*mask.shape, *(1,) * (new.ndim - 2))

    def dropout_mask(self, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Zeros and 1 / (1 - p), (N, k), a whole channel at once; None where nothing drops."""
        if not self.training or self.dropout == 0:
            return None
        keep = 1 - self.dropout
        shape = (like.shape[0], self.conv2.out_channels)
        mask = torch.empty(shape, device=like.device, dtype=torch.float32).bernoulli_(keep)
        return mask.div_(keep).to(dtype)

    def parameter_list(self) -> list[Tensor]:
        """The six parameters in the order in which the block's function takes them."""
        return [
            self.norm1.weight,
            self.norm1.bias,
            self.conv1.weight,
            self.norm2.weight,
            self.norm2.bias,
            self.conv2.weight,
        ]


class _Step(NamedTuple):
    """What the block's function needs to know beside tensors."""

    growth_rate: int
    padding: tuple[int, ...]
    slope: float
    eps: float
    over_batch: bool
    fixed: tuple[tuple[NormState, NormState], ...]  # of each layer's norms in eval mode, or empty
    dtype: torch.dtype


class _SharedDense(torch.autograd.Function):
    """The whole block as one function: it saves its output, and a few numbers a channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, masks: tuple[Tensor | None, ...], step: _Step, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        layers = _by_layer(parameters)
        space, k = x.shape[2:], step.growth_rate
        c0 = x.shape[1]
        rows = x.new_empty(x.shape[0], space.numel(), c0 + k * len(layers), dtype=step.dtype)
        wide = tiles.accumulator_dtype(step.dtype)
        middles: list[NormState] = []
        variances: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            rows[:, :, :c0] = to_rows(x)
            n_rows = 1 if step.over_batch else x.shape[0]
            mean = rows.new_empty(n_rows, rows.shape[2], dtype=wide)
            variance, rstd = torch.empty_like(mean), torch.empty_like(mean)
            state = NormState(mean, rstd, None)

            def take_statistics(channels: slice) -> NormState:
                new, spread = measured_state(
                    rows[:, :, channels], over_batch=step.over_batch, eps=step.eps
                )
                mean[:, channels], rstd[:, channels] = new.mean, new.rstd
                variance[:, channels] = spread
                return NormState(mean, rstd, new.n_values)

            if not step.fixed:
                state = take_statistics(slice(0, c0))
            for i, (gain1, bias1, weight1, gain2, bias2, weight2) in enumerate(layers):
                n_in = c0 + i * k
                outer = step.fixed[i][0] if step.fixed else state.narrow(n_in)
                z = tiles.affine_act_linear(
                    rows[:, :, :n_in],
                    *outer.affine(gain1, bias1),
                    weight1.flatten(1).to(step.dtype),
                    step.slope,
                )
                if step.fixed:
                    middle = step.fixed[i][1]
                else:
                    middle, spread = measured_state(z, over_batch=step.over_batch, eps=step.eps)
                    variances.append(spread)
                z = tiles.affine_act(z, *middle.affine(gain2, bias2), step.slope)
                new = _convolve(from_rows(z, space), weight2.to(step.dtype), step.padding)
                mask = masks[i]
                rows[:, :, n_in : n_in + k] = to_rows(
                    new if mask is None else new * mask.view(*mask.shape, *(1,) * len(space))
                )
                del z, new
                middles.append(middle)
                if not step.fixed and i + 1 < len(layers):
                    state = take_statistics(slice(n_in, n_in + k))
        out = from_rows(rows, space)
        ctx.step, ctx.masks, ctx.n_values, ctx.c0 = step, masks, state.n_values, c0
        ctx.n_middles = [middle.n_values for middle in middles]
        ctx.save_for_backward(
            out, mean, rstd, *(t for m in middles for t in (m.mean, m.rstd)), *parameters
        )
        statistics = (
            mean,
            variance,
            *(t for m, v in zip(middles, variances, strict=False) for t in (m.mean, v)),
        )
        ctx.mark_non_differentiable(*statistics)
        return (out, *statistics)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        step: _Step = ctx.step
        out, mean, rstd, *rest = ctx.saved_tensors
        n_layers = len(ctx.n_middles)
        flat, parameters = rest[: 2 * n_layers], rest[2 * n_layers :]
        layers = _by_layer(parameters)
        space, k, c0 = out.shape[2:], step.growth_rate, ctx.c0
        rows = to_rows(out)
        state = NormState(mean, rstd, ctx.n_values)
        into = to_rows(gradient).to(step.dtype, copy=True, memory_format=torch.contiguous_format)
        sum_h, sum_hx = torch.zeros_like(mean), torch.zeros_like(mean)
        gradients: list[Tensor] = []

        def finish(channels: slice) -> Tensor:
            """The gradient of some channels once their last reader is done, a tensor apart."""
            own = into[:, :, channels].contiguous()
            if ctx.n_values is not None and channels.stop < into.shape[2]:
                terms = tiles.deferred_terms(
                    sum_h[:, channels],
                    sum_hx[:, channels],
                    mean[:, channels],
                    rstd[:, channels],
                    ctx.n_values,
                )
                ones = torch.ones_like(terms[0])
                tiles.affine_combine(own, ones, rows[:, :, channels], *terms)
            return own

        for i in reversed(range(n_layers)):
            gain1, bias1, weight1, gain2, bias2, weight2 = layers[i]
            n_in = c0 + i * k
            middle = NormState(flat[2 * i], flat[2 * i + 1], ctx.n_middles[i])
            outer = step.fixed[i][0] if step.fixed else state.narrow(n_in)
            new_gradient = from_rows(finish(slice(n_in, n_in + k)), space)
            mask = ctx.masks[i]
            if mask is not None:
                new_gradient.mul_(mask.view(*mask.shape, *(1,) * len(space)))
            affine1, affine2 = outer.affine(gain1, bias1), middle.affine(gain2, bias2)
            matrix = weight1.flatten(1).to(step.dtype)
            z = tiles.affine_act_linear(rows[:, :, :n_in], *affine1, matrix, step.slope)
            activated = tiles.affine_act(z, *affine2, step.slope)
            g, weight2_gradient = _convolve_backward(
                new_gradient, from_rows(activated, space), weight2.to(step.dtype), step.padding
            )
            del activated, new_gradient
            g = to_rows(g).contiguous()
            sum_g, sum_gx = tiles.activation_backward(g, z, *affine2, step.slope)
            gain2_gradient = middle.gain_gradient(sum_g, sum_gx)
            if middle.n_values is None:
                g.mul_(affine2[0].to(g.dtype).unsqueeze(1))
            else:
                wide = gain2.to(sum_g.dtype)
                terms = tiles.deferred_terms(
                    wide * sum_g,
                    wide * gain2_gradient,
                    middle.mean,
                    middle.rstd,
                    middle.n_values,
                )
                tiles.affine_combine(g, affine2[0], z, *terms)
            del z
            bias2_gradient = sum_g.sum(0)
            weight1_gradient, sum_g, sum_gx = tiles.affine_act_linear_backward(
                rows[:, :, :n_in], *affine1, matrix, step.slope, g, into[:, :, :n_in]
            )
            del g
            gain1_gradient = outer.gain_gradient(sum_g, sum_gx)
            if not step.fixed:
                wide = gain1.to(sum_g.dtype)
                sum_h[:, :n_in] += wide * sum_g
                sum_hx[:, :n_in] += wide * gain1_gradient
            gradients = [
                gain1_gradient.sum(0).to(gain1.dtype),
                sum_g.sum(0).to(bias1.dtype),
                weight1_gradient.view_as(weight1).to(weight1.dtype),
                gain2_gradient.sum(0).to(gain2.dtype),
                bias2_gradient.to(bias2.dtype),
                weight2_gradient.to(weight2.dtype),
                *gradients,
            ]
        x_gradient = from_rows(finish(slice(0, c0)), space) if ctx.needs_input_grad[0] else None
        return (x_gradient, None, None, *gradients)


class DenseBlock(nn.Module):
    """A dense block: each layer reads every feature before it and adds `growth_rate` new ones.

    Forward: (N, in_channels, *S) -> (N, in_channels + n_layers * growth_rate, *S), the input's
    channels first. Layer i holds norm1, conv1 (1x1), norm2, conv2 under `denselayer{i}`, from 1,
    as torchvision's and MONAI's DenseNet do.

    Args:
        in_channels: channels of the input, at least 1.
        growth_rate: channels each layer adds.
        n_layers: how many layers.
        bottleneck: width of the 1x1 convolution, in growth rates.
        norm: "batch" or "instance" (with gain and bias), over each channel.
        act: "relu" or "leaky_relu" (slope 0.01).
        dropout: chance that a new channel is dropped, whole, while training.
        memory: "shared" stores every feature once and recomputes norm, activation and the 1x1
            convolution; "checkpoint" recomputes each layer with torch's checkpoint; "plain" is
            torch's autograd. One state dict, the same numbers.
        kernel_size: of conv2, odd; one length or one an axis.
        spatial_dims: 2 or 3.

    Raises:
        PlanError: for a width below 1, an even kernel, or another number of axes.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        n_layers: int,
        *,
        bottleneck: int = 4,
        norm: Norm = "batch",
        act: Act = "relu",
        dropout: float = 0.0,
        memory: MemoryMode = "shared",
        kernel_size: int | Sequence[int] = 3,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        kernel = (
            (kernel_size,) * spatial_dims if isinstance(kernel_size, int) else tuple(kernel_size)
        )
        if min(in_channels, growth_rate, n_layers, bottleneck) < 1:
            raise PlanError(
                f"a dense block of {in_channels} channels, growth rate {growth_rate}, {n_layers} "
                f"layers and bottleneck {bottleneck}; each must be at least 1"
            )
        if spatial_dims not in CONVS or len(kernel) != spatial_dims:
            raise PlanError(
                f"kernel {kernel} for {spatial_dims} axes; expected 2 or 3 axes and a length each"
            )
        if any(k % 2 == 0 for k in kernel):
            raise PlanError(f"kernel {kernel}; each length must be odd to keep the size")
        if memory not in ("shared", "checkpoint", "plain"):
            raise PlanError(f'memory {memory!r}; expected "shared", "checkpoint" or "plain"')
        for i in range(n_layers):
            layer = DenseLayer(
                in_channels + i * growth_rate,
                growth_rate,
                kernel_size=kernel,
                bottleneck=bottleneck,
                norm=norm,
                act=act,
                dropout=dropout,
            )
            self.add_module(f"denselayer{i + 1}", layer)
        self.in_channels = in_channels
        self.out_channels = in_channels + n_layers * growth_rate
        self.growth_rate = growth_rate
        self.memory = memory
        self.over_batch = norm == "batch"

    def forward(self, x: Features) -> Features:
        """Run the block; with "shared" the result lies in channels-last memory."""
        if self.memory == "shared":
            return self._shared(x)
        features = x
        for layer in self.layers():
            if self.memory == "checkpoint" and torch.is_grad_enabled():
                new = checkpointed(layer, features)
            else:
                new = layer.plain_forward(features)
            features = torch.cat((features.to(new.dtype), new), dim=1)
        return features

    def layers(self) -> list[DenseLayer]:
        """The layers in order."""
        return [part for part in self.children() if isinstance(part, DenseLayer)]

    def extra_repr(self) -> str:
        """What the tree of modules does not show."""
        return f'{self.in_channels} -> {self.out_channels} channels, memory="{self.memory}"'

    def _shared(self, x: Tensor) -> Tensor:
        layers = self.layers()
        first, dtype = layers[0], compute_dtype(x)
        wide = tiles.accumulator_dtype(dtype)
        step = _Step(
            growth_rate=self.growth_rate,
            padding=tuple(int(p) for p in first.conv2.padding),
            slope=first.slope,
            eps=first.norm1.eps,
            over_batch=self.over_batch,
            fixed=tuple(
                (running_state(layer.norm1, wide), running_state(layer.norm2, wide))
                for layer in layers
                if fixed_statistics(layer.norm1)
            ),
            dtype=dtype,
        )
        masks = tuple(layer.dropout_mask(x, dtype) for layer in layers)
        parameters = [p for layer in layers for p in layer.parameter_list()]
        out, *statistics = _SharedDense.apply(  # type: ignore[no-untyped-call]
            x, masks, step, *parameters
        )
        if not step.fixed and self.over_batch:
            self._update_running(x, statistics)
        result: Tensor = out
        return result

    def _update_running(self, x: Tensor, statistics: list[Tensor]) -> None:
        mean, variance, *middles = statistics
        n_values = x.shape[0] * x.shape[2:].numel()
        for i, layer in enumerate(self.layers()):
            n_in = self.in_channels + i * self.growth_rate
            update_running(layer.norm1, mean[:, :n_in], variance[:, :n_in], n_values)
            update_running(layer.norm2, middles[2 * i], middles[2 * i + 1], n_values)


def _by_layer(parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    n = PARAMETERS_PER_LAYER
    return [parameters[i : i + n] for i in range(0, len(parameters), n)]


def _convolve(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    ones, zeros = [1] * len(padding), [0] * len(padding)
    result: Tensor = torch.ops.aten.convolution(
        x, weight, None, ones, padding, ones, False, zeros, 1
    )
    return result


def _convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    ones, zeros = [1] * len(padding), [0] * len(padding)
    x_gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, ones, padding, ones, False, zeros, 1, [True, True, False]
    )
    return x_gradient, weight_gradient
