"""A segmenter trained against a discriminator, on annotated and unannotated scans, into a run."""

import logging
import math
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import lightning
import torch

import effseg
from effseg.dataset import Case, Dataset, NineWaySplit, check_leaks, read_dataset
from effseg.devices import present_device
from effseg.errors import DataError, PlanError
from effseg.ledger import note_run
from effseg.memory import PeakResident, heap_of
from effseg.planner.recipe import with_class_weights
from effseg.plans import AdversarialConfig, Plan
from effseg.record import CHECKPOINTS, PLAN, RECORD, SPLIT, RunMemory, RunRecord
from effseg.training.choices import with_choices
from effseg.training.contest import Contest, ContestState, Standing
from effseg.training.contest_data import ContestData
from effseg.training.memory_watch import MemoryWatch
from effseg.training.pair import Pair
from effseg.training.pair_memory import check_pair
from effseg.training.stages import stages_of

logger = logging.getLogger("effseg")

SNAPSHOT = Path(CHECKPOINTS) / "adversarial.safetensors"


def train_adversarially(
    plan: Plan | str | Path | None,
    dataset: Dataset | str | Path,
    *,
    split: NineWaySplit | str | Path | None,
    unannotated: Sequence[Case] | None = None,
    out: str | Path,
    minutes: float | None = None,
    device: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    notes: tuple[str, ...] = (),
    preparing: Callable[[int, int], None] | None = None,
    progress: Callable[[ContestState], None] | None = None,
) -> Path:
    """Train a segmenter on few annotated scans and many unannotated ones.

    A discriminator learns to tell what the segmenter makes of cases that it was trained on from
    what it makes of others; the segmenter learns to make the same of both. Who learns when, and
    until what, say `training.stages` and the plan's `adversarial` part. Both networks, the
    optimizers' state of both and the averaged weights are in memory together; what that takes is
    traced before anything starts.

    Of the plan's training part length, batches, augmentation, loss, optimizer and its rate hold; a
    schedule of the rate or of augmentation does not, since nobody knows how long stages take.

    The state is saved at the end of each stage and every `save_every` steps. The same plan, data,
    split and seed give the same weights on a CPU, whether or not a run was killed in between.

    Sources: Luc et al. 2016, arXiv:1611.08408; Zhang et al., "Deep adversarial networks for
    biomedical image segmentation utilizing unannotated images", MICCAI 2017; Hung et al.,
    "Adversarial learning for semi-supervised semantic segmentation", 2018, arXiv:1802.07934.

    Args:
        plan: a `Plan` or its file; None with `resume`: the run has its own.
        dataset: that the annotated cases are in: a `Dataset`, its folder or CSV.
        split: the nine sets or their file; None with `resume`.
        unannotated: cases without labels; None: those of the split are in `dataset` too, and their
            labels are not looked at.
        out: the run's folder; it must not hold anything yet unless it is resumed.
        minutes: wall clock of steps and looks, in all; else the plan's minutes or epochs, else the
            stages end by their criteria and limits alone.
        device: "cpu" or "cuda", in place of the plan's.
        seed: in place of the plan's.
        resume: go on with a run that was stopped or killed.
        notes: sentences that the report repeats.
        preparing: called with (cases prepared, cases in all).
        progress: called after each step.

    Returns:
        The run's folder, as of `train`: plan.json, run.json (a note a stage), metrics.csv,
        model.safetensors (the averaged weights of the best validation Dice), checkpoints/; and
        split.json.

    Raises:
        KeyboardInterrupt: as it was sent; the run can be resumed.
        PlanError: if plan and data do not fit, the device is not here, or the plan has what is not
            for its stages: a schedule of losses, parts that thaw, accumulated batches, teachers,
            float16.
        DataError: if `out` is taken or holds nothing to resume, the split leaks or names cases that
            are not there, a case cannot be used, or the loss became infinite.
        CheckpointError: if what was saved cannot be used.
        MemoryBudgetError: if a step takes more than the plan's budget.
        EffsegError: if the frozen network changed.
    """
    out = Path(out)
    dataset = dataset if isinstance(dataset, Dataset) else read_dataset(dataset)
    plan, split = _opened(plan, split, out, resume=resume)
    plan = _completed(with_choices(plan, minutes=minutes, epochs=None, device=device, seed=seed))
    scans = dataset.cases if unannotated is None else unannotated
    check_leaks(split, dataset.cases, scans)
    present = present_device(plan.device)
    if present.type == "cuda" and present.index is None:
        present = torch.device("cuda", torch.cuda.current_device())
    plan = check_pair(plan)
    cache, snapshot = out / "cache", out / SNAPSHOT
    shutil.rmtree(cache, ignore_errors=True)  # of a run that was killed
    watch = MemoryWatch()
    with heap_of(plan.memory.heap):
        try:
            watch.start()
            torch.manual_seed(plan.training.seed)
            pair = Pair(plan, present, fresh=snapshot.exists())
            split.save(out / SPLIT)
            plan.save(out / PLAN)
            data = ContestData(plan, split, dataset.cases, scans, cache, progress=preparing)
            keeper = _Keeper(out, plan, dataset, split, pair, watch, notes)
            contest = Contest(
                plan,
                pair,
                data,
                folder=out,
                snapshot=snapshot,
                watch=watch,
                saved=keeper.running,
                progress=progress,
            )
            if snapshot.exists():
                contest.resume()
            watch.resident = PeakResident().start()
            keeper.run(contest, data)
        except BaseException:
            if not resume and not snapshot.exists():
                # nothing worth keeping was learnt yet: leave no half-written run
                shutil.rmtree(out, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(cache, ignore_errors=True)
    note_run(out)
    return out


def _opened(
    plan: Plan | str | Path | None,
    split: NineWaySplit | str | Path | None,
    out: Path,
    *,
    resume: bool,
) -> tuple[Plan, NineWaySplit]:
    """Plan and split as given, or those of the run that is resumed."""
    if resume:
        if plan is not None or split is not None:
            raise PlanError(
                f"{out}: a run that is resumed has its own plan and split; leave yours out, or "
                "name a new folder"
            )
        if not (out / PLAN).is_file() or not (out / SPLIT).is_file():
            raise DataError(f"{out}: no adversarial training to resume; begin one without resume")
        return Plan.load(out / PLAN), NineWaySplit.load(out / SPLIT)
    if plan is None or split is None:
        raise PlanError("a new run needs a plan and a split; `effseg split` draws one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: not empty; name a new folder, or resume the run that is in it")
    return (
        with_class_weights(plan if isinstance(plan, Plan) else Plan.load(plan)),
        split if isinstance(split, NineWaySplit) else NineWaySplit.load(split),
    )


def _completed(plan: Plan) -> Plan:
    """The plan with all that this kind of training needs said."""
    if plan.precision == "float16":
        raise PlanError(
            "precision float16, whose gradients need scaling; an adversarial training takes "
            "float32 or bfloat16: change it in plan.json"
        )
    config = plan.adversarial or AdversarialConfig()
    training = plan.training
    for name, is_set, none in (
        ("start.thaw", training.start.thaw, "[]"),
        ("loss_schedule", training.loss_schedule, "[]"),
        ("optimizer.accumulate", training.optimizer.accumulate > 1, "1"),
        ("distillation", training.distillation is not None, "null"),
    ):
        if is_set:
            raise PlanError(
                f"training.{name} is set, which the stages of an adversarial training do not know; "
                f"set it to {none}"
            )
    if training.minutes is None and training.epochs is None:
        most = sum(stage.limit for stage in stages_of(config))
        training = training.model_copy(
            update={"epochs": math.ceil(most / training.steps_per_epoch)}
        )
    if training.workers:
        logger.warning("%d workers: not used, patches are made between steps", training.workers)
        training = training.model_copy(update={"workers": 0})
    return plan.model_copy(update={"adversarial": config, "training": training})


@dataclass
class _Keeper:
    """Keeps the run's record true."""

    out: Path
    plan: Plan
    dataset: Dataset
    split: NineWaySplit
    pair: Pair
    watch: MemoryWatch
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        self.started = datetime.now().replace(microsecond=0)

    def run(self, contest: Contest, data: ContestData) -> None:
        """Take all steps that are left, and write down how it ended, whatever brought it."""
        try:
            ending = contest.run()
            has_learnt = any(stage.player == "discriminator" for stage in contest.begun)
            told = self._test(data) if has_learnt else ()
            self._write(contest.at, stopped_by=ending, told=told)
        except KeyboardInterrupt:
            self._write(contest.at, stopped_by="interrupt")
            raise
        except Exception:
            self._write(contest.at, stopped_by="error")
            raise

    def running(self, standing: Standing) -> None:
        """After each state that was saved."""
        self._write(standing, stopped_by="running")

    def _test(self, data: ContestData) -> tuple[str, ...]:
        """What the discriminator is worth on cases that neither network learnt from or chose by."""
        n = self.pair.config.check_patches
        share = self.pair.accuracy(*data.looks("test", n))
        return (f"on its test cases the discriminator tells {share:.0%} of {2 * n} patches right",)

    def _write(self, at: Standing, *, stopped_by: str, told: tuple[str, ...] = ()) -> None:
        plan, memory = self.plan, self.plan.memory
        sets = self.split
        said = (
            f"adversarial training: {len(sets.segmenter.train)} annotated cases and "
            f"{len(sets.discriminator.unannotated.train)} unannotated ones",
            *at.said,
        )
        RunRecord(
            format=1,
            effseg=effseg.__version__,
            torch=torch.__version__,
            lightning=lightning.__version__,
            python=platform.python_version(),
            dataset=str(self.dataset.root.resolve()),
            train=sets.segmenter.train,
            validation=sets.segmenter.validation,
            started=self.started,
            minutes=round(at.seconds / 60, 3),
            epochs=len(at.rows),
            steps=at.total,
            best_epoch=at.best_epoch,
            best_score=at.best_score,
            stopped_by=stopped_by,
            device=str(self.pair.device),
            n_devices=1,
            n_threads=torch.get_num_threads(),
            n_parameters=sum(p.numel() for p in self.pair.segmenter.parameters()),
            seed=plan.training.seed,
            memory=RunMemory(
                budget_bytes=memory.budget_bytes,
                predicted_peak_bytes=memory.peak_bytes,
                measured_peak_bytes=self.watch.peak_bytes(self.pair.device),
                measured=(
                    "what the allocator reserved, and the context"
                    if self.pair.device.type == "cuda"
                    else "resident memory above that before the networks were built"
                ),
            ),
            notes=(*self.notes, *said, *told),
        ).save(self.out / RECORD)
