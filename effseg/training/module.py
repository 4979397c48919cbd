"""What one step of training does."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from effseg.errors import DataError, MemoryBudgetError
from effseg.losses import DeepSupervisionLoss, DistillationLoss, build_losses
from effseg.memory import apply_policy
from effseg.networks import build_network, finest
from effseg.networks.freezing import freeze_for_start
from effseg.optimizers import build_optimizer
from effseg.plans import Plan
from effseg.record import RunChange
from effseg.training.clock import Clock
from effseg.training.rescue import Rescue, first_line, is_out_of_memory
from effseg.training.starting import load_weights
from effseg.training.step import BatchLoss
from effseg.training.teachers import Teachers

logger = logging.getLogger("effseg")

StoppedBy = Literal["stop file", "interrupt", "terminate", "patience", "trend"]
"""What may end a run before its time."""


@dataclass(frozen=True)
class ExponentialAverage:
    """Moves averaged weights towards the current ones.

    The decay warms up as (1 + n) / (10 + n) after n steps, so that a short run does not average in
    the weights it started from.
    """

    decay: float

    def __call__(
        self, averages: Sequence[Tensor], weights: Sequence[Tensor], n_averaged: Tensor | int
    ) -> None:
        """Update the averages in place."""
        n = float(n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)


class SegmentationModule(pl.LightningModule):  # type: ignore[misc]  # Lightning ships no types
    """Network, loss, optimizer and schedule of a plan.

    Validation scores the running average of the weights (`averaged`), which is also what a run
    keeps. Dice is counted over all validation patches together, a class at a time, ignored voxels
    left out.

    A step that runs out of memory is done again with less (`rescue`).

    Args:
        plan: of the training.
        fresh: leave the weights to start from alone: others will take their place.

    Attributes:
        changes: what the run changed on its way, for the record.
        stopped_by: what ended it before its time, if anything did.

    Raises:
        PlanError: if a policy names no stage of the network, or nothing in it may learn.
        CheckpointError: if the weights to start from cannot be used.
    """

    def __init__(self, plan: Plan, *, fresh: bool = False) -> None:
        super().__init__()
        self.plan = plan
        self.n_classes = len(plan.labels)
        self.ignore_index = self.n_classes if plan.ignores_voxels else None
        self.changes: list[RunChange] = []
        self.network = build_network(plan.network)
        start = plan.training.start
        if start.init_from is not None and not fresh:
            self.note(str(load_weights(self.network, start.init_from)))
        freeze_for_start(self.network, start)
        average = ExponentialAverage(plan.training.optimizer.ema_decay)
        self.averaged = AveragedModel(self.network, multi_avg_fn=average)
        self.averaged.requires_grad_(requires_grad=False)
        # after the averages were copied: they never keep anything for backward
        apply_policy(self.network, plan.policies)
        loss = build_losses(
            plan.training.losses,
            ignore_label=self.ignore_index,
            n_classes=self.n_classes,
            spacing=plan.spacing,
        )
        self.loss = loss
        batch_loss: BatchLoss = DeepSupervisionLoss(loss) if plan.network.deep_supervision else loss
        # no part of the module: neither trained nor kept
        self.teachers = Teachers.of(plan)
        taught = plan.training.distillation
        if taught is not None:
            batch_loss = DistillationLoss(
                batch_loss, weight=taught.weight, temperature=taught.temperature
            )
        self.rescue = Rescue(
            self.network,
            batch_loss,
            batch_size=plan.batch_size,
            split=plan.sample_by_sample,
        )
        self.clock = Clock(plan.training)
        self.overlap = torch.zeros(3, self.n_classes, dtype=torch.int64)
        self.validation_losses: list[Tensor] = []
        self.stopped_by: StoppedBy | None = None
        self.part = 0
        self.part_losses: list[Tensor] = []

    def note(self, what: str) -> None:
        """Put a change into log and record: from here on the run does something otherwise."""
        logger.info("epoch %d: %s", self.current_epoch, what)
        self.changes.append(
            RunChange(
                epoch=self.current_epoch,
                step=self.global_step,
                when=datetime.now().replace(microsecond=0),
                what=what,
            )
        )

    def on_train_start(self) -> None:
        """The clock runs from the first step, not from the import."""
        self.clock.start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate; with several processes the first one's clock counts for all."""
        del batch, batch_idx
        step, config = self.global_step, self.plan.training.optimizer
        # what is dropped follows from these alone, as patches do, wherever a run went on
        parts = (self.plan.training.seed, step, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
        fraction, factor = self.trainer.strategy.broadcast(
            (self.clock.fraction(step), self.clock.rate_factor(step, config))
        )
        for group in self.optimizers().param_groups:
            group["lr"] = config.learning_rate * factor
        if fraction >= 1:
            self.trainer.should_stop = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch, of those whose mean makes a step."""
        del batch_idx
        size = self.plan.batch_size
        image, label = (part[self.part * size : (self.part + 1) * size] for part in batch)
        taught = label if self.teachers is None else self.teachers.soft_labels(image, label)
        loss = self.rescue.step.loss(image, taught)
        self.check_loss(loss)
        self.part_losses[self.part :] = [loss.detach()]
        n_parts = self.plan.training.optimizer.accumulate
        return loss if n_parts == 1 else loss / n_parts

    def check_loss(self, loss: Tensor) -> None:
        """Refuse a loss that nothing can be learnt from.

        Raises:
            DataError: if it is not finite.
        """
        if not bool(torch.isfinite(loss)):
            raise DataError(
                f"the loss became {float(loss.detach())} in step {self.global_step}; the best "
                "weights so far are kept. A lower learning_rate or precision float32 in plan.json "
                "may help, "
                "`effseg check` looks at the data"
            )

    @property
    def step_loss(self) -> Tensor:
        """The loss of the last step: the mean over its batches."""
        return torch.stack(self.part_losses).mean()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients, of the whole batch or sample by sample."""
        del args, kwargs
        self.rescue.step.backward(loss)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Forward, backward and the optimizer; the first two again if memory is refused.

        Raises:
            MemoryBudgetError: if nothing is left to change, or the optimizer's state does not fit.
        """
        assert optimizer_closure is not None
        step = self.global_step
        run = partial(self._guarded, optimizer_closure, epoch=epoch, step=step)
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, run)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryBudgetError(
                f"step {step}: {_where(error, self.trainer.world_size)}; free memory that others "
                "hold, or plan again with a smaller --memory"
            ) from error

    def _guarded(self, closure: Callable[[], Any], *, epoch: int, step: int) -> Any:
        run = partial(self._each_part, closure)
        if self.trainer.world_size > 1:
            return run()
        return self.rescue.run(run, epoch=epoch, step=step)

    def _each_part(self, closure: Callable[[], Any]) -> Any:
        """Forward and backward of each batch of a step; their gradients add up."""
        result = None
        for part in range(self.plan.training.optimizer.accumulate):
            self.part = part
            result = closure()
        return result

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Before the first backward of a step, and no other."""
        if self.part == 0:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After each step the average follows, and the gradients go before the next forward."""
        del outputs, batch, batch_idx
        # logged here, not in the step, which may run more than once
        self.log("loss", self.step_loss, on_step=False, on_epoch=True, sync_dist=True)
        self.averaged.update_parameters(self.network)
        self.optimizers().zero_grad(set_to_none=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count hits, predictions and references of each class."""
        del batch_idx
        image, label = batch
        logits = finest(self.averaged(image))
        self.validation_losses.append(self.loss(logits, label).float())
        guess = logits.argmax(dim=1)
        valid = label < self.n_classes
        for row, hits in enumerate((guess[valid & (guess == label)], guess[valid], label[valid])):
            counts = torch.bincount(hits.long(), minlength=self.n_classes)
            self.overlap[row] += counts.cpu()

    def on_validation_epoch_end(self) -> None:
        """Log the Dice of each label, its mean over the labels that occur, and that of 1 - Jaccard.

        1 - Jaccard is the volumetric overlap error (VOE); of a label, J = D / (2 - D).
        """
        overlap = self.all_gather(self.overlap.to(self.device)).view(-1, 3, self.n_classes).sum(0)
        hits, guesses, references = overlap.double()[:, 1:]
        dice = torch.where(
            references + guesses > 0, 2 * hits / (references + guesses).clamp(min=1), torch.nan
        )
        loss = torch.stack(self.validation_losses).mean()
        self.log("validation_loss", loss, sync_dist=True)
        for label, value in zip(self.plan.labels[1:], dice, strict=True):
            self.log(f"validation_dice_{label.name}", value.float())
        mean = dice.nanmean().nan_to_num(0.0)
        self.log("validation_dice", mean.float())
        self.log("validation_voe", (1 - (dice / (2 - dice)).nanmean().nan_to_num(0.0)).float())
        self.overlap.zero_()
        self.validation_losses.clear()

    def configure_optimizers(self) -> Optimizer:
        """As planned."""
        return build_optimizer(self.network.parameters(), self.plan.training.optimizer)


def _where(error: BaseException, world_size: int) -> str:
    if world_size > 1:
        return (
            f"out of memory ({first_line(error)}) in one of {world_size} processes, which cannot "
            "do a step again by itself"
        )
    return f"out of memory ({first_line(error)}) while the optimizer took its state"
