"""The data of a run as Lightning takes it."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from effseg.augment import build_augmentation
from effseg.dataset import Case
from effseg.devices import device_kind
from effseg.memory import mapped_blocks, shared_bytes
from effseg.planner.host import Queue, batch_bytes, queue_of
from effseg.plans import Plan, format_bytes
from effseg.training.cache import CachedCase, cache_case, caching_bytes, index_dtype
from effseg.training.patches import TrainingPatches, ValidationPatches

logger = logging.getLogger("effseg")

Batches = DataLoader[tuple[Tensor, Tensor]]


class PatchData(pl.LightningDataModule):  # type: ignore[misc]  # Lightning ships no types
    """Prepared cases on disk, and the patches of each epoch.

    Args:
        plan: patch, batch, shares and augmentation.
        train: cases to learn from.
        validation: cases to score after each epoch.
        folder: where the prepared cases lie.
        external: cases of the plan's external data sets, in its order.
        progress: called with (cases prepared, cases in all) while preparing.
    """

    def __init__(
        self,
        plan: Plan,
        train: Sequence[Case],
        validation: Sequence[Case],
        folder: Path,
        *,
        external: Sequence[Sequence[Case]] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        groups = (train, validation, *external)
        n_cases = sum(map(len, groups))
        cached: list[list[CachedCase]] = []
        with mapped_blocks():  # what a case took is given back before the next
            for number, cases in enumerate(groups):
                # a case of another data set may have the name of one of this
                place = folder if number < 2 else folder / f"external_{number - 2}"
                place.mkdir(parents=True, exist_ok=True)
                cached.append([])
                for case in cases:
                    self._warn(case)
                    cached[-1].append(cache_case(case, plan, place))
                    if progress is not None:
                        progress(sum(map(len, cached)), n_cases)
        self.train_cases, self.validation_cases, *others = cached
        shares = [one.share for one in plan.data.external] if others else []
        self.external = tuple(zip(shares, others, strict=True))
        self.augmentation = build_augmentation(
            plan.training.augment,
            spacing=plan.spacing,
            fill_label=len(plan.labels) if plan.ignores_voxels else None,
        )

    def _warn(self, case: Case) -> None:
        """Say where preparing a case breaks the budget, which is of this process on a CPU."""
        budget = self.plan.memory.budget_bytes
        if device_kind(self.plan.device) == "cpu" and case.label is not None:
            n_bytes = caching_bytes(case, self.plan)
            if n_bytes > budget:
                logger.warning(
                    "%s: preparing it takes up to %s, more than the budget of %s; its label map is "
                    "held whole: store it in 8-bit integers, or prepare a coarser data set",
                    case.name,
                    format_bytes(n_bytes),
                    format_bytes(budget),
                )

    def _queue(self) -> Queue:
        """How batches are made ahead: as planned, or less where there is no room for them."""
        n_bytes = batch_bytes(
            self.plan.patch_size,
            len(self.plan.channels),
            self.plan.samples_per_step,
            label_itemsize=index_dtype(self.plan).itemsize,
        )
        training, shared = self.plan.training, shared_bytes()
        room = training.queue_bytes
        if training.workers > 0 and shared is not None:
            room = min(room, shared // 2)  # others use it too
        queue = queue_of(n_bytes, workers=training.workers, queue_bytes=room)
        if queue.workers < training.workers:
            logger.warning(
                "%d of %d workers: a batch takes %s, and %s of them may wait (queue_bytes %s, "
                "half of what is free of shared memory %s)",
                queue.workers,
                training.workers,
                format_bytes(n_bytes),
                format_bytes(room),
                format_bytes(training.queue_bytes),
                "no limit" if shared is None else format_bytes(shared // 2),
            )
        return queue

    def train_dataloader(self) -> Batches:
        """The patches of the current epoch; Lightning's sampler deals them out to processes."""
        trainer, training = self.trainer, self.plan.training
        world = trainer.world_size if trainer is not None else 1
        patches = TrainingPatches(
            self.train_cases,
            self.plan.patch_size,
            n_patches=training.steps_per_epoch * self.plan.samples_per_step * world,
            config=training,
            epoch=trainer.current_epoch if trainer is not None else 0,
            augmentation=replace(self.augmentation, share=self._share()),
            external=self.external,
        )
        queue = self._queue()
        return DataLoader(
            patches,
            batch_size=self.plan.samples_per_step,
            num_workers=queue.workers,
            prefetch_factor=queue.ahead or None,
            worker_init_fn=_GiveBack(),
            pin_memory=device_kind(self.plan.device) == "cuda",
        )

    def _share(self) -> float:
        """Of the run that is over as an epoch begins: what its augmentation goes by.

        Counted in epochs it is the same from run to run; by the clock it is not, as the learning
        rate.
        """
        trainer = self.trainer
        clock = getattr(getattr(trainer, "lightning_module", None), "clock", None)
        if clock is None or trainer.current_epoch == 0:
            return 0.0
        return float(clock.fraction(trainer.global_step))

    def val_dataloader(self) -> Batches:
        """The same patches after every epoch, one by one.

        Logits of all classes exist here, as they do not in a step: of a whole batch they would take
        more than it where there are a hundred classes.
        """
        patches = ValidationPatches(
            self.validation_cases,
            self.plan.patch_size,
            n_patches=self.plan.training.validation_patches,
        )
        return DataLoader(patches, batch_size=1)


class _GiveBack:
    """Of a worker, for as long as it lives: what a patch took is given back when it is made."""

    def __call__(self, worker: int) -> None:
        del worker
        self.entered = ExitStack()
        self.entered.enter_context(mapped_blocks())
