"""The main job: a plan and a data set become a run."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import lightning.pytorch as pl
import torch

from effseg.dataset import Dataset, Fold, NineWaySplit
from effseg.devices import present_device
from effseg.errors import DataError, EffsegError, PlanError
from effseg.ledger import check_parent, note_run
from effseg.memory import heap_of
from effseg.planner import check_plan
from effseg.plans import ExternalData, Plan, Policy
from effseg.record import METRICS, PLAN, RATES, RECORD, SNAPSHOTS, SPLIT, STOP, WEIGHTS
from effseg.training.callbacks import (
    BestWeights,
    MetricsLog,
    ProgressReport,
    RecordKeeper,
    Thawing,
    TrainingState,
)
from effseg.training.choices import chosen_cases, opened, with_choices
from effseg.training.data import PatchData
from effseg.training.external import open_external, with_external
from effseg.training.loss_schedule import LossSchedule
from effseg.training.memory_watch import MemoryWatch
from effseg.training.module import SegmentationModule
from effseg.training.rates import LearningRates, try_rates, with_rate
from effseg.training.requests import StopOnRequest
from effseg.training.resuming import EpochCheckpoint, RunState, rewind
from effseg.training.snapshots import Snapshots
from effseg.training.stopping import EarlyStop
from effseg.training.trainer import build_trainer, fit, import_late_parts, quiet_lightning
from effseg.training.unannotated import unannotated_cases
from effseg.training.waiting import WaitWatch

logger = logging.getLogger("effseg")

RANGE_TEST_STEPS = 100


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
    augment: Policy | None = None,
    find_lr: bool = False,
    init_from: str | Path | None = None,
    resume: bool = False,
    external: Sequence[ExternalData] = (),
    split: NineWaySplit | None = None,
    notes: tuple[str, ...] = (),
    parent: str | Path | None = None,
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
        augment: the policy by name, in place of the plan's.
        find_lr: take the learning rate that `find_learning_rate` suggests, in place of the plan's;
            its steps are not counted in minutes or epochs.
        init_from: a run's folder or a file of weights to start from, in place of the plan's: what
            matches by name and shape is taken; the record's `changes` say what did.
        resume: go on with the run in `out`, which was cut off, from its last whole epoch. On a CPU
            and by epochs it ends with the weights that it would have had.
        external: data sets of the same channels and labels to draw a share of the patches from,
            beside the plan's own `data.external`; none of their cases may be held out here.
        split: train and validate on the segmenter's sets of a split, in place of a fold: its test
            cases and all others are left alone.
        notes: sentences that the report repeats, such as where the data come from.
        parent: the run whose differences from this one stand in `runs.csv` beside `out`; None: the
            newest earlier one there on the same data set.
        preparing: called with (cases prepared, cases in all).
        progress: called after each step.

    Returns:
        The run's folder: plan.json, run.json, metrics.csv, model.safetensors (the averaged weights
        of the best validation Dice) and checkpoints/; learning_rates.csv with `find_lr`;
        snapshots/ where the plan asks for some. A line in `runs.csv` beside it.

    Raises:
        KeyboardInterrupt: as it was sent; what was learnt until then is kept.
        PlanError: if plan and data set do not fit, minutes and epochs are both or neither set, or
            the device is not here.
        CheckpointError: if `parent` is no run, or the weights to start from cannot be used.
        DataError: if `out` is taken, a case cannot be used, or the loss falls at no learning rate.
        MemoryBudgetError: if a step takes more than the plan's budget, or runs out of memory,
            whatever is recomputed and split.
    """
    source = "plan" if isinstance(plan, Plan) else plan
    plan, dataset = opened(plan, dataset)
    plan = with_choices(
        plan,
        minutes=minutes,
        epochs=epochs,
        device=device,
        seed=seed,
        augment=augment,
        init_from=init_from,
    )
    if devices > 1 and plan.training.start.thaw:
        raise PlanError(f"training.start.thaw on {devices} processes; parts thaw only on one")
    plan = with_external(plan, external)
    chosen = chosen_cases(plan, dataset, fold, split)
    present = present_device(plan.device)
    out = Path(out)
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: not empty; name a new folder, so that two runs cannot mix")
    if parent is not None:
        check_parent(parent)
    plan = check_plan(plan, source=source)
    cache = out / "cache"
    import_late_parts()
    heap = ExitStack()
    watch = MemoryWatch()
    try:
        if devices == 1:
            # each of several processes does so for itself
            heap.enter_context(heap_of(plan.memory.heap))
            watch.start()
        state = RunState(out, plan, dataset, chosen)
        checkpoint = rewind(out, state) if resume else None
        module = SegmentationModule(_seeded(plan), fresh=resume)
        data = _prepare(plan, dataset, chosen, cache, progress=preparing)
        if find_lr and not resume:
            del module
            logger.info("looking for a learning rate: %d steps at most", RANGE_TEST_STEPS)
            rates = try_rates(plan, data, device=present, folder=cache, steps=RANGE_TEST_STEPS)
            rates.save(out / RATES)
            plan = with_rate(plan, rates)
            state = RunState(out, plan, dataset, chosen)
            module = SegmentationModule(_seeded(plan))
        plan.save(out / PLAN)
        if split is not None:
            split.save(out / SPLIT)
        stopping = plan.training.stopping
        best = BestWeights(out / WEIGHTS, stopping.smoothing)
        record = RecordKeeper(
            path=out / RECORD,
            plan=plan,
            dataset=dataset.root.resolve(),
            fold=fold if split is None else None,
            train=chosen.train,
            validation=chosen.validation,
            best=best,
            watch=watch,
            notes=notes,
        )
        callbacks: list[pl.Callback] = [
            watch,
            StopOnRequest(out / STOP),
            WaitWatch(),
            MetricsLog(out / METRICS, plan, watch),
            best,
            record,
            state,
            EpochCheckpoint(out, state),
            Thawing(plan.training.start),
        ]
        if stopping.kind != "none":
            callbacks.append(EarlyStop(stopping))
        if plan.training.loss_schedule:
            callbacks.append(LossSchedule(plan.training.loss_schedule))
        if plan.training.snapshots > 0:
            callbacks.append(Snapshots(out / SNAPSHOTS, plan.training.snapshots))
        if progress is not None:
            callbacks.append(ProgressReport(progress))
        with quiet_lightning():
            trainer = build_trainer(
                plan, present, folder=out, callbacks=callbacks, n_devices=devices
            )
        fit(trainer, module, data, checkpoint=checkpoint)
    except BaseException:
        if not resume and not (out / WEIGHTS).exists():
            # nothing worth keeping was learnt yet: leave no half-written run
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        heap.close()
        shutil.rmtree(cache, ignore_errors=True)
        if (out / WEIGHTS).exists():
            note_run(out, parent=parent)
    if not (out / WEIGHTS).exists():
        raise EffsegError(f"{out}: training ended before its first validation; give it longer")
    return out


def find_learning_rate(
    plan: Plan | str | Path,
    dataset: Dataset | str | Path,
    *,
    fold: int = 0,
    device: str | None = None,
    steps: int = RANGE_TEST_STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> LearningRates:
    """Try learning rates from 1e-6 to 1 on real batches, one a step, and suggest one.

    Fresh weights are trained with a rate that rises from step to step, until the loss diverges, and
    dropped. Suggested is the middle of the decade over which the loss falls most. Batches, weights
    and so the suggestion follow from the plan's seed.

    Args:
        plan: a `Plan` or its file; its own learning rate and length do not count.
        dataset: a `Dataset` or its folder or CSV.
        fold: whose training cases are learnt from, from 0.
        device: "cpu" or "cuda", in place of the plan's.
        steps: at most, 20 at least.
        progress: called after each step with (steps done, steps at most).

    Returns:
        The rates, the losses and the suggestion.

    Raises:
        PlanError: if plan and data set do not fit, the device is not here, or steps are too few.
        DataError: if a case cannot be used, or the loss falls at no rate.
        MemoryBudgetError: if a step runs out of memory, whatever is recomputed.

    Source: Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.3.
    """
    plan, dataset = opened(plan, dataset)
    plan = with_choices(plan, minutes=None, epochs=None, device=device, seed=None)
    chosen = chosen_cases(plan, dataset, fold)
    present = present_device(plan.device)
    with tempfile.TemporaryDirectory(prefix="effseg-") as folder, heap_of(plan.memory.heap):
        cache = Path(folder)
        data = _prepare(plan, dataset, chosen, cache)
        return try_rates(plan, data, device=present, folder=cache, steps=steps, progress=progress)


def _prepare(
    plan: Plan,
    dataset: Dataset,
    chosen: Fold,
    cache: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PatchData:
    by_name = {case.name: case for case in dataset.cases}
    train, validation = (
        [by_name[name] for name in names] for names in (chosen.train, chosen.validation)
    )
    train += unannotated_cases(plan, cache / "unannotated")
    external = open_external(plan, validation)
    return PatchData(plan, train, validation, cache, external=external, progress=progress)


def _seeded(plan: Plan) -> Plan:
    torch.manual_seed(plan.training.seed)
    return plan
