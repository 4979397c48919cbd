"""Networks of memory-efficient dense blocks."""

from effseg.networks.dense_block import DenseBlock, one_of_batch
from effseg.networks.dense_unet import DenseUNet, build_network
from effseg.networks.head import defer_logits
from effseg.networks.pointwise import MemoryMode, NormActConv

__all__ = [
    "DenseBlock",
    "DenseUNet",
    "MemoryMode",
    "NormActConv",
    "build_network",
    "defer_logits",
    "one_of_batch",
]
