"""What one pass over a data set says about it."""

from typing import Annotated

from pydantic import Field

from effseg.plans.config import Config, Positive3, PositiveSpacing, Share


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
    foreground_mm3: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="of each case by its name; empty in older plans"
    )
