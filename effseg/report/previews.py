"""What augmentation does to a patch of the run: each transform by itself, and whole policies."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from effseg.augment import build_augmentation
from effseg.dataset import Case, read_dataset, read_label
from effseg.errors import DataError, EffsegError, GeometryError
from effseg.io import read_volume
from effseg.plans import CHANGES, AugmentConfig, Plan
from effseg.preprocess import normalise, prepare_label
from effseg.record import RunRecord
from effseg.report.outlines import outline, png_uri
from effseg.report.wording import spell
from effseg.resample import resample_to_spacing
from effseg.types import Array, Shape3, Slices3

LARGEST: Shape3 = (24, 96, 96)
"""Voxels (z, y, x) of what is changed and shown: enough to see, and a small page."""

N_SHOWN, N_TRIED = 2, 20
"""Changed patches beside the patch itself, from the first of so many seeds."""

RANGES: Mapping[str, tuple[str, ...]] = {
    "flip": ("flip_axes",),
    "affine": ("rotate_degrees", "scale"),
}
"""What else of a plan says how far a transform goes."""


@dataclass(frozen=True)
class Tile:
    """The middle slice of a patch.

    Attributes:
        picture: data URI of the image.
        label: SVG path of each label's outline, all in one, in mm.
        ignored: the same of what is left out of the loss.
    """

    picture: str
    label: str
    ignored: str


@dataclass(frozen=True)
class Row:
    """A transform or a policy.

    Attributes:
        name: in words.
        chance: in this run, in words; empty for a policy.
        tiles: changed patches; none where nothing changes.
    """

    name: str
    chance: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Previews:
    """One patch, and what becomes of it.

    Attributes:
        case: that it is of.
        size_mm: (height, width) of every tile.
        before: as it is read.
        rows: transforms, then policies.
        problem: why there are none, in a sentence; empty if there are.
    """

    case: str = ""
    size_mm: tuple[float, float] = (1.0, 1.0)
    before: Tile | None = None
    rows: tuple[Row, ...] = ()
    problem: str = ""


def preview_augmentation(plan: Plan, record: RunRecord | None) -> Previews:
    """Change a patch of the first case that a run learnt from, as its plan does and otherwise.

    The first channel is read, where the case's label is largest; a place of it as large as
    `LARGEST` at most is brought to the plan's spacing.

    Returns:
        The previews. A file that is not there any more makes no exception but a sentence.
    """
    if record is None or not record.train:
        return Previews(problem="No preview before the run has ended.")
    name = record.train[0]
    try:
        cases = {case.name: case for case in read_dataset(record.dataset).cases}
        if name not in cases:
            raise DataError(f"{record.dataset}: holds no case {name} any more")
        image, label = _read_patch(cases[name], plan)
    except (EffsegError, OSError) as error:
        return Previews(problem=f"No preview of the augmentation: {error}")
    inside = image[0, len(label) // 2]
    low, high = np.quantile(inside.numpy(), (0.005, 0.995)).tolist()
    artist = _Artist(plan, window=(low, high), ignored=int(label.max()) + 1)
    own = plan.training.augment
    rows = [artist.row(change, image, label) for change in CHANGES]
    rows += [
        Row(name, "", artist.tiles(config, image, label))
        for name, config in (
            *((f"policy {name}", _named(own, name)) for name in ("light", "default", "strong")),
            ("this run", own),
        )
    ]
    rows_mm, columns_mm = plan.spacing[1:]
    return Previews(
        case=name,
        size_mm=(inside.shape[0] * rows_mm, inside.shape[1] * columns_mm),
        before=artist.tile(image, label),
        rows=tuple(rows),
    )


def _named(own: AugmentConfig, policy: str) -> AugmentConfig:
    """A policy along the axes that the data allow, all the time."""
    return AugmentConfig.model_validate({"policy": policy, "flip_axes": own.flip_axes})


@dataclass(frozen=True)
class _Artist:
    """Draws changed patches in one window of intensities."""

    plan: Plan
    window: tuple[float, float]
    ignored: int

    def row(self, change: str, image: Tensor, label: Tensor) -> Row:
        """One transform with certainty, as far as it goes in this run."""
        own = self.plan.training.augment
        chance = getattr(own, change) * own.highest_probability
        ranges = {name: getattr(own, name) for name in RANGES.get(change, ())}
        config = AugmentConfig.model_validate({"policy": "off", change: 1.0} | ranges)
        said = f"{chance:.0%} of patches" if chance else "never"
        return Row(spell(change), said, self.tiles(config, image, label))

    def tiles(self, config: AugmentConfig, image: Tensor, label: Tensor) -> tuple[Tile, ...]:
        """What the first seeds that change something make of a patch."""
        augment = build_augmentation(
            config,
            spacing=self.plan.spacing,
            fill_label=self.ignored if self.plan.ignores_voxels else None,
        )
        found: dict[Tile, None] = {}
        before = self.tile(image, label)
        for seed in range(N_TRIED):
            after = self.tile(*augment(image, label, seed=seed))
            if after != before:
                found[after] = None
            if len(found) == N_SHOWN:
                break
        return tuple(found)

    def tile(self, image: Tensor, label: Tensor) -> Tile:
        """The middle slice of a patch."""
        picture, labels = (part[len(label) // 2].numpy() for part in (image[0], label))
        rows_mm, columns_mm = self.plan.spacing[1:]
        outlines = {
            value: outline(labels == value, spacing=(rows_mm, columns_mm))
            for value in np.unique(labels).tolist()
            if value != 0
        }
        left_out = [outlines.pop(v, "") for v in (self.plan.ignore_label, self.ignored)]
        return Tile(
            picture=png_uri(picture, window=self.window),
            label=" ".join(outlines.values()),
            ignored=" ".join(path for path in left_out if path),
        )


def _read_patch(case: Case, plan: Plan) -> tuple[Tensor, Tensor]:
    """Image (1, z, y, x) and label (z, y, x) of a place in a case, at the plan's spacing.

    Raises:
        DataError: if a file cannot be read.
        GeometryError: if image and label do not lie on one grid.
    """
    label = read_label(case)
    label = label.reordered(label.grid.canonical_axes())
    image = read_volume(case.images[0], channel=0)
    image = image.reordered(image.grid.canonical_axes())
    difference = image.grid.difference(label.grid)
    if difference is not None:
        raise GeometryError(f"{case.name}: image and label differ in {difference}")
    box = _box(label.array, label.grid.spacing, plan)
    image = resample_to_spacing(image.crop(box), plan.spacing)
    labels = prepare_label(label.crop(box), plan).array.astype(np.int32)
    grey = normalise(image.array.reshape(labels.shape), plan.channels[0])
    return torch.from_numpy(grey)[None], torch.from_numpy(labels)


def _box(label: Array, spacing: tuple[float, float, float], plan: Plan) -> Slices3:
    """About the middle of the slice that holds most of a label, as large as is shown."""
    marked = label > 0
    z = int(marked.sum(axis=(1, 2)).argmax()) if marked.any() else len(label) // 2
    places = np.argwhere(marked[z]) if marked.any() else np.array([label.shape[1:]]) // 2
    middle = (z, *np.median(places, axis=0).astype(int).tolist())
    parts = []
    for centre, n, length, own, most, patch in zip(
        middle, label.shape, spacing, plan.spacing, LARGEST, plan.patch_size, strict=True
    ):
        size = min(n, max(1, round(min(most, patch) * own / length)))
        start = min(max(0, centre - size // 2), n - size)
        parts.append(slice(start, start + size))
    return (parts[0], parts[1], parts[2])
