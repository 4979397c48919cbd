"""What weights a training starts from, and which of them stand still at first."""

from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from effseg.plans.config import Config, Share


class ThawConfig(Config):
    """From when on parts that stood still learn, too."""

    at: Share = Field(description="share of the run that is over")
    parts: tuple[str, ...] = Field(min_length=1, description="module paths")


class StartConfig(Config):
    """The weights a training starts from.

    Parts of the network are named by module path: `encoder`, or `encoder.0` of it.
    """

    init_from: str | None = Field(
        None, description="a run's folder or a file of weights; None: fresh weights"
    )
    freeze: tuple[str, ...] = Field((), description="parts that stand still, norms included")
    thaw: tuple[ThawConfig, ...] = Field(
        (), description="when frozen parts, or parts of them, begin to learn; the first one first"
    )

    @model_validator(mode="after")
    def _thaws_what_is_frozen(self) -> Self:
        for stage in self.thaw:
            for part in stage.parts:
                if not any(f"{part}.".startswith(f"{frozen}.") for frozen in self.freeze):
                    raise ValueError(f"thaw names {part}, which is not in freeze {self.freeze}")
        if any(late.at <= early.at for early, late in pairwise(self.thaw)):
            raise ValueError("thaw: each `at` must be larger than the one before")
        return self
