"""Every choice of a run, with the reason for each, in one JSON file."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from effseg.devices import DEVICE_NAME, Precision
from effseg.errors import PlanError
from effseg.files import load_model, write_text_whole
from effseg.plans.adversarial import AdversarialConfig
from effseg.plans.config import Config, Heap, Positive3, PositiveSpacing
from effseg.plans.data import DataConfig
from effseg.plans.fingerprint import Fingerprint
from effseg.plans.inference import InferenceConfig
from effseg.plans.network import NetworkConfig, PlannedNetwork
from effseg.plans.training import TrainingConfig


class Normalisation(Config):
    """How one channel's intensities reach the network: clip, subtract `mean`, divide by `std`."""

    kind: Literal["ct", "zscore"] = Field(
        description="ct: the numbers below, from the data set's foreground; "
        "zscore: mean and std of each image itself"
    )
    low: float | None = Field(None, description="clip below, in the image's own unit (ct)")
    high: float | None = Field(None, description="clip above (ct)")
    mean: float | None = Field(None, description="subtracted after clipping (ct)")
    std: float | None = Field(None, gt=0, description="divided by (ct)")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        numbers = (self.low, self.high, self.mean, self.std)
        if self.kind == "ct" and None in numbers:
            raise ValueError("kind ct needs low, high, mean and std")
        if self.kind == "zscore" and numbers != (None, None, None, None):
            raise ValueError("kind zscore takes no numbers: they come from each image")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low:g} and high {self.high:g}; low must be the smaller")
        return self


class Channel(Config):
    """One input channel."""

    name: str = Field(description="as the data set names it, e.g. CT or T1")
    normalisation: Normalisation


class Label(Config):
    """A label the network predicts: the map's value and its name."""

    value: int = Field(ge=0)
    name: str


class Memory(Config):
    """The budget and what the plan is predicted to take of it."""

    budget_bytes: int = Field(ge=1)
    peak_bytes: int = Field(
        ge=1,
        description="of a training: what the card shows, or this process holds beyond its imports",
    )
    saved_bytes: int = Field(ge=0, description="of these, kept from forward to backward")
    loader_bytes: int = Field(
        0, ge=0, description="of the host: patches that are drawn, augmented or wait"
    )
    heap: Heap = Field(
        "system",
        description="of a CPU's freed memory; mapped: it goes back to the system at once; kept: it "
        "is used again, which is about twice as fast; system: as the C library likes",
    )


class Alternative(Config):
    """A step of training that was weighed against others, and what it would take."""

    choice: str = Field(description="what would be different, in words: patch 160 x 160 x 96")
    peak_bytes: int = Field(ge=1, description="predicted, as memory.peak_bytes")
    seconds: float | None = Field(None, gt=0, description="of a step, estimated; None: not known")
    taken: bool = Field(False, description="whether the plan is this one")
    why: str = Field("", description="it was taken, or was not")


class Plan(Config):
    """Every choice of a run. `reasons` says why, one entry a choice."""

    format: Literal[1] = Field(1, description="of this file")
    dataset: str
    channels: tuple[Channel, ...] = Field(min_length=1)
    labels: tuple[Label, ...] = Field(min_length=2, description="background first")
    ignore_label: int | None = None
    spacing: PositiveSpacing = Field(
        description="mm, canonical (z, y, x), of what the network sees"
    )
    patch_size: Positive3
    batch_size: int = Field(ge=1)
    precision: Precision = "float32"
    device: str = "cpu"
    network: PlannedNetwork
    policies: dict[str, Literal["keep", "recompute", "offload"]] = Field(
        default_factory=dict, description="of stages of the network, by module path"
    )
    sample_by_sample: bool = Field(
        False,
        description="samples of a batch go through the network one after the other, twice; the "
        "loss is still the whole batch's",
    )
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    adversarial: AdversarialConfig | None = Field(
        None, description="of a training against a discriminator; None: as it comes"
    )
    inference: InferenceConfig = InferenceConfig()
    memory: Memory
    reasons: dict[str, str] = Field(default_factory=dict)
    alternatives: tuple[Alternative, ...] = Field(
        (), description="what was weighed, the one that was taken among them"
    )
    fingerprint: Fingerprint

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, name: str) -> str:
        if re.fullmatch(DEVICE_NAME, name) is None:
            raise ValueError('expected "cpu", "cuda" or "cuda:<number>"')
        return name

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.network.in_channels != len(self.channels):
            raise ValueError(
                f"network.in_channels is {self.network.in_channels}; "
                f"there are {len(self.channels)} channels"
            )
        if self.network.out_channels != len(self.labels):
            raise ValueError(
                f"network.out_channels is {self.network.out_channels}; "
                f"there are {len(self.labels)} labels"
            )
        if self.labels[0].value != 0:
            raise ValueError(f"the first label has value {self.labels[0].value}; background is 0")
        values = [label.value for label in self.labels]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"labels have value {twice[0]} twice; each needs one of its own")
        if self.ignore_label in values:
            raise ValueError(f"ignore_label {self.ignore_label} is also a label to predict")
        distillation = self.training.distillation
        if distillation is not None and distillation.unannotated and self.ignore_label is None:
            raise ValueError(
                f"training.distillation.unannotated names {len(distillation.unannotated)} scans "
                "and ignore_label is null; their voxels need a value that is no label"
            )
        n_foreground = len(self.labels) - 1
        if len(self.inference.thresholds) not in (0, n_foreground):
            raise ValueError(
                f"inference.thresholds has {len(self.inference.thresholds)} entries; there are "
                f"{n_foreground} foreground labels"
            )
        norm = self.network.norm if isinstance(self.network, NetworkConfig) else None
        if self.sample_by_sample and norm == "batch":
            raise ValueError("sample_by_sample is true; batch norm needs a batch as a whole")
        stride = self.network.total_stride
        if any(p % s for p, s in zip(self.patch_size, stride, strict=True)):
            raise ValueError(
                f"patch_size {self.patch_size}; each length must be a multiple of "
                f"the network's total stride {stride}"
            )
        return self

    @property
    def ignores_voxels(self) -> bool:
        """Whether the loss meets voxels to leave out: the data set's, or those that came in."""
        augment = self.training.augment
        return self.ignore_label is not None or (augment.ignore_outside and augment.may_bring_in)

    @property
    def samples_per_step(self) -> int:
        """Of each process: those of all batches whose gradients make one step."""
        return self.batch_size * self.training.optimizer.accumulate

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON; the file appears whole or not at all.

        Raises:
            DataError: if it cannot be written.
        """
        return write_text_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan.

        Raises:
            PlanError: if the file is missing, is no JSON, or says something impossible; the
                message names the file and each place in it.
        """
        hint = "`effseg plan` writes one"
        return load_model(cls, path, error=PlanError, what="plan", hint=hint)
