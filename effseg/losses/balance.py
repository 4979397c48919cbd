"""Weights of classes and samples that follow the batches: neither collapse is a falling loss."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn


class Balance(nn.Module):
    """A cross-entropy whose weights come of the batch at hand and of those before.

    Of each class two shares of the voxels are kept, smoothed over batches: its reference's, R, and
    the part of that which is missed, E, in probabilities. Class c counts as

        n_c = min(R_c, E_c + what all other classes hold)

    voxels, at least as many as in the batch at hand, and at least one; the loss is the sum of
    cross-entropy over its voxels divided by n_c, averaged over the classes that occur. So:

    - A class of less than half of the voxels counts as much as any other, however rare it is: to
      call it background costs as much as it ever does.
    - The majority counts by its errors. While much of it is called something else it weighs like
      one class among others, and calling everything lesion costs the most there is; as its errors
      shrink each weighs more, up to what a missed voxel of the others weighs. A balance of inverse
      shares alone (n_c = R_c) hardly minds a false lesion in every thousandth voxel.

    Of two classes, one rare with share r, the best constant answer is then about sqrt(r): between
    r, where plain cross-entropy stays and calls everything background, and 1/2, that of inverse
    shares.

    A sample weighs 1 + e over the mean of that, e its error: 1 - Dice of all that is not
    background, smoothed by how much of it there usually is, so that a sample with nothing to find
    weighs by what is falsely found in it.

    Weights are constants to the gradient, and in evaluation they stay. Processes that train
    together share their counts. It costs two numbers a class.

    Args:
        n_classes: background first.
        smoothing: share of the counts that is kept from batch to batch, 0 to below 1.
    """

    shares: Tensor
    seen: Tensor

    def __init__(self, n_classes: int, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        # kept by checkpoints: R and E, and what the weights of all steps in them add up to
        self.register_buffer("shares", torch.zeros(2, n_classes, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, sums: Mapping[str, Tensor], *, learn: bool) -> Tensor:
        """The balanced cross-entropy of a batch, a scalar.

        Args:
            sums: `intersection`, `predicted`, `reference` and `focal`, (samples, classes) each.
            learn: whether to count this batch into the shares.
        """
        with torch.no_grad():
            of_voxels = self._weights(sums, learn=learn)
        return -(sums["focal"] * of_voxels).sum()

    def _weights(self, sums: Mapping[str, Tensor], *, learn: bool) -> Tensor:
        """Of a voxel of each sample and class, (samples, classes)."""
        intersection, reference = sums["intersection"], sums["reference"]
        counts = torch.stack((reference, (reference - intersection).clamp(min=0))).sum(1)
        if learn:
            self._learn(counts)
        n_voxels = reference.sum()
        usual = self.shares / torch.where(self.seen > 0, self.seen, 1) * n_voxels
        usual = torch.where(self.seen > 0, usual, counts)
        n = torch.maximum(_counted(usual), _counted(counts)).clamp(min=1)
        n_classes = (usual[0] > 0).sum().clamp(min=1)
        size = (usual[0, 1:].sum() / len(reference)).clamp(min=1)
        hit, predicted, wanted = (
            sums[name][:, 1:].sum(1) for name in ("intersection", "predicted", "reference")
        )
        each = 2 - (2 * hit + size) / (predicted + wanted + size)
        return (each / each.mean()).unsqueeze(1) / (n * n_classes)

    def _learn(self, counts: Tensor) -> None:
        """Count a batch, (2, classes) voxels, into the shares."""
        if distributed.is_available() and distributed.is_initialized():
            counts = counts.clone()
            distributed.all_reduce(counts)
        n_voxels = counts[0].sum()
        # a batch of ignored voxels alone says nothing
        kept = torch.where(n_voxels > 0, self.smoothing, 1.0)
        self.shares.mul_(kept).add_((1 - kept) * counts / n_voxels.clamp(min=1))
        self.seen.mul_(kept).add_(1 - kept)


def _counted(counts: Tensor) -> Tensor:
    """How many voxels each class counts as, of its reference and what is missed of it."""
    reference, missed = counts.unbind()
    return torch.minimum(reference, missed + reference.sum() - reference)
