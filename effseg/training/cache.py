"""Cases as training reads them: prepared once, on disk, a patch at a time from then on.

An image is prepared a few planes at a time and never whole in memory. Its label map is, in the
smallest type, where it comes at another spacing; class indices and components are made of it slab
by slab.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from effseg.dataset import Case, read_label
from effseg.errors import DataError, GeometryError
from effseg.io import SlabReader
from effseg.planner.host import SLAB_VOXELS, WHOLE_BYTES, case_bytes
from effseg.plans import Plan, PostprocessConfig
from effseg.postprocess import ComponentStream
from effseg.preprocess import Frame, PreparedSlabs, prepare_label
from effseg.sources import ImageFiles
from effseg.training.places import Places, sample_places
from effseg.training.planes import PlaneFile
from effseg.types import Array, Shape3, Slices3


@dataclass(frozen=True)
class CachedImage:
    """One prepared image.

    Attributes:
        name: of the case.
        shape: of its image, voxels.
        image: float32, normalised; planes as they came: (planes along `axis`, channels, the other
            two axes).
        axis: of (z, y, x), along which planes follow one another in that file.
        backwards: whether they do from the last to the first.
        fill: each channel's minimum: what lies outside.
    """

    name: str
    shape: Shape3
    image: PlaneFile
    axis: int
    backwards: bool
    fill: npt.NDArray[np.float32]

    def read_image(self, box: Slices3) -> npt.NDArray[np.float32]:
        """The image (channels, z, y, x) of a box that lies inside the case."""
        along, n = box[self.axis], self.shape[self.axis]
        if self.backwards:
            along = slice(n - along.stop, n - along.start)
        rows, columns = (part for axis, part in enumerate(box) if axis != self.axis)
        image = np.moveaxis(self.image.read(along, rows, columns), 0, 1 + self.axis)
        return np.flip(image, 1 + self.axis) if self.backwards else image


@dataclass(frozen=True)
class CachedCase(CachedImage):
    """One prepared case.

    Attributes:
        label: class indices, and `n_classes` where the label is ignored; (z, 1, y, x).
        places: where foreground is.
    """

    label: PlaneFile
    places: Places

    def read(self, box: Slices3) -> tuple[npt.NDArray[np.float32], Array]:
        """Image (channels, z, y, x) and label (z, y, x) of a box that lies inside the case."""
        return self.read_image(box), self.label.read(*box)[:, 0]


def cache_case(case: Case, plan: Plan, folder: Path) -> CachedCase:
    """Read and prepare one case and lay it in a folder.

    Raises:
        DataError: if a file cannot be read, or the label map holds a value that the plan does not
            name.
        GeometryError: if channels, or image and label, do not lie on one grid.
    """
    files = ImageFiles.judged(case.images, name=case.name)
    label = read_label(case)
    difference = files.grid.difference(label.grid)
    if difference is not None:
        raise GeometryError(
            f"{case.name}: image and label differ in {difference}; "
            "bring the label over with resample_like(...)"
        )
    prepared = prepare_label(label, plan)
    del label
    shape = prepared.grid.shape
    label_file = PlaneFile(
        folder / f"{case.name}.label", (shape[0], 1, *shape[1:]), index_dtype(plan)
    )
    places = _write_label(label_file.path, prepared.array, plan, where=case.name)
    del prepared
    image = _cache(files, case.name, plan, folder)
    return CachedCase(
        name=image.name,
        shape=image.shape,
        image=image.image,
        axis=image.axis,
        backwards=image.backwards,
        fill=image.fill,
        label=label_file,
        places=places,
    )


def cache_image(case: Case, plan: Plan, folder: Path) -> CachedImage:
    """Read and prepare the image of a case, whose label is not looked at, as `cache_case` does.

    Raises:
        DataError: if a file cannot be read.
        GeometryError: if channels do not lie on one grid.
    """
    return _cache(ImageFiles.judged(case.images, name=case.name), case.name, plan, folder)


def _cache(files: ImageFiles, name: str, plan: Plan, folder: Path) -> CachedImage:
    frame = _file_frame(files, plan)
    shape = frame.grid.shape
    stored_bytes = files.n_channels * files.grid.n_voxels * files.voxel_bytes
    image = files.opened(whole=stored_bytes <= WHOLE_BYTES)
    rows, columns = (n for axis, n in enumerate(shape) if axis != frame.axis)
    image_file = PlaneFile(
        folder / f"{name}.image",
        (shape[frame.axis], files.n_channels, rows, columns),
        np.dtype(np.float32),
    )
    fill = _write_image(image_file.path, PreparedSlabs(image, frame, plan))
    return CachedImage(
        name=name,
        shape=shape,
        image=image_file,
        axis=frame.axis,
        backwards=frame.backwards,
        fill=fill,
    )


def caching_bytes(case: Case, plan: Plan) -> int:
    """What `cache_case` takes at most, by the headers of the case's files.

    Raises:
        DataError: if one cannot be used.
        GeometryError: if an image's axes are not orthogonal.
    """
    files = ImageFiles.judged(case.images, name=case.name)
    assert case.label is not None
    return case_bytes(
        _file_frame(files, plan),
        plan,
        image_itemsize=files.voxel_bytes,
        label_dtype=SlabReader(case.label, channel=0).dtype,
    )


def _file_frame(files: ImageFiles, plan: Plan) -> Frame:
    """The frame of an image swept along the first axis of its files, as they are read."""
    frames = (Frame.of(files.grid, plan, axis=axis) for axis in range(3))
    return next(frame for frame in frames if frame.native_axis == 0)


def _write_image(path: Path, image: PreparedSlabs) -> npt.NDArray[np.float32]:
    """Lay an image's planes in a file as they come; the smallest value of each channel."""
    axis = image.frame.axis
    fill = np.full(image.n_channels, np.inf, dtype=np.float32)
    with path.open("wb") as file:
        for _, planes in image.slabs(axis):
            np.minimum(fill, planes.min(axis=(1, 2, 3)), out=fill)
            file.write(np.ascontiguousarray(np.moveaxis(planes, 1 + axis, 0)).data)
    return fill


def _write_label(path: Path, labels: Array, plan: Plan, *, where: str) -> Places:
    """Lay a label map's class indices in a file, and find where foreground is."""
    n_classes = len(plan.labels)
    with ComponentStream(1.0, PostprocessConfig()) as stream, path.open("wb") as file:
        for slab in class_indices(labels, plan, where=where):
            file.write(slab.data)
            stream.add(np.where(slab < n_classes, slab, 0))
        return sample_places(stream)


def class_indices(labels: Array, plan: Plan, *, where: str) -> Iterator[Array]:
    """Label values to class indices, some planes at a time; ignored voxels: `len(plan.labels)`.

    Raises:
        DataError: after the last planes, if there are values that the plan does not know.
    """
    known = {label.value: i for i, label in enumerate(plan.labels)}
    if plan.ignore_label is not None:
        known[plan.ignore_label] = len(plan.labels)
    values = np.array(sorted(known))
    indices = np.array([known[value] for value in values.tolist()], dtype=index_dtype(plan))
    unknown: set[int] = set()
    thickness = max(1, SLAB_VOXELS // (labels.shape[1] * labels.shape[2]))
    for start in range(0, len(labels), thickness):
        slab = labels[start : start + thickness]
        places = np.minimum(np.searchsorted(values, slab), len(values) - 1)
        unknown.update(np.unique(slab[values[places] != slab]).tolist())
        yield indices[places]
    if unknown:
        raise DataError(
            f"{where}: label values {sorted(unknown)}; the plan knows {values.tolist()}: "
            "plan this data set again, or correct the label map"
        )


def index_dtype(plan: Plan) -> "np.dtype[np.generic]":
    """Of class indices; torch knows no uint16."""
    return np.dtype(np.uint8 if len(plan.labels) < 256 else np.int16)
