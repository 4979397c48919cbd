"""How a network is slid over a volume, and what of its answer is kept."""

import math
from typing import Annotated

from pydantic import Field

from effseg.plans.config import Config, Share


class PostprocessConfig(Config):
    """Which components of a prediction are noise."""

    fraction_of_largest: Share | None = Field(
        None, description="drop components smaller than this share of their label's largest"
    )
    minimum_mm3: float = Field(0.0, ge=0, description="drop components smaller than this")


class InferenceConfig(Config):
    """The sliding window."""

    overlap: float = Field(0.5, ge=0, lt=1, description="share of a window its neighbour covers")
    window_batch: int | None = Field(
        None,
        ge=1,
        description="windows in one pass; null: as many as are fastest, told by timing 1, 2, 4, "
        "... as far as the budget has room; on a CPU 2 or 4 that are together at most 64^3, else 1",
    )
    thresholds: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (),
        description="one for each foreground label: the likeliest of them is taken where its "
        "probability, of itself and the background's, is above its own; none: 0.5 for each",
    )
    postprocess: PostprocessConfig = PostprocessConfig()

    @property
    def cuts(self) -> tuple[float, ...]:
        """How far a label's logit must be above the background's; empty where above is enough."""
        return tuple(math.log(p / (1 - p)) for p in self.thresholds)
