"""An nnU-Net raw data set of chest CT with nodules: its labels, its folders, its dataset.json."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effseg import DataError, Volume, write_volume

BACKGROUND, NODULE, IGNORE = 0, 1, 2

MIN_READERS = 3
"""A target has been outlined by this many readers at least; what fewer saw is ignored."""


@contextmanager
def new_dataset(out: Path) -> Iterator[Path]:
    """A folder to write the cases of a new data set into; it appears at `out` when all are there.

    After an error nothing is left behind.

    Raises:
        DataError: if `out` exists, or no case was written.
    """
    if out.exists():
        raise DataError(f"{out}: exists; name a new folder, or remove this one first")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        n_train = len(list(partial.glob("labelsTr/*.nii.gz")))
        if n_train == 0:
            raise DataError(f"{out}: not one case was written; name at least one to train on")
        description = {
            "channel_names": {"0": "CT"},
            "labels": {"background": BACKGROUND, "nodule": NODULE, "ignore": IGNORE},
            "numTraining": n_train,
            "file_ending": ".nii.gz",
        }
        (partial / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_case(folder: Path, case: str, *, image: Volume, label: Volume, held_out: bool) -> None:
    """Write one case: imagesTr and labelsTr, or imagesTs and labelsTs where it is held out."""
    part = "Ts" if held_out else "Tr"
    for kind in ("images", "labels"):
        (folder / f"{kind}{part}").mkdir(exist_ok=True)
    write_volume(image, folder / f"images{part}" / f"{case}_0000.nii.gz")
    write_volume(label, folder / f"labels{part}" / f"{case}.nii.gz")
