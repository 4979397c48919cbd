"""How a network is slid over a volume, and what of its answer is kept."""

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
        "... as far as the budget has room; 1 on a CPU without a budget",
    )
    postprocess: PostprocessConfig = PostprocessConfig()
