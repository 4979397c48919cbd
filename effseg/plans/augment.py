"""How patches are changed before they are learnt from."""

from typing import Literal, Self

from pydantic import Field, model_validator

from effseg.plans.config import Config, Share


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
