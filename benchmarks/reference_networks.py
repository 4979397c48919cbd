"""Dense U-Nets on which memory schemes are compared: full width at full resolution.

R1 and R2 are laid out without regard to memory: a dense block at full resolution on both sides,
skips concatenated, a head on every feature of the last block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dense_schemes import Scheme, build_block
from torch import Tensor, nn

from effseg.networks import MemoryMode, NormActConv


@dataclass(frozen=True)
class Layout:
    """The shape of a reference network.

    Attributes:
        encoder: dense layers of each stage on the way down.
        decoder: on the way up, coarsest first.
        growth_rate: channels each layer adds.
        c0: channels of the stem.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    growth_rate: int
    c0: int


LAYOUTS = {
    "R1": Layout((4, 4, 4, 4), (4, 4, 4), growth_rate=16, c0=32),
    "R2": Layout((3, 4, 6, 8), (4, 3, 2), growth_rate=8, c0=16),
}
"""1.73 and 0.52 million parameters; their heads read 309 and 133 channels."""


class ReferenceUNet(nn.Module):
    """A dense U-Net under one memory scheme: (N, 1, *S) -> logits (N, out_channels, *S).

    Blocks: bottleneck 4, batch norm, ReLU. Between them norm, activation and a convolution to half
    the channels: down, 1x1x1 and the mean over 2x2x2 voxels; up, transposed, with kernel and stride
    2. The schemes share one state dict and give the same numbers. Under "shared" nothing is
    concatenated; under the others but "plain" what stands between blocks is recomputed as well.
    """

    def __init__(self, layout: Layout, out_channels: int, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        glue: MemoryMode = scheme if scheme in ("plain", "shared") else "checkpoint"
        self.stem = nn.Conv3d(1, layout.c0, 3, padding=1, bias=False)
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = layout.c0, []
        for stage, n_layers in enumerate(layout.encoder):
            if stage > 0:
                self.down.append(NormActConv(width, width // 2, memory=glue))
                width //= 2
            self.encoder.append(build_block(width, layout.growth_rate, n_layers, scheme))
            width += n_layers * layout.growth_rate
            skips.append(width)
        skips.pop()
        for n_layers in layout.decoder:
            self.up.append(NormActConv(width, 8 * (width // 2), memory=glue))
            width = width // 2 + skips.pop()
            self.decoder.append(build_block(width, layout.growth_rate, n_layers, scheme))
            width += n_layers * layout.growth_rate
        self.head = NormActConv(width, out_channels, bias=True, memory=glue)

    def forward(self, image: Tensor) -> Tensor:
        """Label each voxel."""
        features = self._run(self.encoder[0], [self.stem(image)])
        skips: list[Sequence[Tensor]] = []
        for down, block in zip(self.down, self.encoder[1:], strict=True):
            skips.append(features)
            features = self._run(block, [halved(down(features))])
        for up, block in zip(self.up, self.decoder, strict=True):
            features = self._run(block, [unfolded(up(features)), *skips.pop()])
        logits: Tensor = self.head(features)
        return logits

    def _run(self, block: nn.Module, segments: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.scheme == "shared":
            result: Sequence[Tensor] = block(segments)
            return result
        return (block(segments[0] if len(segments) == 1 else torch.cat(list(segments), dim=1)),)


def halved(features: Tensor) -> Tensor:
    """The mean over boxes of 2x2x2 voxels, by reshaping: no operator that autocast changes."""
    rows = features.movedim(1, -1)
    n, d, h, w, c = rows.shape
    result: Tensor = rows.reshape(n, d // 2, 2, h // 2, 2, w // 2, 2, c).mean((2, 4, 6))
    return result.movedim(-1, 1)


def unfolded(features: Tensor) -> Tensor:
    """Give a coarse voxel's eight parts to its eight fine voxels.

    After a 1x1x1 convolution to eight times the channels this is a transposed convolution with
    kernel and stride 2.
    """
    rows = features.movedim(1, -1)
    n, d, h, w, c = rows.shape
    rows = rows.reshape(n, d, h, w, 2, 2, 2, c // 8).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return rows.reshape(n, 2 * d, 2 * h, 2 * w, c // 8).movedim(-1, 1)
