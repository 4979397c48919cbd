"""One loss for a network that answers at several scales."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from effseg.errors import GeometryError, PlanError
from effseg.kernels import DeferredLogits
from effseg.losses.compound import CompoundLoss
from effseg.losses.scheduled import ScheduledLoss
from effseg.losses.sums import Labels
from effseg.types import Logits


class DeepSupervisionLoss(nn.Module):
    """The weighted mean of a loss over the outputs of a network, finest first.

    Output i counts 2^-i, over the sum of these (Isensee et al. 2021, nnU-Net,
    doi:10.1038/s41592-020-01008-z). Labels come down to a coarser output by keeping every n-th
    voxel from the first, as a strided convolution does: no label is ever mixed or invented.

    Args:
        loss: of logits (N, C, *S), made or deferred, and labels (N, *S).
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, outputs: Sequence[Logits | DeferredLogits], labels: Labels
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            outputs: logits (N, C, *S_i), finest first; S_0 is the labels' own.
            labels: (N, *S).

        Raises:
            GeometryError: if there is no output, or a length of the labels is no multiple of an
                output's.
        """
        _check_some(outputs)
        if not isinstance(self.loss, CompoundLoss | ScheduledLoss):
            return _weighted([self.loss(logits, _strided(labels, logits)) for logits in outputs])
        loss = self.of_terms(self.terms(outputs, labels))
        return loss if outputs[0].dtype == torch.float64 else loss.float()

    def terms(
        self, outputs: Sequence[Logits | DeferredLogits], labels: Labels
    ) -> Float64[Tensor, "batch outputs terms"]:
        """All that the loss reads of each sample; see `CompoundLoss.terms`.

        Raises:
            GeometryError: as `forward` says.
        """
        _check_some(outputs)
        close = self._summed.closeness(labels)
        rows = [
            self._summed.terms(
                logits,
                _strided(labels, logits),
                None if close is None else _strided(close, logits),
            )
            for logits in outputs
        ]
        return torch.stack(rows, dim=1)

    def of_terms(self, terms: Float64[Tensor, "batch outputs terms"]) -> Float64[Tensor, ""]:
        """The loss of a batch from the `terms` of all its samples, a scalar."""
        return _weighted(
            [
                # only the finest output says how common classes are, once a step
                self._summed.of_terms(rows, learn=index == 0)
                for index, rows in enumerate(terms.unbind(1))
            ]
        )

    @property
    def _summed(self) -> CompoundLoss | ScheduledLoss:
        if not isinstance(self.loss, CompoundLoss | ScheduledLoss):
            raise PlanError(
                f"{type(self.loss).__name__} is no loss of sums over samples; expected CompoundLoss"
            )
        return self.loss


def _check_some(outputs: Sequence[object]) -> None:
    if len(outputs) == 0:
        raise GeometryError("no outputs to supervise; expected logits, finest first")


def _weighted(losses: Sequence[Tensor]) -> Tensor:
    weights = [0.5**i for i in range(len(losses))]
    first, *rest = (w / sum(weights) * loss for w, loss in zip(weights, losses, strict=True))
    return sum(rest, start=first)


def _strided(labels: Tensor, logits: Tensor | DeferredLogits) -> Tensor:
    space, coarse = labels.shape[1:], logits.shape[2:]
    if len(space) != len(coarse) or any(
        b == 0 or a % b for a, b in zip(space, coarse, strict=True)
    ):
        raise GeometryError(
            f"labels of {tuple(space)} voxels for an output of {tuple(coarse)}; expected multiples:"
            " choose a patch_size that is a multiple of the network's total stride"
        )
    steps = (slice(None, None, a // b) for a, b in zip(space, coarse, strict=True))
    return labels[(slice(None), *steps)]
