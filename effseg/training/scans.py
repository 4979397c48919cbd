"""Patches of images alone: what is seen of scans whose labels are not used."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from effseg.augment import Augmentation
from effseg.training.cache import CachedImage
from effseg.training.patches import draw_anywhere, read_image_patch
from effseg.types import Shape3


@dataclass(frozen=True)
class ImagePatches:
    """Patches from anywhere in some images, annotated or not, each case as likely as any other.

    Where foreground is plays no part, though it may be known: a discriminator would tell annotated
    scans by it.

    Attributes:
        cases: to draw from.
        patch_size: voxels.
        seed: of which, and of its number, a patch is a function.
        augmentation: applied to each patch; None: none.
    """

    cases: Sequence[CachedImage]
    patch_size: Shape3
    seed: tuple[int, ...]
    augmentation: Augmentation | None = None

    def __getitem__(self, index: int) -> Tensor:
        """Patch number `index`, from 0: float32, (channels, z, y, x)."""
        seed = (*self.seed, index)
        rng = np.random.default_rng(seed)
        case = self.cases[int(rng.integers(len(self.cases)))]
        start = draw_anywhere(case, self.patch_size, rng)
        image = read_image_patch(case, start, self.patch_size)
        if self.augmentation is None:
            return torch.from_numpy(image)
        unlabelled = np.zeros(self.patch_size, dtype=np.int16)  # holds what stands for ignored
        changed, _ = self.augmentation(image, unlabelled, seed=(*seed, 1))
        return changed

    def batch(self, number: int, size: int) -> Tensor:
        """Batch `number` of `size` patches each, (size, channels, z, y, x)."""
        return torch.stack([self[index] for index in range(number * size, (number + 1) * size)])
