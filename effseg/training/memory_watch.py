"""The most memory that a training took, counted as its plan's prediction counts it."""

import logging
from contextlib import ExitStack

import lightning.pytorch as pl
import torch

from effseg.memory import (
    PeakResident,
    bytes_beyond_allocator,
    give_back_memory,
    heap_of,
    resident_bytes,
)
from effseg.plans import format_bytes
from effseg.training.module import SegmentationModule

logger = logging.getLogger("effseg")


class MemoryWatch(pl.Callback):  # type: ignore[misc]  # Lightning ships no types
    """Knows the most memory that training took, counted as the plan's prediction counts it.

    On a CPU: resident memory since the first step, above what it was at `start`. On CUDA: what the
    allocator reserved and what the card holds beyond it, the context. Other processes on the card
    would count as context, so the least that was seen counts.
    """

    def __init__(self) -> None:
        self.baseline_bytes: int | None = None
        self.resident: PeakResident | None = None
        self.context_bytes: int | None = None
        self.has_warned = False
        self._heap = ExitStack()

    def start(self) -> None:
        """Take the baseline: before the network is built, in the process that trains."""
        give_back_memory()  # what earlier work left on the heap is no part of it
        self.baseline_bytes = resident_bytes()

    def setup(self, trainer: pl.Trainer, pl_module: SegmentationModule, stage: str) -> None:
        """Forget peaks of what came before the steps."""
        del stage
        if self.baseline_bytes is None:
            # one of several processes, just begun: what `train` does for its own is done here
            self._heap.enter_context(heap_of(pl_module.plan.memory.heap))
            self.start()
        self.resident = PeakResident().start()
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """Say so, once, when training takes more than it was given."""
        del trainer
        measured, memory = self.peak_bytes(pl_module.device), pl_module.plan.memory
        if measured > memory.budget_bytes and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "training took %s of a budget of %s; %s were predicted",
                *map(format_bytes, (measured, memory.budget_bytes, memory.peak_bytes)),
            )

    def peak_bytes(self, device: torch.device) -> int:
        """The peak until now."""
        if device.type == "cuda":
            assert device.index is not None
            beyond = bytes_beyond_allocator(device.index)
            self.context_bytes = min(beyond, self.context_bytes or beyond)
            return torch.cuda.max_memory_reserved(device) + self.context_bytes
        if self.resident is None or self.baseline_bytes is None:
            return 0
        peak = self.resident.baseline_bytes + self.resident.peak_bytes - self.baseline_bytes
        return max(0, peak)
