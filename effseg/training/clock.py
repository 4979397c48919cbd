"""How much of a run is over, in minutes or in epochs, and the learning rate that goes with it."""

import math
import time

from effseg.errors import PlanError
from effseg.plans import TrainingConfig


class Clock:
    """The share of a run that is over, by wall clock or by steps.

    Raises:
        PlanError: if neither minutes nor epochs are set.
    """

    def __init__(self, config: TrainingConfig) -> None:
        if config.minutes is None and config.epochs is None:
            raise PlanError(
                "how long? give exactly one of --minutes and --epochs, or set one in plan.json"
            )
        self.seconds = None if config.minutes is None else config.minutes * 60
        self.steps = None if config.epochs is None else config.epochs * config.steps_per_epoch
        self.started = time.monotonic()

    def start(self) -> None:
        """Training starts now."""
        self.started = time.monotonic()

    @property
    def elapsed_seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def fraction(self, step: int) -> float:
        """The share of the run that is over after `step` steps, 0 to 1."""
        if self.seconds is not None:
            return min(1.0, self.elapsed_seconds / self.seconds)
        assert self.steps is not None
        return min(1.0, step / self.steps)


def learning_rate_factor(fraction: float, *, warmup: float) -> float:
    """Linear from 0 to 1 over the warm-up, then half a cosine to 0.

    Args:
        fraction: of the run that is over.
        warmup: the share of the run that warms up.

    Source: Loshchilov and Hutter, "SGDR", 2017, one cycle of it.
    """
    if fraction < warmup:
        return max(fraction / warmup, 1e-3)
    rest = (fraction - warmup) / max(1 - warmup, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))
