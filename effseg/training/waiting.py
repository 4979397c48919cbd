"""How long steps wait for their patches."""

import logging
import time
from typing import Any

import lightning.pytorch as pl

logger = logging.getLogger("effseg")

LEAST_SECONDS = 5.0
"""Of waiting in an epoch, below which nothing is said."""


class WaitWatch(pl.Callback):  # type: ignore[misc]  # Lightning ships no types
    """Says so, once, when the steps of an epoch wait longer for patches than they take.

    Without workers that is the time in which patches are read and augmented; with workers, what
    these do not make in time. The first batch of an epoch does not count: workers start with it.
    """

    def __init__(self) -> None:
        self.waited_seconds = 0.0
        self.step_seconds = 0.0
        self.has_warned = False
        self._began = 0.0
        self._ended: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count anew."""
        del trainer, pl_module
        self.waited_seconds = self.step_seconds = 0.0
        self._ended = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch is here."""
        del trainer, pl_module, batch, batch_idx
        self._began = time.monotonic()
        if self._ended is not None:
            self.waited_seconds += self._began - self._ended

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Its step is done."""
        del trainer, pl_module, outputs, batch, batch_idx
        now = time.monotonic()
        if self._ended is not None:
            self.step_seconds += now - self._began
        self._ended = now

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so where it is worth knowing, in the first process."""
        del pl_module
        waited, took = self.waited_seconds, self.step_seconds
        if self.has_warned or not trainer.is_global_zero or waited < max(took, LEAST_SECONDS):
            return
        self.has_warned = True
        logger.warning(
            "the steps of an epoch took %.0f s and waited %.0f s for patches; more "
            "training.workers in plan.json make these beside the steps, --augment light makes them "
            "in less time",
            took,
            waited,
        )
