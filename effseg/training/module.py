"""What one step of training does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

from effseg.errors import DataError, MemoryBudgetError
from effseg.losses import DeepSupervisionLoss, build_loss
from effseg.memory import apply_policy
from effseg.networks import build_network
from effseg.plans import Plan
from effseg.training.clock import Clock, learning_rate_factor
from effseg.training.rescue import Rescue, first_line, is_out_of_memory


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

    Raises:
        PlanError: if a policy names no stage of the network.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.n_classes = len(plan.labels)
        self.ignore_index = self.n_classes if plan.ignores_voxels else None
        self.network = build_network(plan.network)
        average = ExponentialAverage(plan.training.optimizer.ema_decay)
        self.averaged = AveragedModel(self.network, multi_avg_fn=average)
        self.averaged.requires_grad_(requires_grad=False)
        # after the averages were copied: they never keep anything for backward
        apply_policy(self.network, plan.policies)
        loss = build_loss(
            plan.training.loss, ignore_label=self.ignore_index, n_classes=self.n_classes
        )
        self.loss = loss
        self.rescue = Rescue(
            self.network,
            DeepSupervisionLoss(loss) if plan.network.deep_supervision else loss,
            batch_size=plan.batch_size,
            split=plan.sample_by_sample,
        )
        self.clock = Clock(plan.training)
        self.overlap = torch.zeros(3, self.n_classes, dtype=torch.int64)
        self.validation_losses: list[Tensor] = []

    def on_train_start(self) -> None:
        """The clock runs from the first step, not from the import."""
        self.clock.start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate; with several processes the first one's clock counts for all."""
        del batch, batch_idx
        fraction = self.trainer.strategy.broadcast(self.clock.fraction(self.global_step))
        config = self.plan.training.optimizer
        rate = config.learning_rate * learning_rate_factor(fraction, warmup=config.warmup)
        for group in self.optimizers().param_groups:
            group["lr"] = rate
        if fraction >= 1:
            self.trainer.should_stop = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        del batch_idx
        image, label = batch
        loss = self.rescue.step.loss(image, label)
        self.check_loss(loss)
        return loss

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
        if self.trainer.world_size > 1:
            return closure()
        return self.rescue.run(closure, epoch=epoch, step=step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After each step the average follows, and the gradients go before the next forward."""
        del batch, batch_idx
        # logged here, not in the step, which may run more than once
        self.log("loss", outputs["loss"], on_step=False, on_epoch=True, sync_dist=True)
        self.averaged.update_parameters(self.network)
        self.optimizers().zero_grad(set_to_none=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count hits, predictions and references of each class."""
        del batch_idx
        image, label = batch
        logits = self.averaged(image)
        self.validation_losses.append(self.loss(logits, label).float())
        guess = logits.argmax(dim=1)
        valid = label < self.n_classes
        for row, hits in enumerate((guess[valid & (guess == label)], guess[valid], label[valid])):
            counts = torch.bincount(hits.long(), minlength=self.n_classes)
            self.overlap[row] += counts.cpu()

    def on_validation_epoch_end(self) -> None:
        """Log the Dice of each label and their mean over the labels that occur."""
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
        self.overlap.zero_()
        self.validation_losses.clear()

    def configure_optimizers(self) -> AdamW:
        """AdamW; norms' gains and biases are not decayed."""
        config = self.plan.training.optimizer
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        free = [p for p in self.network.parameters() if p.ndim <= 1]
        return AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": free, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
        )


def _where(error: BaseException, world_size: int) -> str:
    if world_size > 1:
        return (
            f"out of memory ({first_line(error)}) in one of {world_size} processes, which cannot "
            "do a step again by itself"
        )
    return f"out of memory ({first_line(error)}) while the optimizer took its state"
