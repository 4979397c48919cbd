"""A plan that somebody edited: does it still take what it says, and does that fit its budget?"""

import logging
import math
from pathlib import Path

from effseg.errors import MemoryBudgetError, PlanError
from effseg.memory import MemoryReport
from effseg.planner.host import planned_loader_bytes, training_peak
from effseg.planner.recipe import with_class_weights
from effseg.planner.step import trace_plan
from effseg.plans import NetworkConfig, Plan, format_bytes, format_shape

logger = logging.getLogger("effseg")

NOTABLE = 0.01
"""Share of a peak by which a plan may be off before it is worth a word: releases of torch differ by
less."""


def check_plan(plan: Plan, *, source: str | Path = "plan") -> Plan:
    """Trace a plan's training step again and hold it against the plan's own budget.

    Args:
        plan: as it was made, or as somebody edited it.
        source: the plan's name in messages, its file for one.

    Returns:
        The plan with the figures of the trace, and numbers for class weights that it leaves to the
        voxel shares; the same one where nothing changes. Where figures differ by more than a
        hundredth, a warning says so.

    Raises:
        MemoryBudgetError: if the step takes more than the budget.
        PlanError: if no step can be made of the plan; a policy that names no stage for one.
    """
    plan = with_class_weights(plan)
    planned = plan.memory
    least = _least_bytes(plan)
    if least > planned.budget_bytes:  # a step of a million samples would take hours to trace
        raise _misfit(plan, source, f"at least {format_bytes(least)}")
    try:
        report = retrace_plan(plan)
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from error
    loader = planned_loader_bytes(plan)
    planned = planned.model_copy(update={"loader_bytes": loader})
    peak = training_peak(plan.model_copy(update={"memory": planned}), report)
    if peak > planned.budget_bytes:
        raise _misfit(plan, source, format_bytes(peak))
    if abs(peak - planned.peak_bytes) > NOTABLE * peak:
        logger.warning(
            "%s: memory.peak_bytes is %s, but %s takes %s; going on with that",
            source,
            format_bytes(planned.peak_bytes),
            _described(plan),
            format_bytes(peak),
        )
    update = {"peak_bytes": peak, "saved_bytes": report.saved_bytes}
    memory = planned.model_copy(update=update)
    return plan if memory == plan.memory else plan.model_copy(update={"memory": memory})


def retrace_plan(plan: Plan) -> MemoryReport:
    """The memory of a plan's step, of plans that people edited or that are older than the code.

    Raises:
        PlanError: if no step can be made of the plan, whatever the reason.
    """
    try:
        return trace_plan(plan)
    except (ArithmeticError, RuntimeError, ValueError) as error:  # torch, of shapes it cannot do
        said = str(error).partition("\n")[0]
        raise PlanError(
            f"{_described(plan)} makes no training step ({said}); plan again, or undo what was "
            "edited in network or patch_size"
        ) from error


def _least_bytes(plan: Plan) -> int:
    """What lives at once in any step: the images, and the first block's features in half floats."""
    network = plan.network
    features = 0  # of a network of others nothing is known but by its trace
    if isinstance(network, NetworkConfig):
        features = network.stem_channels + network.encoder_layers[0] * network.growth_rate
    voxels = plan.batch_size * math.prod(plan.patch_size)
    return voxels * (4 * network.in_channels + 2 * features)


def _misfit(plan: Plan, source: str | Path, taken: str) -> MemoryBudgetError:
    return MemoryBudgetError(
        f"{source}: {_described(plan)} takes {taken}, its budget is "
        f"{format_bytes(plan.memory.budget_bytes)}: raise memory.budget_bytes, or plan again"
    )


def _described(plan: Plan) -> str:
    return f"patch {format_shape(plan.patch_size)} at batch {plan.batch_size}"
