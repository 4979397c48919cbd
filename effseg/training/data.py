"""The data of a run as Lightning takes it."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from effseg.augment import build_augmentation
from effseg.dataset import Case
from effseg.devices import device_kind
from effseg.plans import Plan
from effseg.training.cache import CachedCase, cache_case
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
        progress: called with (cases prepared, cases in all) while preparing.
    """

    def __init__(
        self,
        plan: Plan,
        train: Sequence[Case],
        validation: Sequence[Case],
        folder: Path,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        folder.mkdir(parents=True, exist_ok=True)
        n_cases = len(train) + len(validation)
        cached: list[CachedCase] = []
        for case in (*train, *validation):
            cached.append(cache_case(case, plan, folder))
            if progress is not None:
                progress(len(cached), n_cases)
        self.train_cases = cached[: len(train)]
        self.validation_cases = cached[len(train) :]
        self.augmentation = build_augmentation(
            plan.training.augment,
            spacing=plan.spacing,
            fill_label=len(plan.labels) if plan.ignore_label is not None else None,
        )

    def train_dataloader(self) -> Batches:
        """The patches of the current epoch; Lightning's sampler deals them out to processes."""
        trainer, training = self.trainer, self.plan.training
        world = trainer.world_size if trainer is not None else 1
        patches = TrainingPatches(
            self.train_cases,
            self.plan.patch_size,
            n_patches=training.steps_per_epoch * self.plan.batch_size * world,
            config=training,
            epoch=trainer.current_epoch if trainer is not None else 0,
            augmentation=self.augmentation,
        )
        return DataLoader(
            patches,
            batch_size=self.plan.batch_size,
            num_workers=training.workers,
            pin_memory=device_kind(self.plan.device) == "cuda",
        )

    def val_dataloader(self) -> Batches:
        """The same patches after every epoch."""
        patches = ValidationPatches(
            self.validation_cases,
            self.plan.patch_size,
            n_patches=self.plan.training.validation_patches,
        )
        return DataLoader(patches, batch_size=self.plan.batch_size)
