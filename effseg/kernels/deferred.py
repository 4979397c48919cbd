"""Logits that are not there yet: features, and the head that would make them.

A network may end below its head, and a loss make the logits itself, a tile of voxels at a time.
What passes between the two is this.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FoldedNorm:
    """A norm and an activation as they act in this step: act(scale * x + shift).

    Attributes:
        scale: (1 or batch, channels); differentiable on the norm's gain, as is shift on gain and
            bias. The statistics count as constants in both.
        shift: see scale.
        mean: of each channel, (1 or batch, channels).
        rstd: 1 / sqrt(variance + eps), (1 or batch, channels).
        n_values: values behind each row of statistics, where they come from the features
            themselves; None where they are fixed.
        slope: of the activation below zero; 0 is ReLU.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor
    n_values: int | None
    slope: float


@dataclass(frozen=True)
class DeferredLogits:
    """What the logits of a batch are made of.

    Attributes:
        rows: features, (batch, voxels, channels); a view in any memory layout.
        weight: of the 1x1 convolution, (classes, channels), in the rows' type.
        bias: of the 1x1 convolution, (classes,), in the rows' type.
        norm: what stands between features and convolution.
        space: the lengths of the axes that `voxels` runs over.
    """

    rows: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: FoldedNorm | None
    space: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The logits', (batch, classes, *space)."""
        return (self.rows.shape[0], self.weight.shape[0], *self.space)

    @property
    def dtype(self) -> torch.dtype:
        """The logits'."""
        return self.rows.dtype
