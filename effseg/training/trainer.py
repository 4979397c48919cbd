"""Lightning's trainer as effseg wants it: no banners, no bars, an interrupt stays one."""

import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import TensorBoardLogger

from effseg.devices import Precision
from effseg.files import written_whole
from effseg.plans import Plan

PRECISIONS: dict[Precision, str] = {
    "float32": "32-true",
    "bfloat16": "bf16-mixed",
    "float16": "16-mixed",
}


class StreamedCheckpoint(TorchCheckpointIO):  # type: ignore[misc]  # Lightning ships no types
    """Writes a checkpoint tensor by tensor, whole or not at all.

    Lightning's own way makes the file in memory first: all weights, their averages and the
    optimizer's state once more.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write it."""
        del storage_options
        with written_whole(path) as partial:
            torch.save(checkpoint, partial)


def build_trainer(
    plan: Plan,
    device: torch.device,
    *,
    folder: Path,
    callbacks: Sequence[pl.Callback] = (),
    n_devices: int = 1,
    n_steps: int | None = None,
) -> pl.Trainer:
    """A trainer for a plan's steps.

    Args:
        plan: precision, clipping, epochs and validation.
        device: to train on.
        folder: of the run; a log is kept there where TensorBoard is installed.
        callbacks: what happens beside the steps.
        n_devices: processes that share the work.
        n_steps: for a trial of so many steps: no validation, no log, nothing kept.
    """
    trial = n_steps is not None
    return pl.Trainer(
        accelerator=device.type,
        # one card is the one that was named; Lightning takes a list for numbers
        devices=n_devices if device.index is None or n_devices > 1 else [device.index],
        strategy="ddp_spawn" if n_devices > 1 else "auto",
        precision=PRECISIONS[plan.precision],
        max_epochs=-1 if trial else plan.training.epochs or -1,
        max_steps=n_steps if trial else -1,
        gradient_clip_val=plan.training.optimizer.gradient_clip,
        check_val_every_n_epoch=plan.training.validate_every,
        limit_val_batches=0 if trial else None,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        logger=False if trial else _tensorboard(folder),
        callbacks=list(callbacks),
        enable_checkpointing=not trial,
        plugins=[StreamedCheckpoint()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    *,
    checkpoint: Path | None = None,
) -> None:
    """Fit; Lightning makes a `sys.exit` of an interrupt and ignores those to come: undo both.

    An interrupt that waited for the step in hand is raised once the training has ended.

    Args:
        trainer: as it was built.
        module: what learns.
        data: from which.
        checkpoint: to go on from; None: from the start.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        with quiet_lightning():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise stop.__context__ from None
    if module.stopped_by in ("interrupt", "terminate"):
        raise KeyboardInterrupt


def import_late_parts() -> None:
    """Import now what the first steps would: the memory of imports is no training's."""
    if _has_tensorboard():
        import_module("torch.utils.tensorboard")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's banners and advice are for people who wrote the loop themselves."""
    talkers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)


def _has_tensorboard() -> bool:
    return find_spec("tensorboard") is not None


def _tensorboard(out: Path) -> TensorBoardLogger | bool:
    """TensorBoard's log where it is installed (extra `log`)."""
    return TensorBoardLogger(out, name="", version="logs") if _has_tensorboard() else False
