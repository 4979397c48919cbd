"""What the data say of the training: intensities, loss, augmentation, what of a result is noise."""

import math
import re
from typing import Literal

from effseg.plans import (
    ChannelFacts,
    Fingerprint,
    LossConfig,
    Normalisation,
    OptimizerConfig,
    Plan,
    PostprocessConfig,
)
from effseg.postprocess import DEFAULT_FRACTION

SIDED = re.compile(r"left|right|(^|[^a-z])[lr]([^a-z]|$)")
USUAL_BATCH = 4
"""Samples that the usual learning rate is meant for."""
FOREGROUND = 0.5
LESION_FOREGROUND = 0.33
"""Share of patches on foreground: where lesions are the target, what is none of them is learnt from
the rest (nnU-Net's share)."""
LESION_SMOOTH = 10.0
SMALL_SHARE = 0.01
"""Small components may be noise while less of a label's volume than this lies in them."""
VARIED = 8.0
"""Ratio of a label's large components to its small ones (percentiles 95 and 5) from which on a Dice
over the batch would hear the large ones alone."""
LOCAL_SHARE = 0.02
"""A single label of less of the voxels is told by what is around it, not by its place in a body."""


def normalisation(channel: ChannelFacts) -> Normalisation:
    """CT: clip to the foreground's 0.5 and 99.5 percentiles and scale; else z-score an image."""
    if not channel.is_ct:
        return Normalisation(kind="zscore")
    low, _, high = channel.foreground_percentiles
    return Normalisation(
        kind="ct",
        low=low,
        high=max(high, low + 1.0),
        mean=channel.foreground_mean,
        std=max(channel.foreground_std, 1.0),
    )


def learning_rate(batch: int) -> tuple[float, str]:
    """AdamW's rate for a batch, and why: it grows with the square root of the samples.

    Source: Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022.
    """
    usual = OptimizerConfig().learning_rate
    rate = float(f"{usual * math.sqrt(batch / USUAL_BATCH):.2g}")
    if batch == USUAL_BATCH:
        return rate, f"{rate:g}, the usual one for a batch of {batch}"
    return rate, f"{rate:g}: {usual:g} for a batch of {USUAL_BATCH}, by the root of the samples"


def choose_loss(facts: Fingerprint) -> tuple[LossConfig, str]:
    """How Dice is counted, and why."""
    varied = max(label.component_mm3[5] / label.component_mm3[1] for label in facts.labels)
    if has_lesions(facts):
        why = "small components are part of the truth"
    elif varied >= VARIED:
        why = f"large components are {varied:.0f} times as large as small ones"
    else:
        return LossConfig(), "Dice over the whole batch, and cross-entropy"
    return LossConfig(dice_over_batch=False, dice_smooth=LESION_SMOOTH), (
        f"cross-entropy, and Dice for each sample, so that a small component weighs as much as a "
        f"large one: {why}; {LESION_SMOOTH:g} voxels are added, so that false ones cost where "
        "there is nothing to find"
    )


def with_class_weights(plan: Plan) -> Plan:
    """The plan with numbers where its losses ask for class weights from the voxel shares.

    A class weighs the inverse of its share, so scaled that the mean voxel weighs 1; a label that
    occurs nowhere weighs 1.
    """
    if all(loss.class_weights != "voxel_shares" for loss in plan.training.losses):
        return plan
    of_labels = [label.voxel_share for label in plan.fingerprint.labels]
    shares = (max(0.0, 1 - sum(of_labels)), *of_labels)
    weights = tuple(
        float(f"{1 / (len(shares) * share):.4g}") if share > 0 else 1.0 for share in shares
    )

    def numbered(loss: LossConfig) -> LossConfig:
        asked = loss.class_weights == "voxel_shares"
        return loss.model_copy(update={"class_weights": weights}) if asked else loss

    reason = "inverse voxel shares of the fingerprint's labels; the mean voxel weighs 1"
    return plan.model_copy(
        update={
            "training": plan.training.with_losses(numbered),
            "reasons": plan.reasons | {"class_weights": reason},
        }
    )


def has_lesions(facts: Fingerprint) -> bool:
    """Whether small components are part of the data set's truth."""
    return max(label.small_share for label in facts.labels) >= SMALL_SHARE


def choose_flips(facts: Fingerprint) -> tuple[tuple[Literal["z", "y", "x"], ...], str]:
    """Along which axes a mirrored patient could still be one, and why."""
    sided = [label.name for label in facts.labels if SIDED.search(label.name.lower())]
    if sided:
        return (), f"no flips: {sided[0]} tells the patient's left from right"
    if len(facts.labels) == 1 and facts.labels[0].voxel_share < LOCAL_SHARE:
        return ("z", "y", "x"), (
            f"flips along every axis: {facts.labels[0].name} is one label of "
            f"{facts.labels[0].voxel_share:.1%} of the voxels, told by what is around it"
        )
    return ("x",), (
        "flips from left to right, where bodies are nearly mirror images; head to foot and front "
        "to back they are not"
    )


def choose_postprocess(facts: Fingerprint) -> tuple[PostprocessConfig, str]:
    """Whether small components are noise in this data set, and why."""
    smallest = min(label.component_mm3[0] for label in facts.labels)
    share = max(label.small_share for label in facts.labels)
    if not has_lesions(facts):
        return PostprocessConfig(fraction_of_largest=DEFAULT_FRACTION), (
            f"components under a third of their label's largest hold {share:.2%} of a label's "
            "volume in the references: in a prediction they are noise"
        )
    return PostprocessConfig(minimum_mm3=smallest / 2), (
        f"components under a third of their label's largest hold {share:.1%} of a label's volume "
        f"in the references, so they are real; half the smallest one, {smallest / 2:.3g} mm3, "
        "bounds noise"
    )
