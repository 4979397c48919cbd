"""Requests to end a run: a file in its folder, Ctrl-C, the system's SIGTERM."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning.pytorch as pl

from effseg.training.module import SegmentationModule

logger = logging.getLogger("effseg")

Request = Literal["stop file", "interrupt", "terminate"]
SIGNALS: dict[int, Request] = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate"}


class StopOnRequest(pl.Callback):  # type: ignore[misc]  # Lightning ships no types
    """Ends a run after the step in hand, with a last validation and everything saved.

    A second signal ends it at once, as an exception; so does the first where several processes
    share the work, each of which gets its own. The file is looked for after each step, and removed
    once it was found.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.request: Request | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """Listen to signals; Python lets the main thread do so, and no other."""
        del pl_module
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.request is not None:
            raise KeyboardInterrupt
        self.request = SIGNALS[number]
        logger.warning(
            "stopping after this step and a last validation, a second signal stops at once; "
            "`effseg train --resume %s` goes on from the last whole epoch",
            self.path.parent,
        )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: SegmentationModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After each step; the first process looks for all."""
        del outputs, batch, batch_idx
        if trainer.is_global_zero and self.request is None and self.path.exists():
            self.path.unlink()
            self.request = "stop file"
        request = trainer.strategy.broadcast(self.request)
        if request is not None:
            pl_module.stopped_by = request
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """Signals mean again what they did."""
        del trainer, pl_module
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: SegmentationModule, exception: BaseException
    ) -> None:
        """Signals mean again what they did."""
        del trainer, pl_module, exception
        self._restore()

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())
