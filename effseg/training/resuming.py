"""A run that goes on where it was cut off, from its last whole epoch, as if it had not been."""

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from effseg.dataset import Case, Dataset, Fold
from effseg.errors import CheckpointError
from effseg.files import read_json, write_text_whole, written_whole
from effseg.plans import Plan
from effseg.record import CHECKPOINTS, METRICS, RECORD, WEIGHTS, RunChange, RunEvent, RunRecord
from effseg.training.module import SegmentationModule

LAST = "last.ckpt"
KNOWN = "known.json"
"""What a run is known by again: its plan and its data."""
STATE = "effseg"
"""Under which name a checkpoint holds what Lightning does not know of."""
END_BYTES = 2**16
"""Of either end of a file, read to know it again: that of a compressed one has its checksum."""
FINISHED = ("epochs", "minutes", "patience", "trend")


class EpochCheckpoint(Checkpoint):  # type: ignore[misc]  # Lightning ships no types
    """Keeps the last whole epoch, and beside it the best weights that were known then.

    An epoch that was cut short is not kept: going on behind it would not be the same run.

    Args:
        run: its folder.
        state: of the run; what it is known by lies beside the checkpoint.
    """

    def __init__(self, run: Path, state: "RunState") -> None:
        self.run = run
        self.state = state

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """After validation, log and best weights of an epoch."""
        del pl_module
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready < trainer.num_training_batches:
            return
        if trainer.is_global_zero:
            write_text_whole(self.run / CHECKPOINTS / KNOWN, json.dumps(self.state.known))
            if (self.run / WEIGHTS).exists():
                _copy(self.run / WEIGHTS, self.run / CHECKPOINTS / WEIGHTS)
        trainer.save_checkpoint(self.run / CHECKPOINTS / LAST)


class RunState(pl.Callback):  # type: ignore[misc]
    """Puts into a checkpoint what the run is beside weights, optimizer and loops, and back.

    Args:
        run: its folder.
        plan: as it is trained.
        dataset: whose files are looked at, to know them again.
        fold: the cases of training and validation.
    """

    def __init__(self, run: Path, plan: Plan, dataset: Dataset, fold: Fold) -> None:
        self.run = run
        by_name = {case.name: case for case in dataset.cases}
        parts = [[by_name[name] for name in names] for names in (fold.train, fold.validation)]
        self.known = {"plan": _what_is_learnt(plan), "data": "/".join(map(_digest, parts))}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: SegmentationModule, checkpoint: dict[str, Any]
    ) -> None:
        """At the end of an epoch."""
        del trainer
        checkpoint[STATE] = {
            "clock": pl_module.clock.state(),
            "changes": [change.model_dump_json() for change in pl_module.changes],
            "events": [event.model_dump_json() for event in pl_module.rescue.events],
            "stopped_by": pl_module.stopped_by if pl_module.clock.is_ending_early else None,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: SegmentationModule, checkpoint: dict[str, Any]
    ) -> None:
        """Before a run goes on: what came after the checkpoint is trained again."""
        if trainer.is_global_zero:
            _trim(self.run / METRICS, epochs=checkpoint["epoch"] + 1)
        state = checkpoint[STATE]
        pl_module.clock.restore(state["clock"])
        pl_module.changes = [RunChange.model_validate_json(text) for text in state["changes"]]
        pl_module.rescue.events = [RunEvent.model_validate_json(text) for text in state["events"]]
        pl_module.stopped_by = state["stopped_by"]
        pl_module.changes.append(_went_on(checkpoint))


def rewind(run: Path, state: RunState) -> Path:
    """Bring a run's folder back to its last whole epoch.

    Args:
        run: its folder.
        state: of the training that is to go on.

    Returns:
        The checkpoint to go on from.

    Raises:
        CheckpointError: if the folder is no run, it has finished, no whole epoch is kept, or plan
            or data are not those it was trained with.
    """
    stopped_by = RunRecord.load(run / RECORD).stopped_by
    if stopped_by in FINISHED:
        raise CheckpointError(
            f"{run}: stopped by its {stopped_by}; only what was cut off goes on: train anew with "
            "--init-from to train it longer"
        )
    path = run / CHECKPOINTS / LAST
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: no whole epoch is kept; train anew")
    known = read_json(run / CHECKPOINTS / KNOWN, error=CheckpointError)
    for what, name in (("plan", "plan.json"), ("data", "the data set's files")):
        if not isinstance(known, dict) or known.get(what) != state.known[what]:
            raise CheckpointError(
                f"{run}: {name} changed since it was trained; put back what was there, or train "
                "anew with --init-from"
            )
    best = run / CHECKPOINTS / WEIGHTS
    if best.is_file():
        _copy(best, run / WEIGHTS)
    return path


def _went_on(checkpoint: dict[str, Any]) -> RunChange:
    return RunChange(
        epoch=checkpoint["epoch"] + 1,
        step=checkpoint["global_step"],
        when=datetime.now().replace(microsecond=0),
        what="went on from here after it was cut off",
    )


def _what_is_learnt(plan: Plan) -> str:
    """Of a plan, what steps depend on: validation and people may change the rest."""
    rest = {"inference", "memory", "reasons", "alternatives", "device"}
    return plan.model_dump_json(exclude=rest)


def _digest(cases: Sequence[Case]) -> str:
    """Of the cases' names, and of their files' lengths and ends."""
    digest = hashlib.sha256()
    for case in cases:
        paths = (*case.images, *([] if case.label is None else [case.label]))
        for path in paths:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                digest.update(f"{case.name}/{file.name}/{file.stat().st_size}".encode())
                with file.open("rb") as opened:
                    digest.update(opened.read(END_BYTES))
                    opened.seek(max(0, file.stat().st_size - END_BYTES))
                    digest.update(opened.read())
    return digest.hexdigest()


def _trim(metrics: Path, *, epochs: int) -> None:
    """Drop the lines of epochs that are trained again."""
    if not metrics.is_file():
        return
    header, *lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next(csv.reader([header])).index("epoch")
    kept = [line for line in lines if int(next(csv.reader([line]))[at]) < epochs]
    write_text_whole(metrics, "".join([header, *kept]))


def _copy(source: Path, target: Path) -> None:
    with written_whole(target) as partial:
        shutil.copyfile(source, partial)
