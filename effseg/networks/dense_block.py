"""The dense block, in three ways to remember what backward needs.

Dense blocks: Huang et al., "Densely connected convolutional networks", CVPR 2017. Recomputation
of their cheap parts: Pleiss et al., "Memory-efficient implementation of DenseNets", 2017. What
"shared" does: `shared_dense`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from effseg.errors import PlanError
from effseg.kernels.tiles import accumulator_dtype, channels_last
from effseg.networks.norm import (
    Norm,
    build_norm,
    fixed_statistics,
    running_state,
    update_running,
)
from effseg.networks.pointwise import (
    CONVS,
    SLOPES,
    Act,
    MemoryMode,
    activate,
    checkpointed,
    compute_dtype,
    concatenated,
    segments_of,
)
from effseg.networks.shared_dense import LayerTensors, Step, shared_dense
from effseg.types import Features


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
        self.part: tuple[int, int] | None = None  # see one_of_batch
        self.register_load_state_dict_pre_hook(_read_monai_names)  # type: ignore[no-untyped-call]

    def plain_forward(self, *segments: Tensor) -> Tensor:
        """The layer in torch's own operators, concatenation included."""
        middle = self.conv1(activate(self.norm1(concatenated(segments)), self.slope))
        new: Tensor = self.conv2(activate(self.norm2(middle), self.slope))
        mask = self.dropout_mask(new, new.dtype)
        return new if mask is None else new * mask.view(*mask.shape, *(1,) * (new.ndim - 2))

    def dropout_mask(self, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Zeros and 1 / (1 - p), (N, k), a whole channel at once; None where nothing drops."""
        if not self.training or self.dropout == 0:
            return None
        keep = 1 - self.dropout
        n_samples = like.shape[0] if self.part is None else self.part[1]
        shape = (n_samples, self.conv2.out_channels)
        mask = torch.empty(shape, device=like.device, dtype=torch.float32).bernoulli_(keep)
        mask = mask.div_(keep).to(dtype)
        return mask if self.part is None else mask[self.part[0], None]

    def tensors(self) -> LayerTensors:
        """The parameters as the block's function takes them."""
        return LayerTensors(
            gain1=self.norm1.weight,
            bias1=self.norm1.bias,
            weight1=self.conv1.weight,
            gain2=self.norm2.weight,
            bias2=self.norm2.bias,
            weight2=self.conv2.weight,
        )


def _read_monai_names(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """MONAI puts what a layer holds one level deeper."""
    deeper = f"{prefix}layers."
    for name in [name for name in state if name.startswith(deeper)]:
        state[prefix + name.removeprefix(deeper)] = state.pop(name)


@contextmanager
def one_of_batch(network: nn.Module, index: int, n_samples: int) -> Iterator[None]:
    """Within, a network is given one sample of a batch, and drops of it what the batch would.

    Dropout draws for all samples at once, and keeps what falls to this one. From the same random
    state each sample so loses the channels that it would lose beside the others.

    Args:
        network: holds dense layers.
        index: of the sample, from 0.
        n_samples: of the batch.
    """
    layers = [part for part in network.modules() if isinstance(part, DenseLayer)]
    for layer in layers:
        layer.part = (index, n_samples)
    try:
        yield
    finally:
        for layer in layers:
            layer.part = None


class DenseBlock(nn.Module):
    """A dense block: each layer reads every feature before it and adds `growth_rate` new ones.

    Forward: (N, in_channels, *S) -> (N, in_channels + n_layers * growth_rate, *S), the input's
    channels first. Layer i holds norm1, conv1 (1x1), norm2, conv2 under `denselayer{i}`, from 1,
    as torchvision's DenseNet does; the state dict of MONAI's DenseNet blocks, which hold them under
    `denselayer{i}.layers`, loads too.

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

    @overload
    def forward(self, features: Features) -> Features: ...

    @overload
    def forward(self, features: Sequence[Features]) -> tuple[Features, ...]: ...

    def forward(self, features: Features | Sequence[Features]) -> Features | tuple[Features, ...]:
        """Run the block; with "shared" the result lies in channels-last memory.

        Args:
            features: (N, in_channels, *S), or segments of it along the channels.

        Returns:
            One tensor for one tensor. For segments: segments of the result; with "shared" those
            given and one of the new features, nothing copied, else one of them all.
        """
        if self.memory == "shared":
            if isinstance(features, Tensor):
                return self._shared((features,), joined=True)[0]
            return self._shared(segments_of(features), joined=False)
        segments = list(segments_of(features))
        for layer in self.layers():
            if self.memory == "checkpoint" and torch.is_grad_enabled():
                segments.append(checkpointed(layer, *segments))
            else:
                segments.append(layer.plain_forward(*segments))
        whole = concatenated(segments)
        return whole if isinstance(features, Tensor) else (whole,)

    def layers(self) -> list[DenseLayer]:
        """The layers in order."""
        return [part for part in self.children() if isinstance(part, DenseLayer)]

    def extra_repr(self) -> str:
        """What the tree of modules does not show."""
        return f'{self.in_channels} -> {self.out_channels} channels, memory="{self.memory}"'

    def _shared(self, segments: tuple[Tensor, ...], *, joined: bool) -> tuple[Tensor, ...]:
        layers = self.layers()
        first, dtype = layers[0], compute_dtype(segments[0])
        if not joined:
            segments = tuple(channels_last(segment, dtype) for segment in segments)
        wide = accumulator_dtype(dtype)
        step = Step(
            n_layers=len(layers),
            growth_rate=self.growth_rate,
            joined=joined,
            padding=tuple(int(p) for p in first.conv2.padding),
            slope=first.slope,
            eps=first.norm1.eps,
            over_batch=self.over_batch,
            fixed=tuple(
                (running_state(layer.norm1, wide), running_state(layer.norm2, wide))
                for layer in layers
                if fixed_statistics(layer.norm1)
            ),
            masks=tuple(layer.dropout_mask(segments[0], dtype) for layer in layers),
            dtype=dtype,
        )
        result = shared_dense(segments, [layer.tensors() for layer in layers], step)
        n_features = 1 if joined else len(segments) + 1
        features, statistics = result[:n_features], result[n_features:]
        if statistics and self.over_batch:
            self._update_running(features[0], statistics)
        return features

    def _update_running(self, features: Tensor, statistics: tuple[Tensor, ...]) -> None:
        mean, variance, *middles = statistics
        n_values = features.shape[0] * features.shape[2:].numel()
        for i, layer in enumerate(self.layers()):
            n_in = self.in_channels + i * self.growth_rate
            update_running(layer.norm1, mean[:, :n_in], variance[:, :n_in], n_values)
            update_running(layer.norm2, middles[2 * i], middles[2 * i + 1], n_values)
