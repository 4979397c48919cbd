"""What a case and a data set are, and how a case's voxels are read."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effseg.errors import DataError, GeometryError
from effseg.io import read_volume
from effseg.types import Array
from effseg.volume import Volume

WHOLE_TOLERANCE = 1e-3
"""Integers stored with a scale factor come back off by its rounding; further off is a fraction."""

LARGEST_LABEL = 2**32 - 1

_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Case:
    """An image set with its label.

    Attributes:
        name: unlike every other case's of its data set; fit to be a file's name.
        images: one file per channel, or one file that holds all channels.
        label: the label map's file; None where the case has none.
        patient: whom the case shows, where that is known: folds keep a patient together.

    Raises:
        DataError: if the name could not be a file's name, or there is no image.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str | None = None

    def __post_init__(self) -> None:
        # Predictions are written under this name: it must never lead out of their folder.
        if self.name.strip(" .") == "" or any(c in "/\\" or ord(c) < 32 for c in self.name):
            raise DataError(
                f"case name {self.name!r}; expected a name without slashes and control characters: "
                "it becomes a file's name"
            )
        if not self.images:
            raise DataError(f"{self.name}: no image; expected at least one file")


@dataclass(frozen=True)
class Dataset:
    """Cases that belong together, and what is declared of them.

    Attributes:
        name: of its folder or file.
        root: the folder it lies in, or the .csv that lists it.
        layout: "nnunet", "msd", "folders" or "csv".
        cases: sorted by name where the layout has no order of its own.
        channel_names: of the image's channels in their order; None where nothing declares them.
        labels: value to name, background 0 first, the ignore label left out; None where nothing
            declares them.
        ignore_label: the value that loss and score leave out.
        n_declared: how many cases its dataset.json says there are.

    Raises:
        DataError: if there is no case, or two have one name.
    """

    name: str
    root: Path
    layout: str
    cases: tuple[Case, ...]
    channel_names: tuple[str, ...] | None = None
    labels: Mapping[int, str] | None = None
    ignore_label: int | None = None
    n_declared: int | None = None

    def __post_init__(self) -> None:
        if not self.cases:
            raise DataError(f"{self.root}: a data set without a case; expected at least one")
        twice = [name for name, n in Counter(case.name for case in self.cases).items() if n > 1]
        if twice:
            raise DataError(
                f"{self.root}: {len(twice)} names belong to more than one case: "
                f"{some(twice)}; give each case its own name"
            )


def case_and_channel(name: str) -> tuple[str, int | None]:
    """The case and the channel that a file's name without its suffix says, as nnU-Net has it.

    `case_07_0001` is channel 1 of `case_07`; a name that says no channel is the case's own.
    """
    match = _CHANNEL.fullmatch(name)
    return (name, None) if match is None else (match[1], int(match[2]))


def some(names: list[str]) -> str:
    """Up to five of the names, and how many more there are."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


def read_image(case: Case) -> Volume:
    """All channels of a case's image, (C, z, y, x), in the files' own type and unit.

    Raises:
        DataError: if a file cannot be read, or one of several files holds several channels.
        GeometryError: if the channels do not lie on one grid.
    """
    volumes = [read_volume(path) for path in case.images]
    first = volumes[0]
    if len(volumes) == 1:
        array = first.array if first.array.ndim == 4 else first.array[None]
        return Volume(array=array, grid=first.grid)
    for path, volume in zip(case.images, volumes, strict=True):
        if volume.n_channels != 1:
            raise DataError(
                f"{path}: {volume.n_channels} channels in one of {len(volumes)} image files of "
                f"{case.name}; expected one channel a file, or one file with all channels"
            )
        difference = first.grid.difference(volume.grid)
        if difference is not None:
            raise GeometryError(
                f"{case.name}: channels {case.images[0].name} and {path.name} differ in "
                f"{difference}; bring the second over with resample_like(...)"
            )
    channels = [volume.array.reshape(volume.grid.shape) for volume in volumes]
    return Volume(array=np.stack(channels), grid=first.grid)


def read_label(case: Case) -> Volume:
    """A case's label map, (z, y, x), in the smallest unsigned integer type that holds it.

    Files of floats are taken where they hold whole numbers.

    Raises:
        DataError: if there is no label, it cannot be read, has several channels, or holds
            fractions, negative numbers, NaN or infinity; the message names file, value and count.
    """
    if case.label is None:
        raise DataError(f"{case.name}: no label; add its label file or leave the case out")
    volume = read_volume(case.label)
    if volume.n_channels != 1:
        raise DataError(
            f"{case.label}: a label of {volume.n_channels} channels; expected one map of integers: "
            "number the classes in one channel"
        )
    array = volume.array.reshape(volume.grid.shape)
    return Volume(array=_unsigned(array, case.label), grid=volume.grid)


def read_case(case: Case) -> tuple[Volume, Volume]:
    """Image (C, z, y, x) and label (z, y, x) of a case, on one grid.

    Raises:
        DataError: as `read_image` and `read_label` do.
        GeometryError: if channels, or image and label, do not lie on one grid.
    """
    image, label = read_image(case), read_label(case)
    difference = image.grid.difference(label.grid)
    if difference is not None:
        raise GeometryError(
            f"{case.name}: image and label differ in {difference}; "
            "bring the label over with resample_like(...)"
        )
    return image, label


def _unsigned(array: Array, path: Path) -> Array:
    if np.issubdtype(array.dtype, np.floating):
        n_bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if n_bad:
            raise DataError(
                f"{path}: {n_bad} voxels of the label are NaN or infinite; expected whole numbers: "
                "write the label again"
            )
        whole = np.rint(array)
        off = np.abs(array - whole) > WHOLE_TOLERANCE
        if off.any():
            raise DataError(
                f"{path}: {int(np.count_nonzero(off))} voxels of the label hold fractions such as "
                f"{float(array[off][0]):.6g}; expected whole numbers: a label must not be "
                "interpolated as an image is, go back to the original"
            )
        array = whole
    elif not (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_):
        raise DataError(f"{path}: a label of type {array.dtype}; expected whole numbers")
    low, high = array.min(), array.max()
    if low < 0:
        raise DataError(
            f"{path}: {int(np.count_nonzero(array < 0))} voxels of the label are negative, down to "
            f"{int(low)}; expected 0 for background and labels above: is this the label's file?"
        )
    if high > LARGEST_LABEL:
        raise DataError(
            f"{path}: label values up to {float(high):.6g}; expected at most {LARGEST_LABEL}: "
            "is this the label's file?"
        )
    return array.astype(np.min_scalar_type(int(high)), copy=False)
