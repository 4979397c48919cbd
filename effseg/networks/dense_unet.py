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
from effseg.networks.head import defer_logits
from effseg.networks.pointwise import NormActConv
from effseg.networks.stages import (
    Down,
    Level,
    LinkUp,
    ResidualDense,
    Up,
    dense_block,
    project,
    whole_eights,
)
from effseg.plans import NetworkConfig
from effseg.types import Features, Logits, Shape3

Answer = TypeVar("Answer")


class DenseUNet(nn.Module):
    """A U-Net of dense blocks, built from a `NetworkConfig`.

    Forward: (N, in_channels, z, y, x) -> logits (N, out_channels, z, y, x); with deep supervision
    and in training mode, a list of logits, the finest first, one for each stage of the decoder.

    With a "pyramid" head the heads read sums of all stages' features from the coarsest to their
    own, `stem_channels` wide. At full resolution a training step takes one such sum and its
    gradient more than with a plain head. `residual` and the decoder's ways: see `stages`.

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

        self.pyramid = nn.ModuleList()

        build_block = ResidualDense if config.residual else dense_block
        width = wide = config.stem_channels
        skips: list[tuple[int, int]] = []  # what leaves a stage, and how wide its dense block is
        for i, n_layers in enumerate(config.encoder_layers):
            if i > 0:
                narrow = whole_eights(wide * config.compression)
                self.down.append(Down(width, narrow, config.strides[i], config))
                width = narrow
            wide = width + n_layers * config.growth_rate
            block = build_block(width, n_layers, config.kernels[i], config)
            self.encoder.append(block)
            width = block.out_channels
            skips.append((width, wide))
        self._add_level(width, None)
        for i in reversed(range(len(config.decoder_layers))):
            stride, (skip, wide) = config.strides[i + 1], skips[i]
            narrow = whole_eights(wide * config.compression)
            if config.decoder == "linknet":
                narrow = min(narrow, skip)  # a skip that is no wider is added as it is
            up = LinkUp if config.decoder == "linknet" else Up
            self.up.append(up(width, skip, narrow, stride, config))
            block = build_block(narrow, config.decoder_layers[i], config.kernels[i], config)
            self.decoder.append(block)
            width = block.out_channels
            self._add_level(width, stride)
            if i == 0 or config.deep_supervision:
                self._add_head(width)
        if not config.decoder_layers:
            self._add_head(width)
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
        level = self.pyramid[0](skips.pop()) if self.pyramid else skips.pop()
        for i, (up, block) in enumerate(zip(self.up, self.decoder, strict=True)):
            features = block(up(features, skips.pop()))
            level = self.pyramid[i + 1](features, level) if self.pyramid else features
            if supervise and i + 1 < len(self.decoder):
                answers.append(answer(self._head(i), level))
        answers.append(answer(self._head(-1), level))
        return answers[::-1] if supervise else answers[0]

    def _add_level(self, width: int, stride: Shape3 | None) -> None:
        if self.config.head == "pyramid":
            self.pyramid.append(Level(width, self.config.stem_channels, stride, self.config))

    def _add_head(self, width: int) -> None:
        if self.config.head == "pyramid":
            width = self.config.stem_channels
        self.heads.append(project(width, self.config.out_channels, self.config, bias=True))

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
