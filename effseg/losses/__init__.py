"""Losses: pure modules of logits, made or deferred, and labels."""

from effseg.losses.deep_supervision import DeepSupervisionLoss
from effseg.losses.dice_ce import DiceCELoss, check_classes
from effseg.losses.sums import class_sums, voxel_chunks
from effseg.plans import LossConfig


def build_loss(config: LossConfig, *, ignore_label: int | None, n_classes: int) -> DiceCELoss:
    """The loss of a plan, for one output of (N, n_classes, *S) and labels of (N, *S).

    Wrap it in `DeepSupervisionLoss` for a network that gives several.

    Raises:
        PlanError: for fewer than two classes, an ignore label that is also a class, or weights
            that are both 0.
    """
    check_classes(n_classes, ignore_label=ignore_label)
    return DiceCELoss(
        dice_weight=config.dice_weight,
        cross_entropy_weight=config.cross_entropy_weight,
        dice_background=config.dice_background,
        dice_over_batch=config.dice_over_batch,
        dice_smooth=config.dice_smooth,
        ignore_label=ignore_label,
    )


__all__ = [
    "DeepSupervisionLoss",
    "DiceCELoss",
    "build_loss",
    "class_sums",
    "voxel_chunks",
]
