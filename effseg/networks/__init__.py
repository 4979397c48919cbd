"""Networks of memory-efficient dense blocks."""

from effseg.networks.dense_block import DenseBlock
from effseg.networks.dense_unet import DenseUNet, build_network
from effseg.networks.pointwise import NormActConv

__all__ = ["DenseBlock", "DenseUNet", "NormActConv", "build_network"]
