"""How long is trained, on what, from which samples."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Self

from pydantic import Field, model_validator

from effseg.plans.augment import AugmentConfig
from effseg.plans.config import Config, Share
from effseg.plans.distillation import DistillationConfig
from effseg.plans.loss import LossChange, LossConfig
from effseg.plans.optimizer import OptimizerConfig
from effseg.plans.start import StartConfig
from effseg.plans.stopping import StoppingConfig


class TrainingConfig(Config):
    """How long, on what, from which samples."""

    epochs: int | None = Field(None, ge=1, description="set this or minutes")
    minutes: float | None = Field(None, gt=0, description="wall clock of the training steps")
    steps_per_epoch: int = Field(50, ge=1, description="of the optimizer")
    foreground: Share = Field(0.5, description="share of patches centred on a foreground voxel")
    small_components: Share = Field(
        0.5, description="share of those that draw a component first, so that small ones count"
    )
    validate_every: int = Field(1, ge=1, description="epochs between validations")
    validation_patches: int = Field(32, ge=1, description="fixed patches scored after each epoch")
    workers: int = Field(0, ge=0, description="processes that augment; 0: in the training process")
    queue_bytes: int = Field(
        256 * 2**20, ge=0, description="most bytes of batches that wait for the next steps"
    )
    snapshots: int = Field(
        0, ge=0, description="weights kept from the last half of the run, evenly; to be averaged"
    )
    seed: int = Field(0, ge=0)
    start: StartConfig = StartConfig()
    loss: LossConfig = LossConfig()
    loss_schedule: tuple[LossChange, ...] = Field(
        (), description="losses that come later, each in place of the one before"
    )
    distillation: DistillationConfig | None = Field(
        None, description="trained runs to learn from beside the labels; None: labels alone"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    stopping: StoppingConfig = StoppingConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="before")
    @classmethod
    def _patience_of_old_plans(cls, content: Any) -> Any:
        """Plans written before there was `stopping` have `patience` in its place."""
        if not isinstance(content, dict) or "patience" not in content or "stopping" in content:
            return content
        rest = {name: value for name, value in content.items() if name != "patience"}
        if content["patience"] is None:
            return rest
        stopping = {"kind": "patience", "patience": content["patience"], "cool_down": 0.0}
        return rest | {"stopping": stopping}

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        """In the order in which they are trained with."""
        return (self.loss, *(change.loss for change in self.loss_schedule))

    def with_losses(self, change: Callable[[LossConfig], LossConfig]) -> Self:
        """The same with each loss changed."""
        schedule = tuple(
            later.model_copy(update={"loss": change(later.loss)}) for later in self.loss_schedule
        )
        return self.model_copy(update={"loss": change(self.loss), "loss_schedule": schedule})

    @model_validator(mode="after")
    def _changes_in_order(self) -> Self:
        epochs = [c.from_epoch for c in self.loss_schedule if c.from_epoch is not None]
        if any(later <= earlier for earlier, later in pairwise(epochs)):
            raise ValueError(f"loss_schedule changes from epochs {epochs}; expected rising ones")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.minutes is not None and self.epochs is not None:
            raise ValueError(
                f"minutes {self.minutes:g} and epochs {self.epochs}; set one of the two"
            )
        return self
