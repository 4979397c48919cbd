"""What a plan is: every choice of a run, with the reason for each, in one JSON file.

How a plan is made stands in `planner`. Plans are meant to be read and edited by people: unknown
keys, wrong types, numbers out of range and NaN are refused with the place where they stand.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from effseg.devices import DEVICE_NAME, Precision
from effseg.errors import PlanError
from effseg.files import load_model, write_text_whole
from effseg.types import Shape3, Spacing

Positive3 = tuple[
    Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]
PositiveSpacing = tuple[
    Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
]
Share = Annotated[float, Field(ge=0, le=1)]
Heap: TypeAlias = Literal["system", "mapped"]
"""How a CPU's freed memory is kept; see `effseg.memory.heap_of`."""


class Config(BaseModel):
    """Frozen, no unknown keys, no NaN: the manners of everything in a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class LabelFacts(Config):
    """What the fingerprint knows of one foreground label."""

    value: int = Field(ge=1, description="the integer in the label map")
    name: str
    n_cases: int = Field(ge=0, description="cases that hold it")
    voxel_share: Share = Field(description="of all labelled voxels of the data set")
    n_components: int = Field(ge=0, description="26-connected components over all cases")
    component_mm3: tuple[float, ...] = Field(
        description="percentiles 0, 5, 25, 50, 75, 95, 100 of the component volumes"
    )
    small_share: Share = Field(
        description="of the label's volume, in components under a third of their case's largest"
    )


class ChannelFacts(Config):
    """What the fingerprint knows of one channel's intensities."""

    name: str
    is_ct: bool = Field(description="calibrated Hounsfield units")
    why: str = Field(description="what that was concluded from")
    foreground_mean: float
    foreground_std: float = Field(ge=0)
    foreground_percentiles: tuple[float, float, float] = Field(description="0.5, 50, 99.5")
    minimum: float
    maximum: float


class Fingerprint(Config):
    """What one pass over a data set says about it. Axes are canonical (z, y, x)."""

    dataset: str
    n_cases: int = Field(ge=1)
    spacings: tuple[PositiveSpacing, ...] = Field(description="of each case, mm")
    shapes: tuple[Positive3, ...] = Field(description="of each case, voxels")
    channels: tuple[ChannelFacts, ...] = Field(min_length=1)
    labels: tuple[LabelFacts, ...] = Field(min_length=1)
    ignore_label: int | None = Field(None, ge=1, description="left out of loss and score")


class NetworkConfig(Config):
    """A `DenseUNet`. Stage 0 is the finest; `strides[i]` leads from stage i-1 to stage i."""

    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1, description="one for each label, background first")
    stem_channels: int = Field(ge=1, description="features of the first convolution")
    growth_rate: int = Field(ge=1, description="features each dense layer adds")
    encoder_layers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        min_length=1, description="dense layers of each stage on the way down"
    )
    decoder_layers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        description="dense layers of each stage but the last on the way up, finest first"
    )
    strides: tuple[Positive3, ...] = Field(description="downsampling into each stage; the first 1")
    kernels: tuple[Positive3, ...] = Field(description="spatial kernel of each stage, odd")
    bottleneck: int = Field(4, ge=1, description="1x1 width of a dense layer, in growth rates")
    compression: float = Field(0.5, gt=0, le=1, description="channels kept between stages")
    norm: Literal["batch", "instance"] = "instance"
    act: Literal["relu", "leaky_relu"] = "leaky_relu"
    dropout: Share = 0.0
    memory: Literal["shared", "checkpoint", "plain"] = "shared"
    deep_supervision: bool = Field(False, description="heads on the coarser decoder stages too")

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        n = len(self.encoder_layers)
        lengths = {
            "strides": (len(self.strides), n),
            "kernels": (len(self.kernels), n),
            "decoder_layers": (len(self.decoder_layers), n - 1),
        }
        for key, (got, expected) in lengths.items():
            if got != expected:
                raise ValueError(f"{key} has {got} entries; {n} stages need {expected}")
        if self.strides[0] != (1, 1, 1):
            raise ValueError(f"the first stride is {self.strides[0]}; stage 0 is at (1, 1, 1)")
        if any(k % 2 == 0 for kernel in self.kernels for k in kernel):
            raise ValueError(f"kernels {self.kernels}; each length must be odd")
        return self

    @property
    def total_stride(self) -> Shape3:
        """Input voxels per voxel of the coarsest stage: patch sizes are multiples of it."""
        return total_stride(self.strides)


class LossConfig(Config):
    """Dice plus cross-entropy."""

    dice_weight: float = Field(1.0, ge=0)
    cross_entropy_weight: float = Field(1.0, ge=0)
    dice_background: bool = Field(False, description="count the background as a class in Dice")
    dice_over_batch: bool = Field(
        True, description="one Dice a class over the whole batch, not one a sample"
    )
    dice_smooth: float = Field(
        1e-5, gt=0, description="voxels added above and below: what false voxels are held against"
    )


class OptimizerConfig(Config):
    """AdamW under a one-cycle schedule: linear warm-up, then cosine to zero."""

    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    warmup: Share = Field(0.05, description="share of the run spent warming up")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(
        0.99, ge=0, lt=1, description="of the averaged weights that are kept; 0: no averaging"
    )


class AugmentConfig(Config):
    """Chances of each transform, all scaled by one overall probability."""

    probability: Share = Field(1.0, description="scales every chance below; 0 turns all off")
    flip_axes: tuple[Literal["z", "y", "x"], ...] = Field(("x",), description="canonical axes")
    flip: Share = Field(0.5, description="for each of flip_axes")
    rotate90: Share = Field(0.0, description="quarter turns in the plane of equal spacings")
    affine: Share = Field(0.2, description="small rotation and scaling")
    rotate_degrees: float = Field(15.0, ge=0, le=180)
    scale: tuple[float, float] = Field((0.85, 1.18), description="smallest and largest zoom")
    gamma: Share = 0.15
    brightness: Share = 0.15
    contrast: Share = 0.15
    noise: Share = 0.1
    blur: Share = 0.1
    low_resolution: Share = 0.1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if len(set(self.flip_axes)) < len(self.flip_axes):
            raise ValueError(f"flip_axes {self.flip_axes}; each axis may stand there once")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale}; expected two zooms above 0, the smaller first")
        return self


class TrainingConfig(Config):
    """How long, on what, from which samples."""

    epochs: int | None = Field(None, ge=1, description="set this or minutes")
    minutes: float | None = Field(None, gt=0, description="wall clock of the training steps")
    steps_per_epoch: int = Field(50, ge=1)
    foreground: Share = Field(0.5, description="share of patches centred on a foreground voxel")
    small_components: Share = Field(
        0.5, description="share of those that draw a component first, so that small ones count"
    )
    patience: int | None = Field(None, ge=1, description="epochs without a better score; None: off")
    validate_every: int = Field(1, ge=1, description="epochs between validations")
    validation_patches: int = Field(32, ge=1, description="fixed patches scored after each epoch")
    workers: int = Field(0, ge=0, description="processes that augment; 0: in the training process")
    queue_bytes: int = Field(
        256 * 2**20, ge=0, description="most bytes of batches that wait for the next steps"
    )
    seed: int = Field(0, ge=0)
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.minutes is not None and self.epochs is not None:
            raise ValueError(
                f"minutes {self.minutes:g} and epochs {self.epochs}; set one of the two"
            )
        return self


class PostprocessConfig(Config):
    """Which components of a prediction are noise."""

    fraction_of_largest: Share | None = Field(
        None, description="drop components smaller than this share of their label's largest"
    )
    minimum_mm3: float = Field(0.0, ge=0, description="drop components smaller than this")


class InferenceConfig(Config):
    """The sliding window."""

    overlap: float = Field(0.5, ge=0, lt=1, description="share of a window its neighbour covers")
    window_batch: int = Field(1, ge=1)
    postprocess: PostprocessConfig = PostprocessConfig()


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
        description="mapped: on a CPU freed memory goes back to the system at once, a little "
        "slower; system: the C library may keep it",
    )


class Label(Config):
    """A label the network predicts: the map's value and its name."""

    value: int = Field(ge=0)
    name: str


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
    network: NetworkConfig
    policies: dict[str, Literal["keep", "recompute", "offload"]] = Field(
        default_factory=dict, description="of stages of the network, by module path"
    )
    sample_by_sample: bool = Field(
        False,
        description="samples of a batch go through the network one after the other, twice; the "
        "loss is still the whole batch's",
    )
    training: TrainingConfig = TrainingConfig()
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
        if self.sample_by_sample and self.network.norm == "batch":
            raise ValueError("sample_by_sample is true; batch norm needs a batch as a whole")
        stride = self.network.total_stride
        if any(p % s for p, s in zip(self.patch_size, stride, strict=True)):
            raise ValueError(
                f"patch_size {self.patch_size}; each length must be a multiple of "
                f"the network's total stride {stride}"
            )
        return self

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


_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}


def parse_bytes(text: str | int) -> int:
    """Turn a memory budget into bytes: `"8GiB"` (2^33), `"8GB"` (8e9), `"8G"` (2^33), 4096.

    Raises:
        PlanError: for anything else, zero and negative numbers included.
    """
    hint = 'expected a size such as "8GiB" or "500MB", a number of bytes, or "auto"'
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise PlanError(f"memory {text!r}; {hint}")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    units = {name.lower(): size for name, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise PlanError(f"memory {text!r}; {hint}")
    n_bytes = int(float(match[1]) * units[match[2].lower()])
    if n_bytes < 1:
        raise PlanError(f"memory {text!r} is nothing; {hint}")
    return n_bytes


def total_stride(strides: Iterable[Shape3]) -> Shape3:
    """The product of the strides along each axis."""
    z, y, x = (math.prod(along) for along in zip(*strides, strict=True))
    return (z, y, x)


def format_shape(shape: Shape3) -> str:
    """Lengths as people read them: `64 x 112 x 112`."""
    return " x ".join(str(n) for n in shape)


def format_bytes(n_bytes: float) -> str:
    """Bytes as people read them: `1.50 GiB`, `64 MiB`, `12 B`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.{2 if unit == 'GiB' else 0}f} {unit}"
    return f"{n_bytes:.0f} B"


__all__ = [
    "Alternative",
    "AugmentConfig",
    "Channel",
    "ChannelFacts",
    "Fingerprint",
    "Heap",
    "InferenceConfig",
    "Label",
    "LabelFacts",
    "LossConfig",
    "Memory",
    "NetworkConfig",
    "Normalisation",
    "OptimizerConfig",
    "Plan",
    "PostprocessConfig",
    "Spacing",
    "TrainingConfig",
    "format_bytes",
    "format_shape",
    "parse_bytes",
    "total_stride",
]
