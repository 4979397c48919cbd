"""Networks of memory-efficient dense blocks, and those of others."""

from typing import overload

from torch import nn

from effseg.networks.dense_block import DenseBlock, one_of_batch
from effseg.networks.dense_unet import DenseUNet
from effseg.networks.head import defer_logits
from effseg.networks.imported import build_imported, maker_of, why_whole
from effseg.networks.outputs import finest, for_loss
from effseg.networks.pointwise import MemoryMode, NormActConv
from effseg.networks.state import own_state
from effseg.networks.weights import WeightsFile
from effseg.plans import ImportedNetwork, NetworkConfig


@overload
def build_network(config: NetworkConfig) -> DenseUNet: ...


@overload
def build_network(config: NetworkConfig | ImportedNetwork) -> nn.Module: ...


def build_network(config: NetworkConfig | ImportedNetwork) -> nn.Module:
    """The network that a configuration describes, with fresh weights.

    Raises:
        PlanError: if it is somebody else's and cannot be made; see `build_imported`.
    """
    return build_imported(config) if isinstance(config, ImportedNetwork) else DenseUNet(config)


__all__ = [
    "DenseBlock",
    "DenseUNet",
    "MemoryMode",
    "NormActConv",
    "WeightsFile",
    "build_network",
    "defer_logits",
    "finest",
    "for_loss",
    "maker_of",
    "one_of_batch",
    "own_state",
    "why_whole",
]
