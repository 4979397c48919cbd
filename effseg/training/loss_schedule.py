"""Which loss when: from an epoch on, or once the validation score stalls."""

import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from effseg.losses import ScheduledLoss
from effseg.plans import LossChange
from effseg.training.module import SegmentationModule

logger = logging.getLogger("effseg")


class LossSchedule(pl.Callback):  # type: ignore[misc]  # Lightning ships no types
    """Moves a `ScheduledLoss` on at the start of an epoch, when its next change is due.

    One change at a time: a loss is trained with for an epoch at least. The score that stalls is the
    validation Dice since this loss began. All processes see the same score, and so agree.

    Args:
        changes: of the plan, in their order.
    """

    def __init__(self, changes: Sequence[LossChange]) -> None:
        self.changes = tuple(changes)
        self.best_score = -1.0
        self.best_epoch = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """Change the loss if that is due."""
        loss = pl_module.loss
        assert isinstance(loss, ScheduledLoss)
        if loss.stage == len(self.changes):
            return
        change, epoch = self.changes[loss.stage], trainer.current_epoch
        why = self._due(change, epoch)
        if why is None:
            return
        loss.stage += 1
        self.best_score, self.best_epoch = -1.0, epoch
        what = f"the loss is {change.loss.words} from here on, {why}"
        pl_module.note(what)
        if trainer.is_global_zero:
            logger.info("epoch %d: %s", epoch, what)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """Remember the best score of this loss."""
        del pl_module
        score = trainer.callback_metrics.get("validation_dice")
        if score is not None and float(score) > self.best_score:
            self.best_score, self.best_epoch = float(score), trainer.current_epoch + 1

    def _due(self, change: LossChange, epoch: int) -> str | None:
        """Why to change at the start of this epoch; None: do not."""
        if change.from_epoch is not None and epoch >= change.from_epoch:
            return f"as planned from epoch {change.from_epoch}"
        stalled = epoch - self.best_epoch
        if change.stalled_epochs is not None and stalled >= change.stalled_epochs:
            return f"after {stalled} epochs without a better validation Dice"
        return None

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"best_score": self.best_score, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]
