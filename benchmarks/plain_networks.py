"""Convolutional U-Nets of other houses' layouts, and one as a user might bring it.

`nnU-Net`'s two stand in for those of `dynamic_network_architectures` where that is not installed:
the same convolutions, norms, activations and additions in the same order, so the same bytes; its
heads of the coarser stages, which run only under deep supervision, are left out.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNormAct(nn.Sequential):
    """3x3x3 convolution, instance norm, leaky ReLU in place."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(in_channels, out_channels, 3, stride, padding=1),
            nn.InstanceNorm3d(out_channels, affine=True),
            nn.LeakyReLU(inplace=True),
        )


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut: a mean for the stride, 1x1x1 for the width."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNormAct(in_channels, out_channels, stride)
        self.second = nn.Sequential(
            nn.Conv3d(out_channels, out_channels, 3, padding=1),
            nn.InstanceNorm3d(out_channels, affine=True),
        )
        shortcut: list[nn.Module] = []
        if stride != 1:
            shortcut.append(nn.AvgPool3d(stride, stride))
        if in_channels != out_channels:
            shortcut.append(nn.Conv3d(in_channels, out_channels, 1, bias=False))
            shortcut.append(nn.InstanceNorm3d(out_channels, affine=True))
        self.shortcut = nn.Sequential(*shortcut)
        self.act = nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, *S) -> (N, out, *S / stride)."""
        beside = self.shortcut(x)
        result: Tensor = self.act(self.second(self.first(x)) + beside)
        return result


class PlainUNet(nn.Module):
    """A U-Net: strided convolutions down, transposed ones up, skips concatenated.

    Forward: (N, 1, *S) -> logits (N, n_classes, *S).

    Args:
        features: of each stage, the finest first; each but the first halves the space.
        n_classes: of the logits.
        n_blocks: residual blocks of each stage on the way down, with one convolution on the way up;
            None: two convolutions either way.
    """

    def __init__(
        self, features: Sequence[int], n_classes: int, n_blocks: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.stem = nn.Identity() if n_blocks is None else ConvNormAct(1, features[0])
        self.encoder, self.up, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        block = ConvNormAct if n_blocks is None else ResidualBlock
        width = 1 if n_blocks is None else features[0]
        for stage, out in enumerate(features):
            n = 2 if n_blocks is None else n_blocks[stage]
            parts = [block(width, out, stride=1 if stage == 0 else 2)]
            parts += [block(out, out) for _ in range(n - 1)]
            self.encoder.append(nn.Sequential(*parts))
            width = out
        for out in reversed(features[:-1]):
            self.up.append(nn.ConvTranspose3d(width, out, 2, 2))
            n = 2 if n_blocks is None else 1
            convs = [ConvNormAct(2 * out if i == 0 else out, out) for i in range(n)]
            self.decoder.append(nn.Sequential(*convs))
            width = out
        self.head = nn.Conv3d(width, n_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Label each voxel."""
        x, skips = self.stem(image), []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for up, stage in zip(self.up, self.decoder, strict=True):
            x = stage(torch.cat((up(x), skips.pop()), 1))
        logits: Tensor = self.head(x)
        return logits


class UsersUNet(nn.Module):
    """What nobody planned for: group norm, SiLU, odd widths, a stem of stride 2, trilinear ups.

    Forward: (N, 1, *S) -> logits (N, n_classes, *S).
    """

    def __init__(self, n_classes: int, widths: Sequence[int] = (12, 20, 36, 60)) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, widths[0], 5, stride=2, padding=2)
        self.downs = nn.ModuleList(_with_group_norm(a, b, 2) for a, b in pairwise(widths))
        self.ups = nn.ModuleList(
            _with_group_norm(a + b, b, 1) for a, b in pairwise(reversed(widths))
        )
        self.last = nn.Sequential(nn.Conv3d(widths[0] + 1, 8, 3, padding=1), nn.SiLU())
        self.out = nn.Conv3d(8, n_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Label each voxel."""
        x = F.silu(self.stem(image))
        skips = [image, x]
        for down in self.downs:
            x = down(x)
            skips.append(x)
        skips.pop()
        for up in (*self.ups, self.last):
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
            x = up(torch.cat((x, skip), 1))
        logits: Tensor = self.out(x)
        return logits


def _with_group_norm(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.GroupNorm(4, out_channels),
        nn.SiLU(),
        nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.GroupNorm(4, out_channels),
        nn.SiLU(),
    )
