"""Which learning rate: tried out on real batches before a training, from far too low upwards."""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effseg.errors import DataError, PlanError
from effseg.files import write_text_whole
from effseg.memory import give_back_memory
from effseg.plans import Plan
from effseg.training.data import PatchData
from effseg.training.module import SegmentationModule
from effseg.training.trainer import build_trainer, fit, quiet_lightning

LOWEST, HIGHEST = 1e-6, 1.0
FEWEST_STEPS = 20
SMOOTHING = 0.9
"""Share of the earlier losses in the smoothed one."""
DIVERGED = 2.0
"""The smoothed loss, in multiples of its lowest, at which nothing more is to be learnt."""
RULE = "the middle of the decade over which the loss falls most"


@dataclass(frozen=True)
class LearningRates:
    """A learning-rate range test.

    Attributes:
        rates: of each step, rising.
        losses: of each step's batch, before the step.
        smoothed: exponential mean of the losses until then.
        suggestion: the middle of the decade of rates over which a straight line through the losses,
            by the logarithm of the rate, falls most.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float

    @classmethod
    def of(cls, rates: tuple[float, ...], losses: tuple[float, ...]) -> "LearningRates":
        """Smooth the losses, and find the suggestion.

        Args:
            rates: rising by equal factors.
            losses: as many, finite.

        Raises:
            DataError: if the loss falls over no decade.
        """
        return cls(rates, losses, tuple(_smoothed(losses)), _steepest(rates, losses))

    def save(self, path: str | Path) -> Path:
        """Write rate, loss and smoothed loss as CSV, a step a line.

        Raises:
            DataError: if it cannot be written.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("learning_rate", "loss", "smoothed_loss"))
        table.writerows(zip(self.rates, self.losses, self.smoothed, strict=True))
        return write_text_whole(path, text.getvalue())


def try_rates(
    plan: Plan,
    data: PatchData,
    *,
    device: torch.device,
    folder: Path,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
) -> LearningRates:
    """Train fresh weights with a rate that rises from step to step, and watch the loss.

    The rate rises by equal factors from 1e-6 to 1; the test ends where the loss has diverged. The
    weights are dropped, and torch's random numbers start from the plan's seed.

    Args:
        plan: whose network, loss, batches and seed are meant; its learning rate does not count.
        data: of the run.
        device: to train on.
        folder: for what Lightning may write.
        steps: at most.
        progress: called with (steps done, steps at most).

    Raises:
        PlanError: for less than 20 steps.
        DataError: if the loss falls at no rate.

    Source: Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.3.
    """
    if steps < FEWEST_STEPS:
        raise PlanError(f"{steps} steps of a learning-rate test; expected {FEWEST_STEPS} at least")
    torch.manual_seed(plan.training.seed)
    module = _RangeTest(plan, n_steps=steps, progress=progress)
    with quiet_lightning():
        trainer = build_trainer(plan, device, folder=folder, n_steps=steps)
    fit(trainer, module, data)
    losses = tuple(module.losses)
    del module, trainer
    give_back_memory()
    return LearningRates.of(tuple(_rate(i, steps) for i in range(len(losses))), losses)


def with_rate(plan: Plan, rates: LearningRates) -> Plan:
    """The plan with the learning rate that a range test suggests, and why."""
    reason = (
        f"{RULE}, of {len(rates.rates)} steps at rates from {rates.rates[0]:.2g} to "
        f"{rates.rates[-1]:.2g}"
    )
    rate = float(f"{rates.suggestion:.2g}")
    optimizer = plan.training.optimizer.model_copy(update={"learning_rate": rate})
    return plan.model_copy(
        update={
            "training": plan.training.model_copy(update={"optimizer": optimizer}),
            "reasons": plan.reasons | {"learning_rate": reason},
        }
    )


class _RangeTest(SegmentationModule):
    """Steps of a training at rates that rise; nothing is averaged, validated or kept."""

    def __init__(
        self, plan: Plan, *, n_steps: int, progress: Callable[[int, int], None] | None
    ) -> None:
        # an epoch a step: what is done in the course of a run does not begin
        once = plan.training.model_copy(update={"epochs": n_steps, "minutes": None})
        super().__init__(plan.model_copy(update={"training": once}))
        self.n_steps = n_steps
        self.progress = progress
        self.losses: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        del batch, batch_idx
        for group in self.optimizers().param_groups:
            group["lr"] = _rate(self.global_step, self.n_steps)

    def check_loss(self, loss: Tensor) -> None:
        """A loss that is not finite ends the test and is no mistake."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        del outputs, batch, batch_idx
        loss = float(self.step_loss)
        if math.isfinite(loss):
            self.losses.append(loss)
        *_, last = smoothed = _smoothed(self.losses) or [math.nan]
        if not math.isfinite(loss) or last > DIVERGED * min(smoothed):
            self.trainer.should_stop = True
        self.optimizers().zero_grad(set_to_none=True)
        if self.progress is not None:
            self.progress(len(self.losses), self.n_steps)


def _rate(step: int, n_steps: int) -> float:
    return float(LOWEST * (HIGHEST / LOWEST) ** (step / (n_steps - 1)))


def _smoothed(losses: tuple[float, ...] | list[float]) -> list[float]:
    """Exponential means of all losses until each, whose weights sum to 1."""
    means, mean = [], 0.0
    for n, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**n))
    return means


def _steepest(rates: tuple[float, ...], losses: tuple[float, ...]) -> float:
    decades, fall = np.log10(np.asarray(rates)), np.asarray(losses)
    size = int(np.searchsorted(decades - decades[0], 1 - 1e-9)) + 1 if len(rates) > 1 else 2
    best_slope, best = 0.0, None
    for start in range(len(rates) - size + 1):
        part = slice(start, start + size)
        across, down = (values[part] - values[part].mean() for values in (decades, fall))
        slope = float(across @ down / (across @ across))
        if slope < best_slope:
            best_slope, best = slope, 10 ** float(decades[part].mean())
    if best is None:
        tried = f"between {rates[0]:.0e} and {rates[-1]:.0e}" if rates else "at any"
        raise DataError(
            f"the loss fell at no learning rate {tried}; expected it to fall at some: "
            "`effseg check` looks at the data"
        )
    return best
