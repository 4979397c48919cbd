"""What happens beside the steps: the log, the best weights, the record, the progress."""

import csv
import logging
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from safetensors.torch import save_file

import effseg
from effseg.files import written_whole
from effseg.memory import (
    PeakResident,
    bytes_beyond_allocator,
    give_back_memory,
    heap_of,
    resident_bytes,
)
from effseg.plans import Plan, format_bytes
from effseg.record import RunMemory, RunRecord
from effseg.training.module import SegmentationModule

logger = logging.getLogger("effseg")

StoppedBy = Literal["minutes", "epochs", "patience", "interrupt", "error", "running"]


@dataclass(frozen=True)
class TrainingState:
    """What a progress callback is told after each step.

    Attributes:
        fraction: of the run that is over, 0 to 1.
        epoch: from 0.
        step: steps done.
        loss: of the last step.
        dice: of the last validation; None before the first.
        seconds_left: estimated.
    """

    fraction: float
    epoch: int
    step: int
    loss: float
    dice: float | None
    seconds_left: float


class ProgressReport(pl.Callback):  # type: ignore[misc]  # Lightning ships no types
    """Tells a function how far the training is."""

    def __init__(self, report: Callable[[TrainingState], None]) -> None:
        self.report = report

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: SegmentationModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After each step, in the first process."""
        del batch, batch_idx
        if not trainer.is_global_zero:
            return
        clock, step = pl_module.clock, trainer.global_step
        fraction, seconds = clock.fraction(step), clock.elapsed_seconds
        dice = trainer.callback_metrics.get("validation_dice")
        self.report(
            TrainingState(
                fraction=fraction,
                epoch=trainer.current_epoch,
                step=step,
                loss=float(outputs["loss"]),
                dice=None if dice is None else float(dice),
                seconds_left=seconds * (1 / fraction - 1) if fraction > 0 else 0.0,
            )
        )


class MemoryWatch(pl.Callback):  # type: ignore[misc]
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


class MetricsLog(pl.Callback):  # type: ignore[misc]
    """One line an epoch in the run's metrics, written as soon as it is known."""

    def __init__(self, path: Path, plan: Plan, watch: MemoryWatch) -> None:
        self.path = path
        self.watch = watch
        labels = [f"validation_dice_{label.name}" for label in plan.labels[1:]]
        self.columns = (
            *("epoch", "step", "minutes", "learning_rate", "loss", "validation_loss"),
            *("validation_dice", *labels, "peak_bytes", "predicted_peak_bytes"),
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """After training and validation of an epoch, in the first process."""
        if not trainer.is_global_zero:
            return
        memory = {
            "peak_bytes": self.watch.peak_bytes(pl_module.device),
            "predicted_peak_bytes": pl_module.plan.memory.peak_bytes,
        }
        for log in trainer.loggers:
            log.log_metrics(memory, step=trainer.global_step)
        known = {name: float(value) for name, value in trainer.callback_metrics.items()}
        known |= memory | {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "minutes": round(pl_module.clock.elapsed_seconds / 60, 4),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, self.columns, extrasaction="ignore", restval="")
            if new:
                table.writeheader()
            table.writerow(known)


class BestWeights(pl.Callback):  # type: ignore[misc]
    """Keeps the averaged weights of the best validation Dice, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best_score = -1.0
        self.best_epoch = -1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """After each validation, in the first process."""
        score = float(trainer.callback_metrics.get("validation_dice", -1.0))
        if not trainer.is_global_zero or score <= self.best_score:
            return
        self.best_score, self.best_epoch = score, trainer.current_epoch
        state = pl_module.averaged.module.state_dict()
        with written_whole(self.path) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, partial)


@dataclass
class RecordKeeper(pl.Callback):  # type: ignore[misc]
    """Keeps the run's record true: after each epoch, and at the end, whatever brought it."""

    path: Path
    plan: Plan
    dataset: Path
    fold: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    best: BestWeights
    watch: MemoryWatch
    notes: tuple[str, ...] = ()
    n_epochs: int = 0
    started: datetime = field(default_factory=lambda: datetime.now().replace(microsecond=0))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """After each epoch, in the first process."""
        self.n_epochs += 1
        self._write(trainer, pl_module, stopped_by="running")

    def on_train_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """Once training is over as it should be."""
        self._write(trainer, pl_module, stopped_by=_stopped_by(trainer, pl_module))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: SegmentationModule, exception: BaseException
    ) -> None:
        """When training is cut short."""
        by: StoppedBy = "interrupt" if isinstance(exception, KeyboardInterrupt) else "error"
        self._write(trainer, pl_module, stopped_by=by)

    def _write(
        self, trainer: pl.Trainer, pl_module: SegmentationModule, *, stopped_by: StoppedBy
    ) -> None:
        if not trainer.is_global_zero:
            return
        RunRecord(
            format=1,
            effseg=effseg.__version__,
            torch=torch.__version__,
            lightning=_version("lightning"),
            monai=_version("monai"),
            python=platform.python_version(),
            dataset=str(self.dataset),
            fold=self.fold,
            train=self.train,
            validation=self.validation,
            started=self.started,
            minutes=round(pl_module.clock.elapsed_seconds / 60, 3),
            epochs=self.n_epochs,
            steps=trainer.global_step,
            best_epoch=self.best.best_epoch,
            best_score=self.best.best_score,
            stopped_by=stopped_by,
            device=str(pl_module.device),
            n_devices=trainer.world_size,
            n_threads=torch.get_num_threads(),
            n_parameters=sum(p.numel() for p in pl_module.network.parameters()),
            seed=self.plan.training.seed,
            memory=RunMemory(
                budget_bytes=self.plan.memory.budget_bytes,
                predicted_peak_bytes=self.plan.memory.peak_bytes,
                measured_peak_bytes=self.watch.peak_bytes(pl_module.device),
                measured=(
                    "what the allocator reserved, and the context"
                    if pl_module.device.type == "cuda"
                    else "resident memory above that before the network was built"
                ),
            ),
            events=tuple(pl_module.rescue.events),
            notes=self.notes,
        ).save(self.path)


def _stopped_by(trainer: pl.Trainer, module: SegmentationModule) -> StoppedBy:
    if module.clock.fraction(trainer.global_step) >= 1:
        return "minutes" if module.plan.training.minutes is not None else "epochs"
    return "patience"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
