"""Overlap terms and cross-entropy, weighed and added, on logits, made or deferred."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from effseg.errors import GeometryError, PlanError
from effseg.kernels import DeferredLogits
from effseg.kernels.class_tiles import Counting
from effseg.kernels.edges import edge_closeness
from effseg.losses.balance import Balance
from effseg.losses.doors import check_batch, check_classes, classes_of
from effseg.losses.overlap import missed_overlaps
from effseg.losses.sums import Labels, class_sums
from effseg.plans import LossConfig
from effseg.types import Logits

PLAIN = LossConfig()


class CompoundLoss(nn.Module):
    """The terms of a `LossConfig`: Dice and its kin, and cross-entropy, each times its weight.

    `overlap.missed_overlaps` has the overlap terms. They are averaged over the classes, and over
    the samples unless `dice_over_batch`. Cross-entropy is averaged over the voxels that are not
    ignored; with `focal_gamma` g a voxel counts (1 - p)^g of itself, p the probability of its label
    (Lin et al. 2017); with an `edge_weight` w it counts 1 + w exp(-d^2 / (2 edge_mm^2)), d its
    distance to the nearest voxel at an edge of a label (after Ronneberger et al. 2015, U-Net,
    arXiv:1505.04597), which takes two bytes a voxel. Class weights multiply 1 - Dice of each class,
    whose mean stays over their number, and voxels in the mean of the cross-entropy, as in MONAI.
    All are of this process's batch alone.

    One channel is a sigmoid: foreground or not. With `one_vs_rest` each of several channels is, and
    cross-entropy is the mean of the channels' binary ones, weighed by class. With `balanced` the
    weights of classes and samples in the cross-entropy follow the batches (`balance.Balance`).

    Edge cases, all finite:

    - A class that is absent scores s / (P + s): with a small s near 0 until its probabilities
      vanish, its gradient nearly nil, and cross-entropy alone teaches absence; with an s of some
      voxels a few false voxels cost as much as a few missed ones.
    - Ignored voxels add nothing to value or gradient; where all are ignored both are 0.

    A label that is neither a class nor ignored makes the loss NaN and its gradient 0: to refuse it
    by name would stop a GPU for each batch. Only logits and labels are kept for backward, whatever
    their types, or of deferred logits the features; sums and gradient are float32 within autocast.

    Args:
        config: which terms, and how they count.
        n_channels: of the outputs, where only one number will do; `balanced` needs it.
        ignore_label: left out of loss and gradient.
        spacing: mm between voxels along each axis of the labels, for `edge_mm`.

    Raises:
        PlanError: for class weights that are still to be taken of the voxel shares, settings that
            do not fit the channels, or an ignore label that is also a class.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        config: LossConfig = PLAIN,
        *,
        n_channels: int | None = None,
        ignore_label: int | None = None,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        if config.class_weights == "voxel_shares":
            raise PlanError(
                'class_weights are "voxel_shares"; expected numbers, as planner.check_plan fills '
                "them in from a plan's fingerprint"
            )
        self.config = config
        self.n_channels = n_channels
        self.counting = Counting(
            ignore_label=ignore_label,
            focal_gamma=config.focal_gamma,
            one_vs_rest=config.one_vs_rest,
            squared=config.squared_dice_weight > 0,
            edge_weight=config.edge_weight,
        )
        self.sigmas = tuple(config.edge_mm / length for length in spacing)
        # moves with the module, and is no part of what a training learns
        weights = config.class_weights
        values = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.register_buffer("class_weights", values, persistent=False)
        self.balance: Balance | None = None
        if n_channels is not None:
            check_classes(classes_of(n_channels), ignore_label=ignore_label)
            self._check_channels(n_channels)
        if config.balanced:
            if n_channels is None:
                raise PlanError("balanced counts each class; give the loss n_channels")
            self.balance = Balance(classes_of(n_channels), config.balance_smoothing)

    def forward(self, logits: Logits | DeferredLogits, labels: Labels) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits: (N, C, *S).
            labels: (N, *S), integers 0 .. C-1 and `ignore_label`; no channel axis. Of one channel
                0 and 1.

        Returns:
            A scalar, float32; float64 for float64 logits.

        Raises:
            GeometryError: if the shapes do not fit each other or hold no voxel.
            DataError: if the types are not floating and integer, or do not hold the ignore label.
            PlanError: for an ignore label that is also a class, another number of channels than
                the loss is for or has class weights for, or one channel against the rest.
        """
        loss = self.of_terms(self.terms(logits, labels))
        return loss if logits.dtype == torch.float64 else loss.float()

    def closeness(self, labels: Labels) -> Labels | None:
        """How close each voxel lies to an edge, in a byte a voxel; None where that counts nothing.

        Raises:
            GeometryError: if labels have another number of axes than the spacing.
        """
        if self.config.edge_weight == 0:
            return None
        if labels.ndim != 1 + len(self.sigmas):
            raise GeometryError(
                f"labels {tuple(labels.shape)} for a spacing along {len(self.sigmas)} axes; "
                "expected (N, *S) with as many"
            )
        ignore_label = self.counting.ignore_label
        return edge_closeness(labels, ignore_label=ignore_label, sigmas=self.sigmas)

    def terms(
        self,
        logits: Logits | DeferredLogits,
        labels: Labels,
        closeness: Labels | None = None,
    ) -> Float64[Tensor, "batch terms"]:
        """All that the loss reads of each sample, one row a sample.

        The rows of a batch are those of its samples, so that samples may come one after the other.

        Args:
            logits: as `forward`.
            labels: as `forward`.
            closeness: of these labels, where they are some of those it was taken of; None: it is
                taken of them.

        Raises:
            GeometryError, DataError, PlanError: as `forward` says.
        """
        ignore_label = self.counting.ignore_label
        check_batch(logits, labels, ignore_label=ignore_label)
        self._check_channels(logits.shape[1])
        close = self.closeness(labels) if closeness is None else closeness
        sums = class_sums(logits, labels, self.counting, closeness=close)
        n_expected = torch.full_like(sums[:, 0, :1], labels[0].numel())
        if ignore_label is not None:
            n_expected -= (labels == ignore_label).flatten(1).sum(1, keepdim=True)
        return torch.cat((sums.flatten(1), n_expected), dim=1)

    def of_terms(
        self, terms: Float64[Tensor, "batch terms"], *, learn: bool = True
    ) -> Float64[Tensor, ""]:
        """The loss of a batch from the `terms` of all its samples, a scalar.

        Args:
            terms: one row a sample.
            learn: whether in training the balance may learn of this batch.
        """
        names = self.counting.names
        rows = terms[:, :-1].unflatten(1, (len(names), -1))
        of_samples = dict(zip(names, rows.unbind(1), strict=True))
        of_batch = {name: values.sum(0, keepdim=True) for name, values in of_samples.items()}
        config = self.config
        missed = missed_overlaps(of_batch if config.dice_over_batch else of_samples, config)
        if self.class_weights is not None:
            missed = missed * self.class_weights
        loss = missed[:, 0 if config.dice_background else 1 :].mean()
        if config.cross_entropy_weight > 0:
            entropy = self._entropy(of_samples, of_batch, learn=learn)
            loss = loss + config.cross_entropy_weight * entropy
        n_known = of_batch["reference"].sum()
        return torch.where(n_known == terms[:, -1].sum(), loss, math.nan)

    def _check_channels(self, n_channels: int) -> None:
        """Refuse outputs of so many channels where the settings are of another number."""
        n_classes = classes_of(n_channels)
        if self.n_channels not in (None, n_channels):
            raise PlanError(
                f"logits of {n_channels} channels for a loss of {self.n_channels}; expected as "
                "many: network.out_channels and the loss must agree"
            )
        if self.class_weights is not None and len(self.class_weights) != n_classes:
            raise PlanError(
                f"{len(self.class_weights)} class weights for {n_classes} classes; expected as many"
            )
        if self.config.one_vs_rest and n_channels == 1:
            raise PlanError(
                "one_vs_rest with 1 channel, expected 2 or more: one channel is a sigmoid already, "
                "leave one_vs_rest out"
            )

    def _entropy(
        self, of_samples: dict[str, Tensor], of_batch: dict[str, Tensor], *, learn: bool
    ) -> Tensor:
        """The cross-entropy of a batch, a scalar."""
        if self.balance is not None:
            balanced: Tensor = self.balance(of_samples, learn=learn and self.training)
            return balanced
        focal, counted = of_batch["focal"], of_batch.get("weighed", of_batch["reference"])
        weights = torch.ones_like(focal) if self.class_weights is None else self.class_weights
        if self.config.one_vs_rest:
            # each voxel is for or against each class
            return -((focal + of_batch["rejected"]) * weights).sum() / _or_one(
                counted.sum() * weights.sum()
            )
        return -(focal * weights).sum() / _or_one((counted * weights).sum())

    def extra_repr(self) -> str:
        """What differs from the usual loss, for print(module)."""
        said = {name: value for name, value in self.config if value != getattr(PLAIN, name)}
        said["ignore_label"] = self.counting.ignore_label
        return ", ".join(f"{name}={value}" for name, value in said.items())


def _or_one(total: Tensor) -> Tensor:
    """What a mean is taken over; 1 where there is nothing."""
    return torch.where(total > 0, total, 1)
