"""A dense block under each memory scheme: effseg's, torch's, and those in use elsewhere.

All share one state dict and give the same numbers. Recomputation is torch's, not reentrant, which
takes less, and batch norm's running statistics move once.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from effseg.memory.recompute import recompute
from effseg.networks import DenseBlock, MemoryMode
from effseg.networks.dense_block import DenseLayer
from effseg.networks.pointwise import activate

Scheme = Literal["plain", "bottleneck", "layer", "block", "shared"]
SCHEMES: tuple[Scheme, ...] = ("plain", "bottleneck", "layer", "block", "shared")
"""plain: torch's autograd. bottleneck, layer, block: that part is recomputed in backward. shared:
effseg's."""


class BottleneckRecomputed(DenseBlock):
    """Recomputes what leads to each layer's 1x1 convolution, and stores the rest of the layer.

    "Efficient DenseNet" as it is written since torch has checkpoints (Pleiss et al. 2017).
    """

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, *S) -> (N, C + L k, *S)."""
        every = [features]
        for layer in self.layers():
            middle = recompute(layer.norm1, _to_middle(layer), *every)
            every.append(layer.conv2(activate(layer.norm2(middle), layer.slope)))
        return torch.cat(every, dim=1)


class BlockRecomputed(DenseBlock):
    """Stores its input alone, and runs a second time in backward."""

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, *S) -> (N, C + L k, *S)."""
        result: Tensor = recompute(self, super().forward, features)
        return result


KINDS: dict[Scheme, type[DenseBlock]] = {
    "bottleneck": BottleneckRecomputed,
    "block": BlockRecomputed,
}
MODES: dict[Scheme, MemoryMode] = {"layer": "checkpoint", "shared": "shared"}


def build_block(in_channels: int, growth_rate: int, n_layers: int, scheme: Scheme) -> DenseBlock:
    """A dense block with bottleneck 4, batch norm and ReLU."""
    kind, memory = KINDS.get(scheme, DenseBlock), MODES.get(scheme, "plain")
    return kind(in_channels, growth_rate, n_layers, memory=memory)


def _to_middle(layer: DenseLayer) -> Callable[..., Tensor]:
    return lambda *every: layer.conv1(activate(layer.norm1(torch.cat(every, dim=1)), layer.slope))
