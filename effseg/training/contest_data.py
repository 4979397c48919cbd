"""What a segmenter and a discriminator see: batches that stage and step alone decide."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from effseg.dataset import Case, NineWaySplit
from effseg.memory import mapped_blocks
from effseg.plans import Plan
from effseg.training.cache import CachedCase, CachedImage, cache_image
from effseg.training.data import PatchData
from effseg.training.external import open_external
from effseg.training.patches import TrainingPatches, ValidationPatches
from effseg.training.scans import ImagePatches

FIXED = 0
"""Of the seeds of patches that are looked at, not learnt from; stages count from 1."""


class ContestData:
    """Prepared cases on disk, and the patches of each step.

    Batches are made when they are asked for, in this process: between steps, when no activation
    lives.

    Args:
        plan: patch, batch, shares and augmentation.
        split: which case is for what.
        labelled: cases among which the annotated ones are.
        scans: cases among which the unannotated ones are; their labels are not looked at.
        folder: where the prepared cases lie.
        progress: called with (cases prepared, cases in all) while preparing.
    """

    def __init__(
        self,
        plan: Plan,
        split: NineWaySplit,
        labelled: Sequence[Case],
        scans: Sequence[Case],
        folder: Path,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.plan = plan
        ours, theirs = ({case.name: case for case in cases} for cases in (labelled, scans))
        train, validation, test = (
            [ours[name] for name in names]
            for names in (split.segmenter.train, split.segmenter.validation, split.segmenter.test)
        )
        apart = [theirs[name] for name in split.unannotated]
        external = open_external(plan, [*validation, *test, *apart])
        n_labelled = sum(map(len, (train, validation, *external)))

        def told(done: int, _: int) -> None:
            if progress is not None:
                progress(done, n_labelled + len(apart))

        self._data = PatchData(
            plan, train, validation, folder / "labelled", external=external, progress=told
        )
        self._known = {case.name: case for case in self._data.train_cases}
        self._apart: dict[str, CachedImage] = {}
        (folder / "scans").mkdir(parents=True, exist_ok=True)
        with mapped_blocks():
            for case in apart:
                self._apart[case.name] = cache_image(case, plan, folder / "scans")
                told(n_labelled + len(self._apart), 0)
        self.split = split

    def labelled(self, stage: int, step: int) -> tuple[Tensor, Tensor]:
        """The annotated batch of a step of the segmenter: images and labels."""
        plan, data = self.plan, self._data
        patches = TrainingPatches(
            data.train_cases,
            plan.patch_size,
            n_patches=(step + 1) * plan.batch_size,
            config=plan.training,
            epoch=stage,
            augmentation=data.augmentation,
            external=data.external,
        )
        batch = [patches[step * plan.batch_size + i] for i in range(plan.batch_size)]
        images, labels = zip(*batch, strict=True)
        return torch.stack(images), torch.stack(labels)

    def known(self, stage: int, step: int) -> Tensor:
        """A batch of scans, as the discriminator learns them, that the segmenter is trained on."""
        return self._batch(self._known_cases("train"), 0, stage, step)

    def unknown(self, stage: int, step: int) -> Tensor:
        """A batch of scans that the segmenter sees no label of."""
        return self._batch(self._apart_cases("train"), 1, stage, step)

    def looks(self, part: str, n_patches: int) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
        """The same patches each time, known and unknown, of the discriminator's "train" and so on.

        Made one by one when they are looked at.
        """
        cases: tuple[Sequence[CachedImage], ...] = (
            self._known_cases(part),
            self._apart_cases(part),
        )
        known, unknown = (
            ImagePatches(found, self.plan.patch_size, (self.plan.training.seed, kind, FIXED))
            for kind, found in enumerate(cases)
        )
        return (
            (known[i] for i in range(n_patches)),
            (unknown[i] for i in range(n_patches)),
        )

    def training_looks(self, n_patches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same patches each time of cases that the segmenter is trained on."""
        return self._fixed(self._data.train_cases, n_patches)

    def validation_looks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same patches each time of the segmenter's validation cases."""
        return self._fixed(self._data.validation_cases, self.plan.training.validation_patches)

    def _fixed(
        self, cases: Sequence[CachedCase], n_patches: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        patches = ValidationPatches(cases, self.plan.patch_size, n_patches=n_patches)
        return (patches[i] for i in range(n_patches))

    def _batch(self, cases: Sequence[CachedImage], kind: int, stage: int, step: int) -> Tensor:
        patches = ImagePatches(
            cases,
            self.plan.patch_size,
            seed=(self.plan.training.seed, kind, 1 + stage),
            augmentation=self._data.augmentation,
        )
        return patches.batch(step, self.plan.batch_size)

    def _known_cases(self, part: str) -> list[CachedCase]:
        return [self._known[name] for name in getattr(self.split.discriminator.annotated, part)]

    def _apart_cases(self, part: str) -> list[CachedImage]:
        return [self._apart[name] for name in getattr(self.split.discriminator.unannotated, part)]
