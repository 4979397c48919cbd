"""What training a segmenter against a discriminator takes, predicted before it starts.

Three kinds of steps are traced: the segmenter's on labels, as in any training; the segmenter's
through the frozen discriminator; the discriminator's on what the frozen segmenter makes. Beside
each stands what the others left: weights, optimizers' state, gradients that are added to.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from effseg.devices import AUTOCAST, device_kind
from effseg.errors import MemoryBudgetError
from effseg.memory import MemoryReport, apply_policy, trace_peak
from effseg.networks import build_network
from effseg.optimizers import build_optimizer, numbers_kept
from effseg.planner.check import retrace_plan
from effseg.planner.host import planned_loader_bytes, training_peak
from effseg.planner.step import TRAINER_BYTES, choose_heap, predicted_peak
from effseg.plans import Plan, format_bytes, format_shape
from effseg.training.discriminator import Discriminator, probabilities_of, surprise
from effseg.training.pair import build_discriminator

FLOAT = 4
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
"""Of a budget, that a plan is made for until there is room for the discriminator beside it."""


def check_pair(plan: Plan) -> Plan:
    """Trace all steps of an adversarial training and hold them against the plan's budget.

    Args:
        plan: with its `adversarial` part.

    Returns:
        The plan with what they take for its peak, and the heap that goes with it.

    Raises:
        MemoryBudgetError: if one takes more than the budget.
        PlanError: if no step can be made of the plan.
    """
    kind, budget = device_kind(plan.device), plan.memory.budget_bytes
    by_labels = retrace_plan(plan)
    through = _trace(plan, learns="segmenter")
    telling = _trace(plan, learns="discriminator")
    ours = by_labels.parameter_bytes
    theirs = telling.parameter_bytes - ours
    loop = TRAINER_BYTES if kind == "cpu" else 0
    steps = (  # what stands beside each: averaged weights, and of the networks what it does not use
        (by_labels, ours + loop + 3 * theirs),
        (through, ours + loop + 2 * theirs + ours),
        (telling, ours + loop + numbers_kept(plan.training.optimizer) * ours + theirs),
    )
    largest, beside = max(steps, key=lambda step: step[0].peak_bytes + step[1])
    heap = choose_heap(largest, device=kind, beside_bytes=beside, budget_bytes=budget)
    loader = planned_loader_bytes(plan)
    memory = plan.memory.model_copy(update={"heap": heap, "loader_bytes": loader})
    plan = plan.model_copy(update={"memory": memory})
    peak = max(
        # patches are loaded and scored as in any training, with the discriminator beside
        training_peak(plan, by_labels) + 3 * theirs,
        *(
            predicted_peak(report, device=kind, heap=heap, beside_bytes=beside)
            for report, beside in steps
        ),
    )
    if peak > budget:
        raise MemoryBudgetError(
            f"patch {format_shape(plan.patch_size)} at batch {plan.batch_size} with a "
            f"discriminator takes {format_bytes(peak)}, its budget is {format_bytes(budget)}: "
            "raise memory.budget_bytes, or give --memory in place of a plan, which leaves it room"
        )
    saved = max(report.saved_bytes for report, _ in steps)
    memory = memory.model_copy(update={"peak_bytes": peak, "saved_bytes": saved})
    why = (
        f"{format_bytes(peak)} of {format_bytes(budget)}: a discriminator of "
        f"{theirs // FLOAT:,} parameters beside the segmenter, with what both optimizers and the "
        "averaged weights keep; all three kinds of steps were traced"
    )
    reasons = plan.reasons | {"adversarial": why}
    return plan.model_copy(update={"memory": memory, "reasons": reasons})


def plan_pair(make: Callable[[int], Plan], budget_bytes: int) -> Plan:
    """A plan that leaves room for the discriminator.

    Args:
        make: a plan with its `adversarial` part for a budget, `planner.plan` of one fingerprint.
        budget_bytes: of both networks together.

    Returns:
        The plan with the whole budget for its own, as `check_pair` gives it back.

    Raises:
        MemoryBudgetError: if nothing fits.
    """
    refused: MemoryBudgetError | None = None
    for share in SHARES:
        try:
            plan = make(round(share * budget_bytes))
            memory = plan.memory.model_copy(update={"budget_bytes": budget_bytes})
            return check_pair(plan.model_copy(update={"memory": memory}))
        except MemoryBudgetError as error:
            refused = error
    assert refused is not None
    raise refused


class _Through(nn.Module):
    """The segmenter's step through the discriminator; gives verdicts."""

    def __init__(self, segmenter: nn.Module, discriminator: Discriminator) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.discriminator = discriminator

    def forward(self, image: Tensor) -> Tensor:
        verdicts: Tensor = self.discriminator(image, probabilities_of(self.segmenter(image)))
        return verdicts


class _Telling(_Through):
    """The discriminator's step."""

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            made = probabilities_of(self.segmenter(image))
        verdicts: Tensor = self.discriminator(image, made)
        return verdicts


def _trace(plan: Plan, *, learns: str) -> MemoryReport:
    assert plan.adversarial is not None
    with torch.device("meta"):
        segmenter = build_network(plan.network)
        discriminator = build_discriminator(plan, plan.adversarial)
    apply_policy(segmenter, plan.policies)
    frozen, kind = (discriminator, _Through) if learns == "segmenter" else (segmenter, _Telling)
    pair = kind(segmenter, discriminator)
    frozen.eval().requires_grad_(requires_grad=False)
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = partial(AdamW, lr=1e-3)
    if learns == "segmenter":
        optimizer = partial(build_optimizer, config=plan.training.optimizer)
    n = 1 if plan.sample_by_sample else plan.batch_size
    report = trace_peak(
        pair,
        (n, len(plan.channels), *plan.patch_size),
        loss=partial(surprise, known=True),
        optimizer=optimizer,
        autocast=AUTOCAST[plan.precision],
        device=device_kind(plan.device),
    )
    waiting = plan.batch_size - n  # samples of the batch
    rest = waiting * len(plan.channels) * _voxels(plan) * FLOAT
    return replace(
        report,
        peak_bytes=report.peak_bytes + rest,
        device_bytes=None if report.device_bytes is None else report.device_bytes + rest,
    )


def _voxels(plan: Plan) -> int:
    z, y, x = plan.patch_size
    return z * y * x
