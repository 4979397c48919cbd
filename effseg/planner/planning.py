"""From a fingerprint and a budget to a plan, every number with its reason."""

import math
import re
from pathlib import Path
from typing import Literal

from effseg.dataset import Dataset, read_dataset
from effseg.devices import device_kind
from effseg.networks import MemoryMode
from effseg.planner.facts import Progress, fingerprint
from effseg.planner.geometry import Stages, median_shape, target_spacing
from effseg.planner.machine import choose_device, choose_precision
from effseg.planner.search import CPU_PATCH_VOXELS, CPU_STEP_VOXELS, Answer, Question, search
from effseg.plans import (
    AugmentConfig,
    Channel,
    ChannelFacts,
    Fingerprint,
    InferenceConfig,
    Label,
    LossConfig,
    Memory,
    NetworkConfig,
    Normalisation,
    Plan,
    PostprocessConfig,
    TrainingConfig,
    format_bytes,
    format_shape,
    parse_bytes,
)
from effseg.postprocess import DEFAULT_FRACTION

STEM_CHANNELS = 16
GROWTH_RATE = 16
BOTTLENECK = 2
ENCODER_LAYERS = (1, 2, 4, 4, 4, 4)
DECODER_LAYERS = (1, 2, 2, 2, 2)
"""Few layers at full resolution, where each costs most: context comes from the coarse stages."""
SIDED = re.compile(r"left|right|(^|[^a-z])[lr]([^a-z]|$)")
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


def plan(
    dataset: Dataset | str | Path | Fingerprint,
    *,
    memory: str | int,
    device: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan a training that fits a memory budget; nothing is trained or allocated for it.

    Args:
        dataset: a `Dataset`, its folder or CSV, or a fingerprint taken before.
        memory: the budget: of the GPU, or of this process beyond its imports on a CPU; "8GiB".
        device: "cpu" or "cuda", which need not be here; None: CUDA where torch sees it.
        progress: called after each case that is read.

    Returns:
        The plan; `plan.reasons` says why each choice was made.

    Raises:
        PlanError: if the budget is no size or the device unknown.
        MemoryBudgetError: if nothing fits; says what would.
        DataError: if a case cannot be used.
    """
    budget = parse_bytes(memory)
    device, why_device = choose_device(device)
    kind = device_kind(device)
    if isinstance(dataset, Fingerprint):
        facts = dataset
    else:
        if not isinstance(dataset, Dataset):
            dataset = read_dataset(dataset)
        facts = fingerprint(dataset, progress=progress)
    spacing, why_spacing = target_spacing(facts)
    precision, why_precision = choose_precision(kind)
    median = median_shape(facts, spacing)
    loss, why_loss = choose_loss(facts)
    answer = search(
        Question(
            budget_bytes=budget,
            median=median,
            spacing=spacing,
            build_config=lambda stages, memory: network_config(facts, stages, memory),
            loss=loss,
            ignored=facts.ignore_label is not None,
            precision=precision,
            device=kind,
        )
    )
    step = answer.step
    rule, why_rule = choose_postprocess(facts)
    flips, why_flips = choose_flips(facts)
    channels = tuple(Channel(name=c.name, normalisation=normalisation(c)) for c in facts.channels)
    labels = (
        Label(value=0, name="background"),
        *(Label(value=label.value, name=label.name) for label in facts.labels),
    )
    reasons = {
        "device": why_device,
        "precision": why_precision,
        "spacing": why_spacing,
        "patch_size": _why_patch(answer, median, budget),
        "batch_size": _why_batch(answer, budget, device),
        "network": _why_network(step.network),
        "memory": (
            f"{format_bytes(step.peak_bytes)} of {format_bytes(budget)}: "
            f"{format_bytes(step.report.peak_bytes)} of tensors at the peak of a training step, "
            f"{format_bytes(step.report.saved_bytes)} of them kept from forward to backward; "
            "traced, not run"
        ),
        "recompute": (
            "everything fits with nothing computed twice"
            if step.network.memory == "plain"
            else "features are stored once; norm, activation and 1x1 convolutions run again in "
            "backward, which is what makes this patch fit"
        ),
        "loss": why_loss,
        "augment": why_flips,
        "normalisation": "; ".join(
            f"{c.name}: {'CT' if c.is_ct else 'z-score'}, {c.why}" for c in facts.channels
        ),
        "postprocess": why_rule,
    }
    return Plan(
        dataset=facts.dataset,
        channels=channels,
        labels=labels,
        ignore_label=facts.ignore_label,
        spacing=spacing,
        patch_size=step.patch,
        batch_size=step.batch,
        precision=precision,
        device=device,
        network=step.network,
        training=TrainingConfig(
            loss=loss,
            foreground=LESION_FOREGROUND if _has_lesions(facts) else FOREGROUND,
            augment=AugmentConfig(flip_axes=flips),
        ),
        inference=InferenceConfig(window_batch=step.batch, postprocess=rule),
        memory=Memory(
            budget_bytes=budget,
            peak_bytes=step.peak_bytes,
            saved_bytes=step.report.saved_bytes,
        ),
        reasons=reasons,
        fingerprint=facts,
    )


def network_config(facts: Fingerprint, stages: Stages, memory: MemoryMode) -> NetworkConfig:
    """The flagship for these stages."""
    n = len(stages.strides)
    return NetworkConfig(
        in_channels=len(facts.channels),
        out_channels=1 + len(facts.labels),
        stem_channels=STEM_CHANNELS,
        growth_rate=GROWTH_RATE,
        bottleneck=BOTTLENECK,
        encoder_layers=ENCODER_LAYERS[:n],
        decoder_layers=DECODER_LAYERS[: n - 1],
        strides=stages.strides,
        kernels=stages.kernels,
        memory=memory,
    )


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


def choose_loss(facts: Fingerprint) -> tuple[LossConfig, str]:
    """How Dice is counted, and why."""
    varied = max(label.component_mm3[5] / label.component_mm3[1] for label in facts.labels)
    if _has_lesions(facts):
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


def _has_lesions(facts: Fingerprint) -> bool:
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
    if not _has_lesions(facts):
        return PostprocessConfig(fraction_of_largest=DEFAULT_FRACTION), (
            f"components under a third of their label's largest hold {share:.2%} of a label's "
            "volume in the references: in a prediction they are noise"
        )
    return PostprocessConfig(minimum_mm3=smallest / 2), (
        f"components under a third of their label's largest hold {share:.1%} of a label's volume "
        f"in the references, so they are real; half the smallest one, {smallest / 2:.3g} mm3, "
        "bounds noise"
    )


def _why_patch(answer: Answer, median: tuple[int, int, int], budget: int) -> str:
    if answer.too_large is None and math.prod(median) > 1.5 * math.prod(answer.step.patch):
        return (
            f"the median case has {format_shape(median)} voxels; on a CPU a patch has at most "
            f"{CPU_PATCH_VOXELS:,}, so that a step takes about half a second"
        )
    if answer.too_large is None:
        return f"the median case, {format_shape(median)} voxels, to the network's stride"
    next_one = answer.too_large
    return (
        f"the median case has {format_shape(median)} voxels; {format_shape(next_one.patch)} would "
        f"need {format_bytes(next_one.peak_bytes)}, the budget is {format_bytes(budget)}"
    )


def _why_batch(answer: Answer, budget: int, device: str) -> str:
    step = answer.step
    short = device == "cpu" and step.batch == CPU_STEP_VOXELS // math.prod(step.patch)
    return (
        "at least 2, at most 4, after the patch"
        + (f" and {CPU_STEP_VOXELS:,} voxels in all on a CPU" if short else "")
        + f"; {step.batch} samples take {format_bytes(step.peak_bytes)} of {format_bytes(budget)}"
    )


def _why_network(config: NetworkConfig) -> str:
    layers = sum(config.encoder_layers) + sum(config.decoder_layers)
    return (
        f"{len(config.strides)} stages, {layers} dense layers of growth rate "
        f"{config.growth_rate}; an axis is halved while 4 voxels remain and it is not twice as "
        "coarse as the finest"
    )
