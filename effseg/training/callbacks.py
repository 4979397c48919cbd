"""What happens beside the steps: the log, the best weights, the record, the progress."""

import csv
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import save_file

import effseg
from effseg.files import written_whole
from effseg.losses import ScheduledLoss
from effseg.networks import own_state
from effseg.networks.freezing import set_frozen
from effseg.plans import Plan, StartConfig
from effseg.record import RunMemory, RunRecord
from effseg.training.memory_watch import MemoryWatch
from effseg.training.module import SegmentationModule
from effseg.training.stopping import ExponentialMean


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
        del outputs, batch, batch_idx
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
                loss=float(pl_module.step_loss),
                dice=None if dice is None else float(dice),
                seconds_left=seconds * (1 / fraction - 1) if fraction > 0 else 0.0,
            )
        )


class MetricsLog(pl.Callback):  # type: ignore[misc]
    """One line an epoch in the run's metrics, written as soon as it is known."""

    def __init__(self, path: Path, plan: Plan, watch: MemoryWatch) -> None:
        self.path = path
        self.watch = watch
        labels = [f"validation_dice_{label.name}" for label in plan.labels[1:]]
        # only where there is a schedule: which of its losses an epoch had, from 0, and what scaled
        # the chances of augmentation in it
        scheduled: tuple[str, ...] = ("loss_stage",) if plan.training.loss_schedule else ()
        self.augment = plan.training.augment
        if self.augment.is_scheduled:
            scheduled += ("augment_probability",)
        self.columns = (
            *("epoch", "step", "minutes", "learning_rate", "loss", "validation_loss"),
            *("validation_dice", *labels, "validation_voe", "peak_bytes", "predicted_peak_bytes"),
            *scheduled,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """After training and validation of an epoch, in the first process."""
        # the loss is added up over all processes when it is asked for, so each one asks
        known = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not trainer.is_global_zero:
            return
        memory = {
            "peak_bytes": self.watch.peak_bytes(pl_module.device),
            "predicted_peak_bytes": pl_module.plan.memory.peak_bytes,
        }
        for log in trainer.loggers:
            log.log_metrics(memory, step=trainer.global_step)
        known |= memory | {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "minutes": round(pl_module.clock.elapsed_seconds / 60, 4),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if self.augment.is_scheduled:
            share = trainer.train_dataloader.dataset.augmentation.share
            known["augment_probability"] = round(self.augment.probability_at(share), 4)
        if isinstance(pl_module.loss, ScheduledLoss):
            known["loss_stage"] = pl_module.loss.stage
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, self.columns, extrasaction="ignore", restval="")
            if new:
                table.writeheader()
            table.writerow(known)


def save_averaged(module: SegmentationModule, path: Path) -> None:
    """Write the averaged weights, whole or not at all."""
    state = own_state(module.averaged.module)
    with written_whole(path) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, partial)


class BestWeights(pl.Callback):  # type: ignore[misc]
    """Keeps the averaged weights of the best validation, whole or not at all.

    Best is where the exponential mean of the validations' Dice was highest.

    Args:
        path: of the weights.
        smoothing: share of the earlier validations in the mean; 0: the Dice itself.

    Attributes:
        best_epoch: whose weights are kept.
        best_score: its validation Dice.
    """

    def __init__(self, path: Path, smoothing: float = 0.0) -> None:
        self.path = path
        self.best_score = -1.0
        self.best_epoch = -1
        self._best_mean = -1.0
        self._mean = ExponentialMean(smoothing)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "best_mean": self._best_mean,
            "mean": self._mean.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]
        self._best_mean = state_dict["best_mean"]
        self._mean.load_state_dict(state_dict["mean"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """After each validation, in the first process."""
        score = float(trainer.callback_metrics["validation_dice"])
        mean = self._mean.add(score)
        if not trainer.is_global_zero or mean <= self._best_mean:
            return
        self._best_mean = mean
        self.best_score, self.best_epoch = score, trainer.current_epoch
        save_averaged(pl_module, self.path)


class Thawing(pl.Callback):  # type: ignore[misc]
    """Lets parts that stood still learn once their share of the run is over.

    Args:
        config: what thaws, and when.
    """

    def __init__(self, config: StartConfig) -> None:
        self.config = config
        self.waiting = list(config.thaw)

    def state_dict(self) -> dict[str, int]:
        """For the checkpoint."""
        return {"n_thawed": len(self.config.thaw) - len(self.waiting)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """From the checkpoint."""
        self.waiting = list(self.config.thaw[state_dict["n_thawed"] :])

    def on_train_start(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """What learnt when a run was cut off learns when it goes on."""
        del trainer
        for stage in self.config.thaw[: len(self.config.thaw) - len(self.waiting)]:
            set_frozen(pl_module.network, stage.parts, frozen=False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: SegmentationModule, batch: Any, batch_idx: int
    ) -> None:
        """Before each step."""
        del batch, batch_idx
        step = trainer.global_step
        while self.waiting and pl_module.clock.fraction(step) >= self.waiting[0].at:
            parts = self.waiting.pop(0).parts
            set_frozen(pl_module.network, parts, frozen=False)
            pl_module.note(f"{', '.join(parts)} learns from here on")


@dataclass
class RecordKeeper(pl.Callback):  # type: ignore[misc]
    """Keeps the run's record true: after each epoch, and at the end, whatever brought it."""

    path: Path
    plan: Plan
    dataset: Path
    fold: int | None
    train: tuple[str, ...]
    validation: tuple[str, ...]
    best: BestWeights
    watch: MemoryWatch
    notes: tuple[str, ...] = ()
    n_epochs: int = 0
    started: datetime = field(default_factory=lambda: datetime.now().replace(microsecond=0))

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        started = self.started.isoformat()
        return {"n_epochs": self.n_epochs, "started": started, "notes": list(self.notes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.n_epochs, self.notes = state_dict["n_epochs"], tuple(state_dict["notes"])
        self.started = datetime.fromisoformat(state_dict["started"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """After each epoch, in the first process."""
        self.n_epochs += 1
        self._write(trainer, pl_module, stopped_by="running")

    def on_train_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """Once training is over as it should be."""
        self._write(trainer, pl_module, stopped_by=_stopped_by(pl_module))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: SegmentationModule, exception: BaseException
    ) -> None:
        """When training is cut short."""
        by = "interrupt" if isinstance(exception, KeyboardInterrupt) else "error"
        self._write(trainer, pl_module, stopped_by=by)

    def _write(
        self, trainer: pl.Trainer, pl_module: SegmentationModule, *, stopped_by: str
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
            changes=tuple(pl_module.changes),
            notes=self.notes,
        ).save(self.path)


def _stopped_by(module: SegmentationModule) -> str:
    if module.stopped_by is not None:
        return module.stopped_by
    return "minutes" if module.plan.training.minutes is not None else "epochs"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
