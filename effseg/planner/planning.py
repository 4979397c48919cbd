"""From a fingerprint and a budget to a plan, every number with its reason."""

import math
import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from effseg.dataset import Dataset, read_dataset
from effseg.devices import DeviceKind, Precision, device_kind
from effseg.memory import MemoryReport
from effseg.networks import MemoryMode
from effseg.planner.facts import Progress, fingerprint
from effseg.planner.geometry import (
    Stages,
    median_shape,
    shrinking_patches,
    target_spacing,
)
from effseg.planner.machine import choose_device, choose_precision
from effseg.planner.rates import Rates, machine_rates, nominal_rates
from effseg.planner.scaling import SIZES, Scale, scale_of
from effseg.planner.search import LARGEST_BATCH, Answer, Pace, Search, describe
from effseg.planner.step import Flagship, Step
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
from effseg.types import Shape3, Spacing

CPU_STEP_SECONDS = 0.8
"""A step on a CPU takes no longer, by nominal rates: larger ones would fit most budgets, and leave
a training of minutes with a handful of them."""
QUICK_SECONDS = {"cpu": CPU_STEP_SECONDS, "cuda": 0.15}
"""Of a step for which a larger network is taken unasked."""
TRAINER_BYTES = 64 * 2**20
"""What training holds beside the step on a CPU: patches in the making, curves, the library's
loop."""
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
    size: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan a training that fits a memory budget; nothing is trained or allocated for it.

    Args:
        dataset: a `Dataset`, its folder or CSV, or a fingerprint taken before.
        memory: the budget: of the GPU, or of this process beyond its imports on a CPU; "8GiB".
        size: of the network, "b0" to "b7"; None: the largest that fits and is quick once a patch
            shows the median case, else b0.
        device: "cpu" or "cuda", which need not be here; None: CUDA where torch sees it.
        progress: called after each case that is read.

    Returns:
        The plan; `plan.reasons` says why each choice was made.

    Raises:
        PlanError: if the budget is no size, or the size or the device are unknown.
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
    wish = _Wish(
        facts=facts,
        spacing=spacing,
        median=median,
        loss=loss,
        precision=precision,
        device=kind,
        budget_bytes=budget,
        rates=machine_rates(kind, precision),
    )
    scale, answer = (
        _sized(wish) if size is None else (scale_of(size), wish.search(scale_of(size)).run())
    )
    step = answer.step
    rule, why_rule = choose_postprocess(facts)
    flips, why_flips = choose_flips(facts)
    channels = tuple(Channel(name=c.name, normalisation=normalisation(c)) for c in facts.channels)
    labels = (
        Label(value=0, name="background"),
        *(Label(value=label.value, name=label.name) for label in facts.labels),
    )
    config = wish.config(step.patch, step.mode, scale)
    reasons = {
        "device": why_device,
        "precision": why_precision,
        "spacing": why_spacing,
        "patch_size": _why_patch(answer, median, wish),
        "batch_size": _why_batch(answer, wish),
        "network": _why_network(config, scale),
        "memory": _why_memory(step, budget),
        "recompute": _why_recompute(step),
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
        network=config,
        policies=dict(step.policies),
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
            heap=step.heap,
        ),
        reasons=reasons,
        alternatives=answer.alternatives,
        fingerprint=facts,
    )


@dataclass(frozen=True)
class _Wish:
    """What is asked of the search, whatever the size of the network."""

    facts: Fingerprint
    spacing: Spacing
    median: Shape3
    loss: LossConfig
    precision: Precision
    device: DeviceKind
    budget_bytes: int
    rates: Rates

    @property
    def pace(self) -> Pace:
        """What a step may take."""
        return Pace(rates=nominal_rates(self.device), seconds=QUICK_SECONDS[self.device])

    def search(self, scale: Scale) -> Search:
        """For the best step of a network of this size."""
        patches = dict(shrinking_patches(self.median, self.spacing))
        largest = next(iter(patches))
        wanted = min(scale.side**3, math.prod(largest))
        return Search(
            subject=Flagship(
                build_config=lambda patch, mode: self.config(patch, mode, scale),
                loss=self.loss,
                ignored=self.facts.ignore_label is not None,
                precision=self.precision,
                device=self.device,
            ),
            patches=[patch for patch in patches if math.prod(patch) >= wanted],
            budget_bytes=self.budget_bytes,
            device=self.device,
            rates=self.rates,
            beside_bytes=self.beside_bytes,
            longest=self.pace if self.device == "cpu" else None,
        )

    def config(self, patch: Shape3, mode: MemoryMode, scale: Scale) -> NetworkConfig:
        """Of the flagship for patches of this size."""
        stages = dict(shrinking_patches(self.median, self.spacing))[patch]
        return network_config(self.facts, stages, mode, scale)

    def beside_bytes(self, report: MemoryReport, patch: Shape3, batch: int) -> int:
        """The averaged weights; on a CPU also what loads and augments patches."""
        del patch, batch
        return report.parameter_bytes + (TRAINER_BYTES if self.device == "cpu" else 0)


def _sized(wish: _Wish) -> tuple[Scale, Answer]:
    """The largest network that fits and is quick where the smallest one leaves room.

    Context comes first: a larger network is looked at once a patch shows the whole median case with
    nothing computed twice, and taken where neither patch nor batch shrink for it.
    """
    scale = scale_of(SIZES[0])
    answer = wish.search(scale).run()
    step = answer.step
    if answer.too_large is not None or step.policies or step.mode != "plain":
        return scale, answer

    def is_too_large(size: str) -> bool:
        larger = wish.search(scale_of(size)).step(step.patch, step.batch, step.mode, {})
        return larger.peak_bytes > wish.budget_bytes or wish.pace.share(larger) > 1

    first = bisect_left(SIZES, True, lo=1, key=is_too_large)  # each is larger than the one before
    if first > 1:
        scale = scale_of(SIZES[first - 1])
        answer = replace(wish.search(scale), patches=[step.patch]).run()
    return scale, answer


def network_config(
    facts: Fingerprint, stages: Stages, memory: MemoryMode, scale: Scale | None = None
) -> NetworkConfig:
    """The flagship for these stages; of size b0 where no scale is given."""
    n = len(stages.strides)
    scale = scale or scale_of(SIZES[0])
    return NetworkConfig(
        in_channels=len(facts.channels),
        out_channels=1 + len(facts.labels),
        stem_channels=scale.channels(STEM_CHANNELS),
        growth_rate=scale.channels(GROWTH_RATE),
        bottleneck=BOTTLENECK,
        encoder_layers=scale.layers(ENCODER_LAYERS[:n]),
        decoder_layers=scale.layers(DECODER_LAYERS[: n - 1]),
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


def _why_patch(answer: Answer, median: Shape3, wish: _Wish) -> str:
    shown = f"the median case has {format_shape(median)} voxels"
    if answer.too_large is not None:
        larger = answer.too_large
        return (
            f"{shown}; {format_shape(larger.patch)} would need {format_bytes(larger.peak_bytes)} "
            f"at least, the budget is {format_bytes(wish.budget_bytes)}"
        )
    if math.prod(median) > 1.5 * math.prod(answer.step.patch):
        return (
            f"{shown}; on {wish.pace.rates.why}, a step is to take {CPU_STEP_SECONDS:g} s at most"
        )
    return f"{shown}, to the network's stride"


def _why_batch(answer: Answer, wish: _Wish) -> str:
    step = answer.step
    short = wish.device == "cpu" and step.batch < LARGEST_BATCH
    return (
        f"at least 2, at most {LARGEST_BATCH}, after the patch"
        + (f" and while a step takes {CPU_STEP_SECONDS:g} s at most" if short else "")
        + f"; {step.batch} samples take {format_bytes(step.peak_bytes)} of "
        f"{format_bytes(wish.budget_bytes)} and about {step.seconds:.2g} s "
        f"({wish.rates.why})"
    )


def _why_network(config: NetworkConfig, scale: Scale) -> str:
    layers = sum(config.encoder_layers) + sum(config.decoder_layers)
    return (
        f"size {scale.name}: {len(config.strides)} stages, {layers} dense layers of growth rate "
        f"{config.growth_rate}; an axis is halved while 4 voxels remain and it is not twice as "
        "coarse as the finest"
    )


def _why_memory(step: Step, budget_bytes: int) -> str:
    return (
        f"{format_bytes(step.peak_bytes)} of {format_bytes(budget_bytes)}: "
        f"{format_bytes(step.report.peak_bytes)} of tensors at the peak of a training step, "
        f"{format_bytes(step.report.saved_bytes)} of them kept from forward to backward; "
        "traced, not run"
        + (
            "; freed memory goes back to the system at once, so that no more than this is held"
            if step.heap == "mapped"
            else ""
        )
    )


def _why_recompute(step: Step) -> str:
    if step.policies:
        return f"{describe(step)}: without, this patch would not fit"
    if step.mode == "plain":
        return "everything fits with nothing computed twice"
    return (
        "features are stored once; norm, activation and 1x1 convolutions run again in backward, "
        "which is what makes this patch fit"
    )
