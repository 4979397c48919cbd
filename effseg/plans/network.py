"""What a network is made of."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from effseg.plans.config import Config, Positive3, Share
from effseg.plans.sizes import total_stride
from effseg.types import Shape3


class NetworkConfig(Config):
    """A `DenseUNet`. Stage 0 is the finest; `strides[i]` leads from stage i-1 to stage i."""

    kind: Literal["dense_unet"] = Field("dense_unet", description="a network of effseg's own")
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
    decoder: Literal["unet", "linknet"] = Field(
        "unet",
        description="unet: skips are projected to the compressed width; linknet: coarse features "
        "pass through few channels, and a skip no wider than that (residual) is added as it is",
    )
    head: Literal["plain", "pyramid"] = Field(
        "plain",
        description="what the classes are told from: the finest stage, or the sum of all stages' "
        "features, each brought to stem_channels",
    )
    residual: bool = Field(
        False, description="a block's features are fused to its input's width and added to it"
    )

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

    @property
    def words(self) -> str:
        """Its size, as people read it."""
        n_layers = sum(self.encoder_layers) + sum(self.decoder_layers)
        return f"{len(self.strides)} stages, {n_layers} layers of {self.growth_rate}"


class ImportedNetwork(Config):
    """A network of MONAI's or of anybody's: a class or a function that makes it, by name.

    It is called as `build(in_channels=..., out_channels=..., **arguments)`, with `spatial_dims=3`
    where it takes that.
    """

    kind: Literal["imported"]
    build: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="module:name, of a module that Python finds; monai:SegResNet is MONAI's",
    )
    arguments: dict[str, JsonValue] = Field(
        default_factory=dict, description="what it is called with, by name"
    )
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1, description="one for each label, background first")
    stride: int = Field(1, ge=1, description="the lengths of a patch are multiples of it")
    deep_supervision: bool = Field(
        False, description="in training it gives a list of logits, the finest first"
    )

    @property
    def memory(self) -> Literal["plain"]:
        """As `NetworkConfig.memory`: it has no ways of its own to take less."""
        return "plain"

    @property
    def total_stride(self) -> Shape3:
        """Patch sizes are multiples of it."""
        return (self.stride, self.stride, self.stride)

    @property
    def words(self) -> str:
        """What it is, as people read it."""
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.build}({given})"


def _kind_of(network: Any) -> Any:
    """The kind of a network in a plan; plans from before there were kinds do not say it."""
    if isinstance(network, dict):
        return network.get("kind", "dense_unet")
    return getattr(network, "kind", None)


PlannedNetwork: TypeAlias = Annotated[
    Annotated[NetworkConfig, Tag("dense_unet")] | Annotated[ImportedNetwork, Tag("imported")],
    Discriminator(_kind_of),
]
"""What a plan may train, told apart by `kind`."""
