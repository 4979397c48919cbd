"""What networks give: in training what a loss reads, else the finest logits."""

from typing import Any

from torch import Tensor, nn

from effseg.networks.dense_unet import DenseUNet
from effseg.types import Features


def for_loss(network: nn.Module, image: Features) -> Any:
    """What a loss reads in training; see `DenseUNet.for_loss`.

    Logits of other networks exist in full, with their gradient: 2 x classes numbers a voxel, which
    a trace counts.
    """
    return network.for_loss(image) if isinstance(network, DenseUNet) else network(image)


def finest(output: Any) -> Tensor:
    """A network's logits; of several, the first."""
    logits: Tensor = output[0] if isinstance(output, list | tuple) else output
    return logits
