"""When a training ends before its time, and which of its weights are kept."""

from typing import Literal

from pydantic import Field

from effseg.plans.config import Config, Share


class StoppingConfig(Config):
    """What ends a run early, and by which score its best weights are known."""

    kind: Literal["none", "patience", "trend"] = Field(
        "none",
        description="patience: the score was not better for `patience` validations; trend: a line "
        "through the last `window` values of 1 - Jaccard did not fall, `patience` validations in a "
        "row",
    )
    patience: int = Field(3, ge=1, description="validations")
    window: int = Field(8, ge=3, description="validations behind the line (trend)")
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="at which the line must fall to go on (trend)"
    )
    gain: Share = Field(
        0.005,
        description="fall of 1 - Jaccard over the window that is worth going on for (trend); 0: "
        "any fall at all",
    )
    cool_down: Share = Field(
        0.2,
        description="share of what was trained until then, in which the learning rate goes to zero "
        "before the end; 0: end at once",
    )
    smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the earlier validations in the exponential mean by which the best "
        "weights are known and patience counts. 0, the score itself, picks the better weights "
        "where they really change from epoch to epoch; more pays where few patches are scored",
    )
