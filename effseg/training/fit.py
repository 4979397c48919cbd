"""The main job: a plan and a data set become a run."""

import logging
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import ValidationError

from effseg.dataset import Dataset, Fold, folds, read_dataset
from effseg.devices import Precision, present_device
from effseg.errors import DataError, EffsegError, PlanError
from effseg.files import name_places
from effseg.planner import check_plan
from effseg.plans import Plan
from effseg.record import CHECKPOINTS, METRICS, PLAN, RECORD, WEIGHTS
from effseg.training.callbacks import (
    BestWeights,
    MemoryWatch,
    MetricsLog,
    ProgressReport,
    RecordKeeper,
    TrainingState,
)
from effseg.training.data import PatchData
from effseg.training.module import SegmentationModule

logger = logging.getLogger("effseg")

N_FOLDS = 5
PRECISIONS: dict[Precision, str] = {
    "float32": "32-true",
    "bfloat16": "bf16-mixed",
    "float16": "16-mixed",
}


def train(
    plan: Plan | str | Path,
    dataset: Dataset | str | Path,
    *,
    out: str | Path,
    minutes: float | None = None,
    epochs: int | None = None,
    fold: int = 0,
    device: str | None = None,
    devices: int = 1,
    seed: int | None = None,
    notes: tuple[str, ...] = (),
    preparing: Callable[[int, int], None] | None = None,
    progress: Callable[[TrainingState], None] | None = None,
) -> Path:
    """Train a network as planned.

    One fifth of the cases (fold `fold` of 5, whole patients where the data set names them) is held
    out for validation; fewer cases than 5 make fewer folds. The same plan, data, seed and epochs
    give the same weights on a CPU.

    Args:
        plan: a `Plan` or its file.
        dataset: a `Dataset` or its folder or CSV.
        out: the run's folder; it must not hold anything yet.
        minutes: wall clock of the training steps, in place of the plan's.
        epochs: in place of the plan's; give one of the two, or neither if the plan has it.
        fold: which fifth is held out, from 0.
        device: "cpu" or "cuda", in place of the plan's.
        devices: processes that share the work (DDP), each with its own batch.
        seed: in place of the plan's.
        notes: sentences that the report repeats, such as where the data come from.
        preparing: called with (cases prepared, cases in all).
        progress: called after each step.

    Returns:
        The run's folder: plan.json, run.json, metrics.csv, model.safetensors (the averaged weights
        of the best validation Dice) and checkpoints/.

    Raises:
        KeyboardInterrupt: as it was sent; what was learnt until then is kept.
        PlanError: if plan and data set do not fit, minutes and epochs are both or neither set, or
            the device is not here.
        MemoryBudgetError: if a step takes more than the plan's budget.
        DataError: if `out` is taken, or a case cannot be used.
    """
    source = "plan" if isinstance(plan, Plan) else plan
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    if not isinstance(dataset, Dataset):
        dataset = read_dataset(dataset)
    plan = with_choices(plan, minutes=minutes, epochs=epochs, device=device, seed=seed)
    chosen = choose_fold(dataset, fold)
    present = present_device(plan.device)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: not empty; name a new folder, so that two runs cannot mix")
    plan = check_plan(plan, source=source)
    by_name = {case.name: case for case in dataset.cases}
    cache = out / "cache"
    try:
        module = SegmentationModule(_seeded(plan))
        data = PatchData(
            plan,
            [by_name[name] for name in chosen.train],
            [by_name[name] for name in chosen.validation],
            cache,
            progress=preparing,
        )
        plan.save(out / PLAN)
        watch = MemoryWatch()
        best = BestWeights(out / WEIGHTS)
        record = RecordKeeper(
            path=out / RECORD,
            plan=plan,
            dataset=dataset.root.resolve(),
            fold=fold,
            train=chosen.train,
            validation=chosen.validation,
            best=best,
            watch=watch,
            notes=notes,
        )
        callbacks: list[pl.Callback] = [
            watch,
            MetricsLog(out / METRICS, plan, watch),
            best,
            record,
            ModelCheckpoint(out / CHECKPOINTS, save_last=True, save_top_k=0),
        ]
        if progress is not None:
            callbacks.append(ProgressReport(progress))
        if plan.training.patience is not None:
            callbacks.append(
                EarlyStopping("validation_dice", mode="max", patience=plan.training.patience)
            )
        with _quiet_lightning():
            trainer = pl.Trainer(
                accelerator=present.type,
                # one card is the one that was named; Lightning takes a list for numbers
                devices=devices if present.index is None or devices > 1 else [present.index],
                strategy="ddp_spawn" if devices > 1 else "auto",
                precision=PRECISIONS[plan.precision],
                max_epochs=plan.training.epochs or -1,
                gradient_clip_val=plan.training.optimizer.gradient_clip,
                check_val_every_n_epoch=plan.training.validate_every,
                reload_dataloaders_every_n_epochs=1,
                num_sanity_val_steps=0,
                logger=_tensorboard(out),
                callbacks=callbacks,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=out,
            )
            _fit(trainer, module, data)
    except BaseException:
        if not (out / WEIGHTS).exists():
            # nothing worth keeping was learnt yet: leave no half-written run
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    if not (out / WEIGHTS).exists():
        raise EffsegError(f"{out}: training ended before its first validation; give it longer")
    return out


def _fit(trainer: pl.Trainer, module: SegmentationModule, data: PatchData) -> None:
    """Fit; Lightning makes a `sys.exit` of an interrupt and ignores those to come: undo both."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise stop.__context__ from None


def with_choices(
    plan: Plan,
    *,
    minutes: float | None,
    epochs: int | None,
    device: str | None,
    seed: int | None,
) -> Plan:
    """The plan with a call's own choices in place of its own.

    Raises:
        PlanError: if a choice cannot work; the message names each that cannot.
    """
    content = plan.model_dump()
    if minutes is not None or epochs is not None:
        content["training"] |= {"minutes": minutes, "epochs": epochs}
    if seed is not None:
        content["training"]["seed"] = seed
    if device is not None:
        content["device"] = device
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        raise PlanError(name_places(error, what="plan")) from error


def choose_fold(dataset: Dataset, fold: int) -> Fold:
    """The cases of one of five folds, or of fewer where there are fewer cases.

    A single case is learnt from and validated on, with a warning: the score then says nothing about
    other cases.

    Raises:
        DataError: if there is no labelled case.
        PlanError: if there is no such fold.
    """
    n_cases = len(dataset.cases)
    if n_cases == 0:
        raise DataError(f"{dataset.root}: no labelled case; training needs one at least")
    if n_cases == 1:
        logger.warning("%s has one case: it is validated on what it learns from", dataset.root)
        only = (dataset.cases[0].name,)
        return Fold(train=only, validation=only)
    n_folds = min(N_FOLDS, n_cases)
    if not 0 <= fold < n_folds:
        raise PlanError(f"fold {fold}; there are {n_folds}, counted from 0")
    return folds(dataset, n_folds=n_folds)[fold]


def _seeded(plan: Plan) -> Plan:
    torch.manual_seed(plan.training.seed)
    return plan


def _tensorboard(out: Path) -> TensorBoardLogger | bool:
    """TensorBoard's log where it is installed (extra `log`)."""
    if find_spec("tensorboard") is None:
        return False
    return TensorBoardLogger(out, name="", version="logs")


@contextmanager
def _quiet_lightning() -> Iterator[None]:
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
