"""Weights kept from the course of a training: several models for the price of one."""

import math
from pathlib import Path

import lightning.pytorch as pl

from effseg.training.callbacks import save_averaged
from effseg.training.module import SegmentationModule


class Snapshots(pl.Callback):  # type: ignore[misc]  # Lightning ships no types
    """Keeps the averaged weights at evenly spread times of a run's last half, the last at its end.

    Of n snapshots the i-th is taken at the first end of an epoch after (1 + i / n) / 2 of the run,
    in minutes or steps. A run that is stopped before its time has fewer. In memory they take
    nothing, on the disk a file each. (After Huang et al. 2017, "Snapshot ensembles: train 1, get M
    for free", whose snapshots end cycles of the learning rate; here one cycle comes down.)

    Args:
        folder: where they go, as `1.safetensors`, ...
        n: how many at most.
    """

    def __init__(self, folder: Path, n: int) -> None:
        self.folder = folder
        self.n = n

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """After each epoch, in the first process."""
        due = math.floor((2 * pl_module.clock.fraction(trainer.global_step) - 1) * self.n + 1e-9)
        path = self.folder / f"{due}.safetensors"
        if trainer.is_global_zero and due > 0 and not path.exists():
            save_averaged(pl_module, path)
