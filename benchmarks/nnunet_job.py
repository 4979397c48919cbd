"""nnU-Net run by its command line, from an environment of its own."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process_tree import Took, watched

from effseg.dataset import Case
from effseg.io import VOLUME_SUFFIXES
from effseg.plans import Plan

TRAINER = Path(__file__).with_name("nnunet_trainer.py")
NAME = "Dataset001_beside"
CONFIGURATION = "3d_fullres"
FOLD = 0
WORKERS = 2
"""For each of its jobs that has some."""
OPTIONS = ("-tr", "nnUNetTrainerMinutes", "-device", "cpu")


@dataclass(frozen=True)
class NnUNetJob:
    """One training of nnU-Net, and the cases that it labels.

    Attributes:
        home: the folder in which everything lies.
        venv: the environment that nnU-Net is installed in.
    """

    home: Path
    venv: Path

    @property
    def ready(self) -> Path:
        """Where the prepared cases lie."""
        return self.home / "preprocessed" / NAME

    @property
    def predicted(self) -> Path:
        """Where the label maps lie, among other files."""
        return self.home / "predicted"

    def lay_out(self, cases: Sequence[Case], unseen: Path, plan: Plan) -> None:
        """Make nnU-Net's folders, with links to the files.

        Args:
            cases: to train on.
            unseen: the folder of the images to label.
            plan: tells the names of channels and labels.
        """
        raw = self.home / "raw" / NAME
        for folder in (raw / "imagesTr", raw / "labelsTr", self.home / "images"):
            folder.mkdir(parents=True)
        for case in cases:
            assert case.label is not None
            suffix = suffix_of(case.images[0])
            (raw / "imagesTr" / f"{case.name}_0000{suffix}").symlink_to(case.images[0].resolve())
            (raw / "labelsTr" / f"{case.name}{suffix}").symlink_to(case.label.resolve())
        for image in unseen.iterdir():
            suffix = suffix_of(image)
            name = f"{image.name.removesuffix(suffix)}_0000{suffix}"
            (self.home / "images" / name).symlink_to(image.resolve())
        said = {
            "channel_names": {str(i): channel.name for i, channel in enumerate(plan.channels)},
            "labels": {label.name: label.value for label in plan.labels},
            "numTraining": len(cases),
            "file_ending": suffix_of(cases[0].images[0]),
        }
        (raw / "dataset.json").write_text(json.dumps(said, indent=1))

    def prepare(self, split: Mapping[str, Sequence[str]]) -> Took:
        """Plan by its defaults and prepare the cases.

        Args:
            split: names of the cases that it trains on, "train", and of the others, "val".
        """
        took = self._run(
            *("plan_and_preprocess", "-d", 1, "-c", CONFIGURATION),
            *("-np", WORKERS, "-npfp", WORKERS),
        )
        (self.ready / "splits_final.json").write_text(json.dumps([split]))
        return took

    @contextmanager
    def trainer(self, minutes: float) -> Iterator[None]:
        """Lay the trainer of so many minutes among nnU-Net's own, for a while.

        There it is found first. Before nnU-Net looks into other folders it imports each of its own
        trainers, and some of them want packages that do not go with a torch for CPUs.
        """
        (self.ready / "minutes.json").write_text(json.dumps({"minutes": minutes}))
        trainers = "lib/python3.*/site-packages/nnunetv2/training/nnUNetTrainer"
        (folder,) = self.venv.glob(trainers)
        copied = Path(shutil.copy(TRAINER, folder / "nnUNetTrainerMinutes.py"))
        try:
            yield
        finally:
            copied.unlink()

    def train(self) -> Took:
        """Train, within `trainer`."""
        return self._run("train", 1, CONFIGURATION, FOLD, *OPTIONS)

    def predict(self) -> Took:
        """Label the cases that it has not seen, within `trainer`."""
        return self._run(
            *("predict", "-d", 1, "-c", CONFIGURATION, "-f", FOLD, *OPTIONS),
            *("-i", self.home / "images", "-o", self.predicted, "-npp", WORKERS, "-nps", WORKERS),
        )

    def done(self) -> dict[str, Any]:
        """What the training did, in the trainer's words."""
        said: dict[str, Any] = json.loads((self.ready / "done.json").read_text())
        return said

    def _run(self, verb: str, *arguments: object) -> Took:
        environment = dict(os.environ) | {
            "nnUNet_raw": str(self.home / "raw"),
            "nnUNet_preprocessed": str(self.home / "preprocessed"),
            "nnUNet_results": str(self.home / "results"),
            "nnUNet_n_proc_DA": str(WORKERS),
            "nnUNet_compile": "f",
        }
        environment.pop("PYTHONPATH", None)  # its own environment is to be all that it sees
        command = [self.venv / "bin" / f"nnUNetv2_{verb}", *arguments]
        return watched(command, environment=environment)


def suffix_of(path: Path) -> str:
    """Of a volume's file, both parts of `.nii.gz`."""
    return next(suffix for suffix in VOLUME_SUFFIXES if path.name.endswith(suffix))
