"""How weights move: the optimizer, and the learning rate over a run."""

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from effseg.plans.config import Config, Share


class LookaheadConfig(Config):
    """Slow weights that follow the optimizer's: every `steps` steps, by a share of the way."""

    steps: int = Field(5, ge=1, description="of the optimizer between two of the slow weights")
    share: float = Field(0.5, gt=0, le=1, description="of the way that the slow weights go")


class ScheduleConfig(Config):
    """The learning rate over the run, once it is warm.

    Shares are of the whole run, whether that is minutes or epochs. Only the numbers of the kind
    that is chosen count.
    """

    kind: Literal["one_cycle", "poly", "step", "constant_then_decay"] = Field(
        "one_cycle",
        description="one_cycle: half a cosine to zero; poly: (1 - share of what follows the "
        "warm-up) ^ power; step: times `factor` at each share in `at`; constant_then_decay: the "
        "full rate until the share `until`, then straight to zero",
    )
    power: float = Field(0.9, gt=0, description="of poly")
    at: tuple[Share, ...] = Field((0.5, 0.75), min_length=1, description="of step, rising")
    factor: float = Field(0.1, gt=0, lt=1, description="of step")
    until: Share = Field(0.5, description="of constant_then_decay")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(late <= early for early, late in pairwise(self.at)):
            raise ValueError(f"at {self.at}; each share must be larger than the one before")
        return self


class OptimizerConfig(Config):
    """What moves the weights, how far, and what is averaged of it."""

    kind: Literal["adamw", "sgd"] = Field(
        "adamw",
        description="sgd has Nesterov's momentum and decays weights through the gradient; it "
        "wants a learning rate of its own, 1e-2 for one",
    )
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0, description="of weights; gains and biases are free")
    momentum: float = Field(0.9, gt=0, lt=1, description="of sgd")
    lookahead: LookaheadConfig | None = Field(
        None, description="around either kind; one more number is kept of each weight"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    warmup: Share = Field(0.05, description="share of the run spent warming up")
    accumulate: int = Field(
        1,
        ge=1,
        description="batches whose mean gradient makes one step. As one larger batch: losses that "
        "are means over samples of as many voxels each. Not: Dice over a batch, means over the "
        "voxels that are not ignored, batch norm; there a larger batch_size with sample_by_sample "
        "is the same to rounding. Takes the images of all of them, and gradients from the start",
    )
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(
        0.99, ge=0, lt=1, description="of the averaged weights that are kept; 0: no averaging"
    )
