"""Cases as training reads them: prepared once, on disk, a patch at a time from then on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from effseg.dataset import Case, read_case
from effseg.errors import DataError
from effseg.plans import Plan
from effseg.postprocess import label_components
from effseg.preprocess import prepare_image, prepare_label
from effseg.types import Array, Shape3

VOXELS_PER_LABEL = 4096
VOXELS_PER_COMPONENT = 64
"""Places remembered to centre patches on: enough to draw from, little enough to keep."""


@dataclass(frozen=True)
class CachedCase:
    """One prepared case.

    Attributes:
        name: of the case.
        shape: of its image and label, voxels.
        image: a `.npy` file, float32 (channels, z, y, x), normalised.
        label: a `.npy` file, (z, y, x): class indices, and `n_classes` where the label is ignored.
        fill: each channel's minimum: what lies outside.
        components: for each foreground class that the case holds, voxels (n, 3) of each of its
            components.
        voxels: for each such class, a sample of its voxels (n, 3).
    """

    name: str
    shape: Shape3
    image: Path
    label: Path
    fill: npt.NDArray[np.float32]
    components: dict[int, tuple[npt.NDArray[np.int32], ...]]
    voxels: dict[int, npt.NDArray[np.int32]]


def cache_case(case: Case, plan: Plan, folder: Path) -> CachedCase:
    """Read and prepare one case and lay it in a folder.

    Raises:
        DataError: if the label map holds a value that the plan does not name.
    """
    image, label = read_case(case)
    prepared = prepare_image(image, plan)
    labels = class_indices(prepare_label(label, plan).array, plan, where=case.name)
    paths = (folder / f"{case.name}.image.npy", folder / f"{case.name}.label.npy")
    np.save(paths[0], prepared.image)
    np.save(paths[1], labels)
    components, voxels = _places(labels, n_classes=len(plan.labels))
    return CachedCase(
        name=case.name,
        shape=prepared.grid.shape,
        image=paths[0],
        label=paths[1],
        fill=prepared.image.min(axis=(1, 2, 3)),
        components=components,
        voxels=voxels,
    )


def class_indices(labels: Array, plan: Plan, *, where: str) -> Array:
    """Label values to class indices; ignored voxels become `len(plan.labels)`."""
    known = {label.value: i for i, label in enumerate(plan.labels)}
    if plan.ignore_label is not None:
        known[plan.ignore_label] = len(plan.labels)
    values = np.unique(labels)
    unknown = [int(value) for value in values if int(value) not in known]
    if unknown:
        raise DataError(
            f"{where}: label values {unknown}; the plan knows {sorted(known)}: "
            "plan this data set again, or correct the label map"
        )
    # torch knows no uint16
    out = np.empty(labels.shape, dtype=np.uint8 if len(plan.labels) < 256 else np.int16)
    for value in values:
        out[labels == value] = known[int(value)]
    return out


def _places(
    labels: Array, *, n_classes: int
) -> tuple[dict[int, tuple[npt.NDArray[np.int32], ...]], dict[int, npt.NDArray[np.int32]]]:
    rng = np.random.default_rng(0)  # which voxels are remembered must not change from run to run
    foreground = np.where(labels < n_classes, labels, 0)
    components, table = label_components(foreground, 1.0)
    by_class: dict[int, list[npt.NDArray[np.int32]]] = {}
    for i, component in enumerate(table):
        inside = np.argwhere(components[component.box] == i + 1)
        inside += [part.start for part in component.box]
        by_class.setdefault(component.label, []).append(_some(inside, VOXELS_PER_COMPONENT, rng))
    voxels = {
        index: _some(np.argwhere(foreground == index), VOXELS_PER_LABEL, rng) for index in by_class
    }
    return {index: tuple(found) for index, found in by_class.items()}, voxels


def _some(places: Array, n: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    if len(places) > n:
        places = places[rng.choice(len(places), n, replace=False)]
    return places.astype(np.int32)
