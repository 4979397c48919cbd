"""What a network is made of."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from effseg.plans.config import Config, Positive3, Share
from effseg.plans.sizes import total_stride
from effseg.types import Shape3


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
