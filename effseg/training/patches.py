"""Which patches a step sees: drawn from (seed, epoch, index) alone, whoever draws them."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from effseg.augment import Augmentation
from effseg.plans import TrainingConfig
from effseg.training.cache import CachedCase, CachedImage
from effseg.types import Array, Shape3, Slices3

Start: TypeAlias = tuple[int, int, int]


class TrainingPatches(TorchDataset[tuple[Tensor, Tensor]]):
    """One epoch of augmented patches.

    A share of the patches (`config.foreground`) holds a foreground voxel: of a class drawn evenly
    from those the case has, and for a share of these (`config.small_components`) of a component
    drawn evenly, so that a small lesion is seen as often as a large one.

    Args:
        cases: to draw from, each as likely as any other.
        patch_size: voxels.
        n_patches: of the epoch, over all processes.
        config: the shares and the seed.
        epoch: part of each patch's seed.
        augmentation: applied to each patch.
        external: cases of other data sets, and the share of the patches that comes from each.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        patch_size: Shape3,
        *,
        n_patches: int,
        config: TrainingConfig,
        epoch: int,
        augmentation: Augmentation,
        external: Sequence[tuple[float, Sequence[CachedCase]]] = (),
    ) -> None:
        self.cases = cases
        self.external = external
        self.patch_size = patch_size
        self.n_patches = n_patches
        self.config = config
        self.epoch = epoch
        self.augmentation = augmentation

    def __len__(self) -> int:
        return self.n_patches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        seed = (self.config.seed, self.epoch, index)
        rng = np.random.default_rng(seed)
        cases = self._source(rng)
        case = cases[int(rng.integers(len(cases)))]
        start = draw_start(case, self.patch_size, rng, self.config)
        image, label = read_patch(case, start, self.patch_size)
        return self.augmentation(image, label, seed=(*seed, 1))

    def _source(self, rng: np.random.Generator) -> Sequence[CachedCase]:
        """The data set that a patch comes from; nothing is drawn where there is only one."""
        if not self.external:
            return self.cases
        at = rng.random()
        for share, cases in self.external:
            if at < share:
                return cases
            at -= share
        return self.cases


class ValidationPatches(TorchDataset[tuple[Tensor, Tensor]]):
    """The same patches after every epoch, spread over the cases.

    Half of them lie on foreground, half anywhere: what is found where nothing is counts as well.

    Args:
        cases: of the fold's validation part.
        patch_size: voxels.
        n_patches: as many, case after case.
    """

    def __init__(self, cases: Sequence[CachedCase], patch_size: Shape3, *, n_patches: int) -> None:
        half = TrainingConfig(foreground=0.5)
        chosen = [cases[i % len(cases)] for i in range(n_patches)]
        self.places = [
            (case, draw_start(case, patch_size, np.random.default_rng((0, i)), half))
            for i, case in enumerate(chosen)
        ]
        self.patch_size = patch_size

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        case, start = self.places[index]
        image, label = read_patch(case, start, self.patch_size)
        return torch.from_numpy(image), torch.from_numpy(label)


def draw_start(
    case: CachedCase, patch_size: Shape3, rng: np.random.Generator, config: TrainingConfig
) -> Start:
    """The first voxel of a patch; below zero where the case is smaller than the patch."""
    size = np.asarray(patch_size)
    room = np.asarray(case.shape) - size
    start = np.asarray(draw_anywhere(case, patch_size, rng))
    if case.places.voxels and rng.random() < config.foreground:
        index = int(rng.choice(sorted(case.places.voxels)))
        places = case.places.voxels[index]
        if rng.random() < config.small_components:
            component = case.places.components[index]
            places = component[int(rng.integers(len(component)))]
        # the voxel lies in the middle half of the patch, not always at its very centre
        offset = size // 4 + rng.integers(0, np.maximum(size // 2, 1))
        wanted = places[int(rng.integers(len(places)))] - offset
        start = np.where(room >= 0, np.clip(wanted, 0, np.maximum(room, 0)), start)
    return (int(start[0]), int(start[1]), int(start[2]))


def read_patch(
    case: CachedCase, start: Start, patch_size: Shape3
) -> tuple[npt.NDArray[np.float32], Array]:
    """Image (channels, z, y, x) and label (z, y, x) of a patch.

    What lies outside the case is each channel's minimum, and background.
    """
    source, target = _inside(case.shape, start, patch_size)
    image, label = case.read(source)
    labels = np.zeros(patch_size, dtype=label.dtype)
    labels[target] = label
    return _filled_up(image, case, target, patch_size), labels


def read_image_patch(
    case: CachedImage, start: Start, patch_size: Shape3
) -> npt.NDArray[np.float32]:
    """Image (channels, z, y, x) of a patch; outside the case it is each channel's minimum."""
    source, target = _inside(case.shape, start, patch_size)
    return _filled_up(case.read_image(source), case, target, patch_size)


def _filled_up(
    image: npt.NDArray[np.float32], case: CachedImage, target: Slices3, patch_size: Shape3
) -> npt.NDArray[np.float32]:
    patch = np.empty((len(image), *patch_size), dtype=np.float32)
    patch[:] = case.fill.reshape(-1, 1, 1, 1)
    patch[(slice(None), *target)] = image
    return patch


def draw_anywhere(case: CachedImage, patch_size: Shape3, rng: np.random.Generator) -> Start:
    """The first voxel of a patch, each as likely; below zero where the case is smaller."""
    room = np.asarray(case.shape) - np.asarray(patch_size)
    start = rng.integers(np.minimum(room, 0), np.maximum(room, 0) + 1)
    return (int(start[0]), int(start[1]), int(start[2]))


def _inside(shape: Shape3, start: Start, patch_size: Shape3) -> tuple[Slices3, Slices3]:
    """Which voxels of a case a patch shows, and where they lie in the patch."""
    source, target = [], []
    for first, length, n in zip(start, patch_size, shape, strict=True):
        low, high = max(first, 0), min(first + length, n)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    return (source[0], source[1], source[2]), (target[0], target[1], target[2])
