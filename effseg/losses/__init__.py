"""Losses: pure modules of logits, made or deferred, and labels."""

from collections.abc import Sequence

from effseg.losses.compound import CompoundLoss
from effseg.losses.deep_supervision import DeepSupervisionLoss
from effseg.losses.scheduled import ScheduledLoss
from effseg.losses.soft import DistillationLoss, SoftLabels, add_teacher
from effseg.losses.sums import class_sums, voxel_chunks
from effseg.plans import LossConfig
from effseg.types import Spacing


def build_loss(
    config: LossConfig,
    *,
    ignore_label: int | None,
    n_classes: int,
    spacing: Spacing = (1.0, 1.0, 1.0),
) -> CompoundLoss:
    """The loss of a plan, for one output of (N, n_classes, *S) and labels of (N, *S).

    Wrap it in `DeepSupervisionLoss` for a network that gives several.

    Raises:
        PlanError: for an ignore label that is also a class, or settings that are for another number
            of classes.
    """
    return CompoundLoss(config, n_channels=n_classes, ignore_label=ignore_label, spacing=spacing)


def build_losses(
    configs: Sequence[LossConfig],
    *,
    ignore_label: int | None,
    n_classes: int,
    spacing: Spacing = (1.0, 1.0, 1.0),
) -> CompoundLoss | ScheduledLoss:
    """The losses of a plan as one, the first of which is the loss to begin with.

    Raises:
        PlanError: as `build_loss` says.
    """
    built = [
        build_loss(config, ignore_label=ignore_label, n_classes=n_classes, spacing=spacing)
        for config in configs
    ]
    return built[0] if len(built) == 1 else ScheduledLoss(built)


__all__ = [
    "CompoundLoss",
    "DeepSupervisionLoss",
    "DistillationLoss",
    "ScheduledLoss",
    "SoftLabels",
    "add_teacher",
    "build_loss",
    "build_losses",
    "class_sums",
    "voxel_chunks",
]
