"""What a `DenseUNet` is put together of: blocks, and the ways between its stages."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from effseg.networks.dense_block import DenseBlock
from effseg.networks.pointwise import NormActConv
from effseg.plans import NetworkConfig
from effseg.types import Features, Shape3

LINK_SHARE = 0.25
"""Of the coarse channels, those that pass LinkNet's way up; its authors' choice."""


class ResidualDense(nn.Module):
    """A dense block whose features are fused to its input's width and added to its input.

    A residual dense block: Zhang et al., "Residual dense network for image super-resolution",
    CVPR 2018. What leaves a stage is as wide as what entered, so skips are narrow. With "shared"
    memory it saves each feature once: the input, the block's new ones, and the sum, which is its
    output; beside these a few numbers a channel.

    Args:
        in_channels: channels of the input, and of the output.
        n_layers: of the block.
        kernel_size: of the block's spatial convolutions.
        config: of the network.
    """

    def __init__(
        self, in_channels: int, n_layers: int, kernel_size: Shape3, config: NetworkConfig
    ) -> None:
        super().__init__()
        self.dense = dense_block(in_channels, n_layers, kernel_size, config)
        self.fuse = project(self.dense.out_channels, in_channels, config)
        self.out_channels = in_channels

    def forward(self, features: Features) -> Features:
        """(N, in, *S) -> (N, in, *S)."""
        segments = self.dense((features,))
        # the input as the block hands it on: one gradient of it comes to the block, and is added to
        given = segments[0] if len(segments) > 1 else features
        result: Tensor = given + self.fuse(segments)
        return result


class Down(nn.Module):
    """Norm, activation, 1x1 convolution, then the mean over each stride's box of voxels.

    The mean is taken by reshaping, which is deterministic on every device; average pooling is not
    on CUDA, and CPU autocast would run it in float32.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: Shape3, config: NetworkConfig
    ) -> None:
        super().__init__()
        self.project = project(in_channels, out_channels, config)
        self.stride = stride

    def forward(self, features: Features) -> Features:
        """(N, in, *S) -> (N, out, *S / stride)."""
        x = self.project(features)
        result: Tensor = _boxes(x, self.stride).mean((2, 4, 6)).movedim(-1, 1)
        return result


class Up(nn.Module):
    """Join coarse features and a skip: (coarse, skip) -> (N, out, *skip's space).

    The coarse features pass through norm, activation and a transposed convolution whose kernel is
    its stride, written as a 1x1 convolution and a reordering; the skip through norm, activation
    and a 1x1 convolution; the two are added.
    """

    def __init__(
        self,
        coarse_channels: int,
        skip_channels: int,
        out_channels: int,
        stride: Shape3,
        config: NetworkConfig,
    ) -> None:
        super().__init__()
        self.project = project(coarse_channels, out_channels * math.prod(stride), config)
        self.skip = project(skip_channels, out_channels, config)
        self.stride = stride

    def forward(self, coarse: Features, skip: Features) -> Features:
        """Run both branches and add them."""
        result: Tensor = self.skip(skip) + _spread(self.project(coarse), self.stride)
        return result


class LinkUp(nn.Module):
    """Bring coarse features to a skip and add the skip: (coarse, skip) -> (N, out, *skip's space).

    LinkNet's way up: Chaurasia and Culurciello, "LinkNet: exploiting encoder representations for
    efficient semantic segmentation", 2017 (arXiv:1707.03718). A 1x1 convolution to a quarter of the
    coarse channels, then a transposed convolution whose kernel is its stride; norm and activation
    before each. A skip of `out_channels` is added as it is, and nothing is computed at its
    resolution or saved for backward; any other is projected, as `Up` does.
    """

    def __init__(
        self,
        coarse_channels: int,
        skip_channels: int,
        out_channels: int,
        stride: Shape3,
        config: NetworkConfig,
    ) -> None:
        super().__init__()
        narrow = whole_eights(coarse_channels * LINK_SHARE)
        self.reduce = project(coarse_channels, narrow, config)
        self.project = project(narrow, out_channels * math.prod(stride), config)
        fits = skip_channels == out_channels
        self.skip = nn.Identity() if fits else project(skip_channels, out_channels, config)
        self.stride = stride

    def forward(self, coarse: Features, skip: Features) -> Features:
        """Run both branches and add them."""
        x = _spread(self.project(self.reduce(coarse)), self.stride)
        result: Tensor = self.skip(skip) + x
        return result


class Level(nn.Module):
    """One level of a feature pyramid: (features, the coarser level) -> (N, out, *space).

    Norm, activation and a 1x1 convolution of a stage's features, at their own resolution; added to
    it the coarser level, each voxel to all that lie in it. So nothing is wider than `out` channels
    at a resolution finer than its own. Lin et al., "Feature pyramid networks", CVPR 2017; summed
    into one prediction: Kirillov et al., "Panoptic feature pyramid networks", CVPR 2019.

    Args:
        in_channels: of the stage.
        out_channels: of every level.
        stride: from this level to the coarser one; None where this is the coarsest.
        config: of the network.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: Shape3 | None, config: NetworkConfig
    ) -> None:
        super().__init__()
        self.project = project(in_channels, out_channels, config)
        self.stride = stride

    def forward(self, features: Features, coarser: Features | None = None) -> Features:
        """Run the branch and add the coarser level, where there is one."""
        own: Tensor = self.project(features)
        if self.stride is None or coarser is None:
            return own
        n, channels, d, h, w = coarser.shape
        boxes = _boxes(own, self.stride)
        result = boxes + coarser.movedim(1, -1).reshape(n, d, 1, h, 1, w, 1, channels)
        return result.reshape(n, *own.shape[2:], channels).movedim(-1, 1)


def dense_block(
    in_channels: int, n_layers: int, kernel_size: Sequence[int], config: NetworkConfig
) -> DenseBlock:
    """A block as the network's configuration has it."""
    return DenseBlock(
        in_channels,
        config.growth_rate,
        n_layers,
        bottleneck=config.bottleneck,
        norm=config.norm,
        act=config.act,
        dropout=config.dropout,
        memory=config.memory,
        kernel_size=kernel_size,
    )


def project(
    in_channels: int, out_channels: int, config: NetworkConfig, *, bias: bool = False
) -> NormActConv:
    """Norm, activation, 1x1 convolution as the network's configuration has them."""
    return NormActConv(
        in_channels,
        out_channels,
        norm=config.norm,
        act=config.act,
        bias=bias,
        memory=config.memory,
    )


def whole_eights(n_channels: float) -> int:
    """About so many channels, in whole eights: what vector units and tensor cores like."""
    return max(8, round(n_channels / 8) * 8)


def _boxes(x: Tensor, stride: Shape3) -> Tensor:
    """(N, C, *S) to (N, d, a, h, b, w, c, C): each axis cut into lengths of its stride."""
    x = x.movedim(1, -1)
    n, *space, channels = x.shape
    boxes = [part for size, s in zip(space, stride, strict=True) for part in (size // s, s)]
    return x.reshape(n, *boxes, channels)


def _spread(x: Tensor, stride: Shape3) -> Tensor:
    """(N, out * stride's voxels, *S) to (N, out, *S * stride): channels become neighbours."""
    x = x.movedim(1, -1)
    n, d, h, w, _ = x.shape
    a, b, c = stride
    x = x.reshape(n, d, h, w, a, b, c, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(n, d * a, h * b, w * c, -1).movedim(-1, 1)
