"""Dice plus cross-entropy on logits, made or deferred, with an ignore label."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from effseg.errors import DataError, GeometryError, PlanError
from effseg.kernels import DeferredLogits
from effseg.kernels.class_sums import N_SUMS
from effseg.losses.sums import Labels, class_sums
from effseg.types import Logits


class DiceCELoss(nn.Module):
    """`dice_weight` (1 - mean Dice) + `cross_entropy_weight` mean cross-entropy, of a softmax.

    Dice of a class is (2 I + s) / (P + R + s) with intersection I, sum of probabilities P,
    reference voxels R and `dice_smooth` s (Milletari et al. 2016, V-Net, arXiv:1606.04797, without
    its squares), averaged over the classes, and over the samples unless `dice_over_batch`.
    Cross-entropy is averaged over the voxels that are not ignored; with `focal_gamma` g a voxel
    counts (1 - p)^g of itself, p the probability of its label. Class weights multiply 1 - Dice of
    each class, whose mean stays over their number, and voxels in the mean of the cross-entropy, as
    in MONAI. Both terms are of this process's batch alone.

    Edge cases, all finite:

    - A class that is absent scores s / (P + s): with a small s near 0 until its probabilities
      vanish, its gradient nearly nil, and cross-entropy alone teaches absence; with an s of some
      voxels a few false voxels cost as much as a few missed ones.
    - Ignored voxels add nothing to value or gradient; where all are ignored both are 0.

    A label that is neither a class nor ignored makes the loss NaN and its gradient 0: to refuse it
    by name would stop a GPU for each batch. Only logits and labels are kept for backward, whatever
    their types, or of deferred logits the features; sums and gradient are float32 within autocast.

    Args:
        dice_weight: at least 0.
        cross_entropy_weight: at least 0; not both 0.
        dice_background: average class 0 into Dice too.
        dice_over_batch: one Dice a class over the whole batch, not one a sample.
        dice_smooth: s above, in voxels, above 0.
        ignore_label: left out of loss and gradient.
        weights: of each class, background first; at least 0, not all 0. None: 1 each.
        focal_gamma: at least 0, which is plain cross-entropy.

    Raises:
        PlanError: for weights that are negative, not finite or all 0, or a gamma that is negative
            or not finite.
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        dice_weight: float = 1.0,
        cross_entropy_weight: float = 1.0,
        dice_background: bool = False,
        dice_over_batch: bool = True,
        dice_smooth: float = 1e-5,
        ignore_label: int | None = None,
        weights: Sequence[float] | None = None,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__()
        if not _weigh(dice_weight, cross_entropy_weight):
            raise PlanError(
                f"loss weights: dice {dice_weight}, cross-entropy {cross_entropy_weight}; "
                "expected none below 0 and one above"
            )
        if weights is not None and not _weigh(*weights):
            raise PlanError(f"class weights {tuple(weights)}; expected none below 0 and one above")
        if not 0 <= focal_gamma < math.inf:
            raise PlanError(f"focal_gamma {focal_gamma}; expected at least 0")
        self.dice_weight = dice_weight
        self.cross_entropy_weight = cross_entropy_weight
        self.dice_background = dice_background
        self.dice_over_batch = dice_over_batch
        self.dice_smooth = dice_smooth
        self.ignore_label = ignore_label
        self.focal_gamma = focal_gamma
        # moves with the module, and is no part of what a training learns
        values = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.register_buffer("weights", values, persistent=False)

    def forward(self, logits: Logits | DeferredLogits, labels: Labels) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits: (N, C, *S), C >= 2.
            labels: (N, *S), integers 0 .. C-1 and `ignore_label`; no channel axis.

        Returns:
            A scalar, float32; float64 for float64 logits.

        Raises:
            GeometryError: if the shapes do not fit each other or hold no voxel.
            DataError: if the types are not floating and integer, or do not hold the ignore label.
            PlanError: for a single channel, an ignore label that is also a class, or another number
                of class weights than classes.
        """
        loss = self.of_terms(self.terms(logits, labels))
        return loss if logits.dtype == torch.float64 else loss.float()

    def terms(
        self, logits: Logits | DeferredLogits, labels: Labels
    ) -> Float64[Tensor, "batch terms"]:
        """All that the loss reads of each sample, one row a sample.

        The rows of a batch are those of its samples, so that samples may come one after the other.

        Raises:
            GeometryError, DataError, PlanError: as `forward` says.
        """
        check_batch(logits, labels, ignore_label=self.ignore_label)
        n_classes = logits.shape[1]
        if self.weights is not None and len(self.weights) != n_classes:
            raise PlanError(
                f"{len(self.weights)} class weights for {n_classes} classes; expected as many"
            )
        sums = class_sums(
            logits, labels, ignore_label=self.ignore_label, focal_gamma=self.focal_gamma
        )
        n_expected = torch.full_like(sums[:, 0, :1], labels[0].numel())
        if self.ignore_label is not None:
            n_expected -= (labels == self.ignore_label).flatten(1).sum(1, keepdim=True)
        return torch.cat((sums.flatten(1), n_expected), dim=1)

    def of_terms(self, terms: Float64[Tensor, "batch terms"]) -> Float64[Tensor, ""]:
        """The loss of a batch from the `terms` of all its samples, a scalar."""
        n_expected = terms[:, -1].sum()
        sums = terms[:, :-1].unflatten(1, (N_SUMS, -1))
        if self.dice_over_batch:
            sums = sums.sum(0, keepdim=True)
        intersection, predicted, reference, _, focal = sums.unbind(1)
        smooth = self.dice_smooth
        missed = 1 - (2 * intersection + smooth) / (predicted + reference + smooth)
        n_known = n_weighed = reference.sum()
        if self.weights is not None:
            missed, focal = missed * self.weights, focal * self.weights
            n_weighed = (reference * self.weights).sum()
        loss = self.dice_weight * missed[:, 0 if self.dice_background else 1 :].mean()
        mean_of = torch.where(n_weighed > 0, n_weighed, 1)
        loss = loss - self.cross_entropy_weight * focal.sum() / mean_of
        return torch.where(n_known == n_expected, loss, math.nan)

    def extra_repr(self) -> str:
        """The arguments, for print(module)."""
        return (
            f"dice_weight={self.dice_weight}, cross_entropy_weight={self.cross_entropy_weight}, "
            f"dice_background={self.dice_background}, dice_over_batch={self.dice_over_batch}, "
            f"dice_smooth={self.dice_smooth}, ignore_label={self.ignore_label}, "
            f"weights={None if self.weights is None else self.weights.tolist()}, "
            f"focal_gamma={self.focal_gamma}"
        )


def _weigh(*weights: float) -> bool:
    """Whether weights are finite, none below 0 and one above."""
    return min(weights, default=0) >= 0 and 0 < sum(weights) < math.inf


def check_batch(
    logits: Tensor | DeferredLogits, labels: Tensor, *, ignore_label: int | None
) -> None:
    """Refuse logits and labels that cannot be a batch of this loss; reads no values, only shapes.

    Raises:
        GeometryError, DataError, PlanError: as `DiceCELoss.forward` says.
    """
    expected = (logits.shape[0], *logits.shape[2:])
    if len(logits.shape) < 3 or labels.shape != expected:
        raise GeometryError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (N, C, *S) "
            f"and (N, *S), without a channel axis: labels[:, 0] takes one off"
        )
    if math.prod(logits.shape) == 0:
        raise GeometryError(f"logits {tuple(logits.shape)} hold no voxel; expected at least one")
    if not logits.dtype.is_floating_point:
        raise DataError(f"logits are {logits.dtype}; expected a floating type, as a network gives")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"labels are {labels.dtype}; expected integers: labels.to(torch.uint8)")
    n_classes = logits.shape[1]
    check_classes(n_classes, ignore_label=ignore_label)
    held = torch.iinfo(labels.dtype)
    # torch compares modulo 256 here: in uint8 a 255 equals -1
    if ignore_label is not None and not held.min <= ignore_label <= held.max:
        raise DataError(
            f"labels are {labels.dtype} ({held.min} to {held.max}), which cannot hold the ignore "
            f"label {ignore_label}; give labels.to(torch.int64), or another ignore label"
        )


def check_classes(n_classes: int, *, ignore_label: int | None) -> None:
    """Refuse a number of classes, or an ignore label, that a softmax loss cannot work with.

    Raises:
        PlanError: for fewer than two classes, or an ignore label that is also a class.
    """
    if n_classes < 2:
        raise PlanError(
            f"{n_classes} output channels; expected at least 2, background first: one foreground "
            "label is two classes"
        )
    if ignore_label is not None and 0 <= ignore_label < n_classes:
        raise PlanError(
            f"ignore_label {ignore_label} is also a class of 0 to {n_classes - 1}; "
            "give ignored voxels another value, such as 255"
        )
