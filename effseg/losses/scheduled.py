"""Losses that take turns: one is the loss now."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from effseg.kernels import DeferredLogits
from effseg.losses.compound import CompoundLoss
from effseg.losses.sums import Labels
from effseg.types import Logits


class ScheduledLoss(nn.Module):
    """Acts as one of several losses; whoever trains says which, by `stage`.

    Args:
        stages: in their order; the first is the loss to begin with.

    Attributes:
        stage: which is the loss now, from 0; checkpoints keep it.
    """

    def __init__(self, stages: Sequence[CompoundLoss]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.stage = 0

    @property
    def now(self) -> CompoundLoss:
        """The loss of this stage."""
        loss = self.stages[self.stage]
        assert isinstance(loss, CompoundLoss)
        return loss

    def forward(self, logits: Logits | DeferredLogits, labels: Labels) -> Float[Tensor, ""]:
        """The loss of a batch; see `CompoundLoss`."""
        value: Tensor = self.now(logits, labels)
        return value

    def closeness(self, labels: Labels) -> Labels | None:
        """How close each voxel lies to an edge; see `CompoundLoss.closeness`."""
        return self.now.closeness(labels)

    def terms(
        self,
        logits: Logits | DeferredLogits,
        labels: Labels,
        closeness: Labels | None = None,
    ) -> Float64[Tensor, "batch terms"]:
        """All that the loss of now reads of each sample; see `CompoundLoss.terms`."""
        return self.now.terms(logits, labels, closeness)

    def of_terms(
        self, terms: Float64[Tensor, "batch terms"], *, learn: bool = True
    ) -> Float64[Tensor, ""]:
        """The loss of a batch from the `terms` of all its samples; see `CompoundLoss.of_terms`."""
        return self.now.of_terms(terms, learn=learn)

    def get_extra_state(self) -> Tensor:
        """For checkpoints: the stage."""
        return torch.tensor(self.stage)

    def set_extra_state(self, state: Any) -> None:
        """From a checkpoint: the stage."""
        self.stage = int(state)
