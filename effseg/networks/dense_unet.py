"""The flagship: a U-Net of dense blocks in which nothing wide is stored twice.

Skips are never concatenated: a 1x1 convolution over `cat(skip, up)` is the sum of one over each,
and the one over the coarse features runs at their own resolution, before upsampling.

Dense blocks in a U-Net: Jegou et al., "The one hundred layers tiramisu", 2017.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from effseg.errors import GeometryError
from effseg.kernels import DeferredLogits
from effseg.networks.dense_block import DenseBlock
from effseg.networks.head import defer_logits
from effseg.networks.pointwise import NormActConv
from effseg.plans import NetworkConfig
from effseg.types import Features, Logits, Shape3

Answer = TypeVar("Answer")


class Down(nn.Module):
    """Norm, activation, 1x1 convolution, then the mean over each stride's box of voxels.

    The mean is taken by reshaping, which is deterministic on every device; average pooling is not
    on CUDA, and CPU autocast would run it in float32.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: Shape3, config: NetworkConfig
    ) -> None:
        super().__init__()
        self.project = _project(in_channels, out_channels, config)
        self.stride = stride

    def forward(self, features: Features) -> Features:
        """(N, in, *S) -> (N, out, *S / stride)."""
        x = self.project(features).movedim(1, -1)
        n, *space, channels = x.shape
        boxes = [
            part for size, s in zip(space, self.stride, strict=True) for part in (size // s, s)
        ]
        result: Tensor = x.reshape(n, *boxes, channels).mean((2, 4, 6)).movedim(-1, 1)
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
        self.project = _project(
            coarse_channels, out_channels * stride[0] * stride[1] * stride[2], config
        )
        self.skip = _project(skip_channels, out_channels, config)
        self.stride = stride

    def forward(self, coarse: Features, skip: Features) -> Features:
        """Run both branches and add them."""
        x = self.project(coarse).movedim(1, -1)
        n, d, h, w, _ = x.shape
        a, b, c = self.stride
        x = x.reshape(n, d, h, w, a, b, c, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.reshape(n, d * a, h * b, w * c, -1).movedim(-1, 1)
        result: Tensor = self.skip(skip) + x
        return result


class DenseUNet(nn.Module):
    """A U-Net of dense blocks, built from a `NetworkConfig`.

    Forward: (N, in_channels, z, y, x) -> logits (N, out_channels, z, y, x); with deep supervision
    and in training mode, a list of logits, the finest first, one for each stage of the decoder.

    Raises:
        GeometryError: in forward, if the space is not a multiple of the total stride.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        kernel = config.kernels[0]
        self.stem = nn.Conv3d(
            config.in_channels,
            config.stem_channels,
            kernel,
            padding=(kernel[0] // 2, kernel[1] // 2, kernel[2] // 2),
            bias=False,
        )
        self.down, self.encoder = nn.ModuleList(), nn.ModuleList()
        self.up, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

        width, skips = config.stem_channels, []
        for i, n_layers in enumerate(config.encoder_layers):
            if i > 0:
                narrow = _compressed(width, config)
                self.down.append(Down(width, narrow, config.strides[i], config))
                width = narrow
            block = _block(width, n_layers, config.kernels[i], config)
            self.encoder.append(block)
            width = block.out_channels
            skips.append(width)
        for i in reversed(range(len(config.decoder_layers))):
            narrow = _compressed(skips[i], config)
            self.up.append(Up(width, skips[i], narrow, config.strides[i + 1], config))
            block = _block(narrow, config.decoder_layers[i], config.kernels[i], config)
            self.decoder.append(block)
            width = block.out_channels
            if i == 0 or config.deep_supervision:
                self.heads.append(_head(width, config))
        if not config.decoder_layers:
            self.heads.append(_head(width, config))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Features) -> Logits | list[Tensor]:
        """Label each voxel of a batch of patches."""
        return self._answer(image, lambda head, features: head(features))

    def for_loss(
        self, image: Features
    ) -> Logits | list[Tensor] | DeferredLogits | list[DeferredLogits]:
        """What a loss reads in training: as `forward`, but deferred with "shared" memory.

        The loss then makes the logits itself, a tile at a time: they never exist in full.
        """
        if self.config.memory == "shared":
            deferred: DeferredLogits | list[DeferredLogits] = self._answer(image, defer_logits)
            return deferred
        logits: Logits | list[Tensor] = self(image)
        return logits

    def _answer(
        self, image: Tensor, answer: Callable[[NormActConv, Tensor], Answer]
    ) -> Answer | list[Answer]:
        """Run all below the heads, and answer for each head and its features."""
        self._check(image)
        features = self.stem(image)
        skips: list[Tensor] = []
        for i, block in enumerate(self.encoder):
            features = block(features if i == 0 else self.down[i - 1](features))
            skips.append(features)
        supervise = self.config.deep_supervision and self.training
        answers: list[Answer] = []
        skips.pop()
        for i, (up, block) in enumerate(zip(self.up, self.decoder, strict=True)):
            features = block(up(features, skips.pop()))
            if supervise and i + 1 < len(self.decoder):
                answers.append(answer(self._head(i), features))
        answers.append(answer(self._head(-1), features))
        return answers[::-1] if supervise else answers[0]

    def _head(self, index: int) -> NormActConv:
        head = self.heads[index]
        assert isinstance(head, NormActConv)
        return head

    def _check(self, image: Tensor) -> None:
        stride = self.config.total_stride
        if image.ndim != 5 or image.shape[1] != self.config.in_channels:
            raise GeometryError(
                f"input of shape {tuple(image.shape)}; expected "
                f"(batch, {self.config.in_channels}, z, y, x)"
            )
        if any(n % s for n, s in zip(image.shape[2:], stride, strict=True)):
            raise GeometryError(
                f"input of {tuple(image.shape[2:])} voxels; each length must be a multiple of the "
                f"network's total stride {stride}: pad the patch"
            )


def build_network(config: NetworkConfig) -> DenseUNet:
    """The network that a configuration describes, with fresh weights."""
    return DenseUNet(config)


def _compressed(width: int, config: NetworkConfig) -> int:
    """Channels kept between stages, in whole eights: what vector units and tensor cores like."""
    return max(8, round(width * config.compression / 8) * 8)


def _project(in_channels: int, out_channels: int, config: NetworkConfig) -> NormActConv:
    return NormActConv(
        in_channels, out_channels, norm=config.norm, act=config.act, memory=config.memory
    )


def _head(in_channels: int, config: NetworkConfig) -> NormActConv:
    return NormActConv(
        in_channels,
        config.out_channels,
        norm=config.norm,
        act=config.act,
        bias=True,
        memory=config.memory,
    )


def _block(
    in_channels: int, n_layers: int, kernel_size: Shape3, config: NetworkConfig
) -> DenseBlock:
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
