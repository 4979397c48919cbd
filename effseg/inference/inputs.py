"""Which images a list of files and folders means."""

from collections.abc import Iterable
from pathlib import Path

from effseg.dataset import Case, case_and_channel
from effseg.errors import DataError
from effseg.io import list_volumes, strip_suffix


def find_images(inputs: Iterable[str | Path], *, n_channels: int = 1) -> dict[str, Case]:
    """The cases among some inputs, by name, in order.

    An input is an image, a zip or folder of one DICOM series, or a folder of images. Files named
    `case_0000`, `case_0001`, ... are the channels of one case.

    Args:
        inputs: files and folders.
        n_channels: how many the network takes.

    Raises:
        DataError: if an input is missing or holds no image, a case lacks a channel, or two cases
            have the same name.
    """
    files: list[Path] = []
    for given in (Path(item) for item in inputs):
        if not given.exists():
            raise DataError(f"{given}: no such file or folder")
        inside = list_volumes(given) if given.is_dir() else []
        files += inside or [given]  # a file, a DICOM series, or the reader will say what it is
    cases: dict[str, list[Path]] = {}
    for path in files:
        name, _ = case_and_channel(strip_suffix(path))
        cases.setdefault(name, []).append(path)
    for name, images in cases.items():
        channels = [case_and_channel(strip_suffix(path))[1] for path in images]
        if len(images) > 1 and None in channels:
            raise DataError(
                f"{images[0]} and {images[1]} are both case {name}; rename one or predict it apart"
            )
        if len(images) > 1 and len(images) != n_channels:
            raise DataError(
                f"case {name} has {len(images)} channel files; the network takes {n_channels}"
            )
    return {
        name: Case(name=name, images=tuple(images), label=None) for name, images in cases.items()
    }
