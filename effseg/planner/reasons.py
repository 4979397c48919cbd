"""Why a plan is as it is, in words."""

import math
from collections.abc import Mapping
from typing import Any

from effseg.memory import KEPT_WORST
from effseg.planner.alternatives import describe
from effseg.planner.scaling import Scale
from effseg.planner.search import LARGEST_BATCH, Answer
from effseg.planner.step import Step
from effseg.planner.wish import CPU_STEP_SECONDS, Wish
from effseg.plans import NetworkConfig, format_bytes, format_shape
from effseg.types import Shape3


def why_patch(answer: Answer, median: Shape3, wish: Wish) -> str:
    """The patch: what there is to see, and what the next larger one would need."""
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


def why_batch(answer: Answer, wish: Wish) -> str:
    """The batch, and what its step takes."""
    step = answer.step
    longer = wish.pace.share(step) * (step.batch + 1) > step.batch
    short = wish.device == "cpu" and step.batch < LARGEST_BATCH and longer
    return (
        f"at least 2, at most {LARGEST_BATCH}, after the patch"
        + (f", while a step takes {CPU_STEP_SECONDS:g} s at most" if short else "")
        + f"; {step.batch} samples take {format_bytes(step.peak_bytes)} of "
        f"{format_bytes(wish.budget_bytes)} and about {step.seconds:.2g} s "
        f"({wish.rates.why})"
    )


def why_network(config: NetworkConfig, scale: Scale, options: Mapping[str, Any]) -> str:
    """The network: its size and shape, and what was asked of it."""
    layers = sum(config.encoder_layers) + sum(config.decoder_layers)
    return (
        f"size {scale.name}: {len(config.strides)} stages, {layers} dense layers of growth rate "
        f"{config.growth_rate}; an axis is halved while 4 voxels remain and it is not twice as "
        "coarse as the finest"
        + "".join(f"; {key} {value}, as asked" for key, value in options.items())
    )


def why_memory(step: Step, budget_bytes: int) -> str:
    """The predicted peak, and what it is made of."""
    return (
        f"{format_bytes(step.peak_bytes)} of {format_bytes(budget_bytes)}: "
        f"{format_bytes(step.report.peak_bytes)} of tensors at the peak of a training step, "
        f"{format_bytes(step.report.saved_bytes)} of them kept from forward to backward; "
        "traced, not run" + _why_heap(step)
    )


def _why_heap(step: Step) -> str:
    """What becomes of a CPU's freed memory, and what that costs."""
    if step.heap == "mapped":
        would_do = format_bytes(math.ceil(KEPT_WORST * step.peak_bytes))
        return (
            "; freed memory goes back to the system at once, so that no more than this is held; "
            f"{would_do} would keep it, and a step take about half as long"
        )
    if step.heap == "kept":
        return "; freed memory is kept for the next step, which is faster and counted"
    return ""


def why_recompute(step: Step) -> str:
    """What is computed twice, and what for."""
    what_for = "without, this patch would not fit"
    if step.heap == "kept":
        what_for = "without, there would be no room to keep freed memory, which is faster"
    if step.policies or step.split:
        return f"{describe(step)}: {what_for}"
    if step.mode == "plain":
        return "everything fits with nothing computed twice"
    return (
        "features are stored once; norm, activation and 1x1 convolutions run again in backward; "
        f"{what_for}"
    )
