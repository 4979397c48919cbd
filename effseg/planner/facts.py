"""The fingerprint: what one pass over a data set says about it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from effseg.dataset import Case, Dataset, read_case, read_dataset
from effseg.errors import DataError
from effseg.plans import ChannelFacts, Fingerprint, LabelFacts
from effseg.postprocess import DEFAULT_FRACTION, label_components
from effseg.types import Array, FloatArray, Shape3, Spacing

SAMPLES_PER_CASE = 10_000
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
CT_MINIMUM = -500.0
"""Air and the padding around a CT lie below it; hardly any other modality goes there."""

Progress = Callable[[int, int, str], None]
"""Called with (cases read, cases in all, the case's name)."""


@dataclass
class _Channel:
    """One channel's foreground intensities, case after case."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0
    minima: list[float] = field(default_factory=list)
    maxima: list[float] = field(default_factory=list)
    samples: list[FloatArray] = field(default_factory=list)

    def add(self, image: Array, foreground: Array, rng: np.random.Generator) -> None:
        self.minima.append(float(image.min()))
        self.maxima.append(float(image.max()))
        values = image[foreground].astype(np.float64)
        self.n += values.size
        self.total += float(values.sum())
        self.squares += float((values * values).sum())
        if values.size > SAMPLES_PER_CASE:
            values = rng.choice(values, SAMPLES_PER_CASE, replace=False)
        self.samples.append(values)

    def facts(self, name: str | None, index: int) -> ChannelFacts:
        is_ct, why = self._modality(name)
        values = np.concatenate(self.samples)
        if values.size == 0:
            raise DataError("no case has a labelled voxel; there is nothing to learn from")
        mean = self.total / self.n
        low, middle, high = (float(v) for v in np.percentile(values, (0.5, 50, 99.5)))
        return ChannelFacts(
            name=name or f"channel_{index}",
            is_ct=is_ct,
            why=why,
            foreground_mean=mean,
            foreground_std=float(np.sqrt(max(self.squares / self.n - mean * mean, 0.0))),
            foreground_percentiles=(low, middle, high),
            minimum=min(self.minima),
            maximum=max(self.maxima),
        )

    def _modality(self, name: str | None) -> tuple[bool, str]:
        if name is not None:
            return name.strip().lower() == "ct", f"the data set calls it {name}"
        n_low = sum(minimum <= CT_MINIMUM for minimum in self.minima)
        is_ct = n_low == len(self.minima)
        return is_ct, (
            f"the data set does not name it; {n_low} of {len(self.minima)} images reach below "
            f"{CT_MINIMUM:.0f}" + (", as Hounsfield units do" if is_ct else "")
        )


@dataclass
class _Label:
    """One label's voxels and components, case after case."""

    n_cases: int = 0
    n_voxels: int = 0
    component_mm3: list[float] = field(default_factory=list)
    small_mm3: float = 0.0

    def add(self, volumes_mm3: FloatArray, voxel_mm3: float) -> None:
        self.n_cases += 1
        self.n_voxels += round(float(volumes_mm3.sum()) / voxel_mm3)
        self.component_mm3.extend(volumes_mm3.tolist())
        small = volumes_mm3 < volumes_mm3.max() * DEFAULT_FRACTION
        self.small_mm3 += float(volumes_mm3[small].sum())

    def facts(self, value: int, name: str, n_labelled: int) -> LabelFacts:
        volumes = np.asarray(self.component_mm3 or [0.0])
        return LabelFacts(
            value=value,
            name=name,
            n_cases=self.n_cases,
            voxel_share=self.n_voxels / n_labelled if n_labelled else 0.0,
            n_components=len(self.component_mm3),
            component_mm3=tuple(float(v) for v in np.percentile(volumes, PERCENTILES)),
            small_share=self.small_mm3 / max(float(volumes.sum()), 1e-9),
        )


def fingerprint(dataset: Dataset | str | Path, *, progress: Progress | None = None) -> Fingerprint:
    """Read every case of a data set once and note what planning needs.

    Args:
        dataset: a `Dataset`, or its folder or CSV.
        progress: called after each case.

    Raises:
        DataError: if a case cannot be read, holds an undeclared label, or no voxel is labelled.
        GeometryError: if an image and its label lie on different grids.
    """
    if not isinstance(dataset, Dataset):
        dataset = read_dataset(dataset)
    rng = np.random.default_rng(0)
    channels: list[_Channel] = []
    labels: dict[int, _Label] = {}
    spacings: list[Spacing] = []
    shapes: list[Shape3] = []
    foreground_mm3: dict[str, float] = {}
    n_labelled = 0
    for done, case in enumerate(dataset.cases, start=1):
        image, label = read_case(case)
        canonical = label.grid.reordered(label.grid.canonical_axes())
        spacings.append(canonical.spacing)
        shapes.append(canonical.shape)
        planes = image.array if image.array.ndim == 4 else image.array[None]
        if not channels:
            channels = [_Channel() for _ in planes]
        if len(planes) != len(channels):
            raise DataError(
                f"{case.name}: {len(planes)} channels; the cases before it have {len(channels)}"
            )
        target = np.where(label.array == (dataset.ignore_label or 0), 0, label.array)
        for channel, plane in zip(channels, planes, strict=True):
            channel.add(plane, target > 0, rng)
        n_labelled += label.array.size
        foreground_mm3[case.name] = int(np.count_nonzero(target)) * label.grid.voxel_mm3
        _note_labels(labels, target, case, dataset, voxel_mm3=label.grid.voxel_mm3)
        if progress is not None:
            progress(done, len(dataset.cases), case.name)
    declared = dataset.labels or {value: f"label_{value}" for value in sorted({0, *labels})}
    names = dataset.channel_names
    return Fingerprint(
        dataset=dataset.name,
        n_cases=len(dataset.cases),
        spacings=tuple(spacings),
        shapes=tuple(shapes),
        channels=tuple(
            channel.facts(None if names is None else names[i], i)
            for i, channel in enumerate(channels)
        ),
        labels=tuple(
            labels.get(value, _Label()).facts(value, name, n_labelled)
            for value, name in sorted(declared.items())
            if value != 0
        ),
        ignore_label=dataset.ignore_label,
        foreground_mm3=foreground_mm3,
    )


def _note_labels(
    labels: dict[int, _Label], target: Array, case: Case, dataset: Dataset, *, voxel_mm3: float
) -> None:
    _, components = label_components(target, voxel_mm3)
    volumes: dict[int, list[float]] = {}
    for component in components:
        volumes.setdefault(component.label, []).append(component.volume_mm3)
    unknown = sorted(set(volumes) - set(dataset.labels or volumes))
    if unknown:
        raise DataError(
            f"{case.label}: label values {unknown}; the data set declares "
            f"{sorted(dataset.labels or ())}: correct the label map or dataset.json"
        )
    for value, found in volumes.items():
        labels.setdefault(value, _Label()).add(np.asarray(found), voxel_mm3)
