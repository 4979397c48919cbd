"""When nothing more is to be gained: patience, or a line through the last validations."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import numpy as np
from scipy.special import stdtrit

from effseg.plans import StoppingConfig
from effseg.training.module import SegmentationModule

EarlyEnd = Literal["patience", "trend"]


class ExponentialMean:
    """The mean of all values so far, recent ones first; its weights sum to 1.

    Args:
        smoothing: share of the earlier ones in it, 0 to below 1.
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing
        self._sum = 0.0
        self._weight = 0.0

    def state_dict(self) -> dict[str, float]:
        """What a later process needs to go on."""
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self._sum, self._weight = state["sum"], state["weight"]

    def add(self, value: float) -> float:
        """The mean with one more value."""
        self._sum = self.smoothing * self._sum + (1 - self.smoothing) * value
        self._weight = self.smoothing * self._weight + (1 - self.smoothing)
        return self._sum / self._weight


def least_squares(values: Sequence[float]) -> tuple[float, float]:
    """The slope of a line through values at 0, 1, 2..., and that slope's standard error.

    Args:
        values: three at least.
    """
    n = len(values)
    across = np.arange(n) - (n - 1) / 2
    down = np.asarray(values, dtype=np.float64) - np.mean(values)
    squares = float(across @ across)
    slope = float(across @ down) / squares
    left = down - slope * across
    return slope, math.sqrt(float(left @ left) / (n - 2) / squares)


def is_falling(values: Sequence[float], *, confidence: float, gain: float = 0.0) -> bool:
    """Whether a line through values falls by more than `gain` from the first to the last of them.

    A one-sided t test of the slope, with n - 2 degrees of freedom. Validations of averaged weights
    resemble their neighbours, so that a fall is found rather too often than too seldom: a training
    is rather too long than too short.

    Args:
        values: three at least.
        confidence: 0.5 to 1.
        gain: the least fall that counts.

    Source: Draper and Smith, "Applied regression analysis", 3rd edition, section 1.4.
    """
    slope, error = least_squares(values)
    margin = error * float(stdtrit(len(values) - 2, confidence))
    return -slope * (len(values) - 1) > gain + margin * (len(values) - 1)


class Judge(Protocol):
    """Says after each validation whether the training may end."""

    def add(self, *, score: float, voe: float) -> bool:
        """Whether to stop, with one more validation known."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to go on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class Patience:
    """Stops after so many validations in a row that were not better than the best before.

    Args:
        n: validations.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.best = -math.inf
        self.waited = 0

    def add(self, *, score: float, voe: float) -> bool:
        """With one more score, of which more is better."""
        del voe
        self.waited = 0 if score > self.best else self.waited + 1
        self.best = max(score, self.best)
        return self.waited >= self.n

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to go on."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.waited = state["best"], state["waited"]


class Trend:
    """Stops where a line through the last values of 1 - Jaccard did not fall, some times in a row.

    Args:
        config: window, confidence, gain and patience.
    """

    def __init__(self, config: StoppingConfig) -> None:
        self.config = config
        self.values: list[float] = []
        self.waited = 0

    def add(self, *, score: float, voe: float) -> bool:
        """With one more 1 - Jaccard, of which less is better."""
        del score
        config = self.config
        self.values = [*self.values, voe][-config.window :]
        if len(self.values) == config.window:
            falls = is_falling(self.values, confidence=config.confidence, gain=config.gain)
            self.waited = 0 if falls else self.waited + 1
        return self.waited >= config.patience

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to go on."""
        return {"values": self.values, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.values, self.waited = list(state["values"]), state["waited"]


class EarlyStop(pl.Callback):  # type: ignore[misc]  # Lightning ships no types
    """Cuts a run short when its judge says so; validations count once the warm-up is over.

    A schedule that lowers the learning rate over the whole run is not done by then. So the rate
    goes to zero from where it is, within a cool-down (`Clock.end_early`), and the run ends. A rate
    that falls all the time, as in `one_cycle`, makes a fall of its own and stops late; with
    `constant_then_decay` the trend is that of one rate.

    Args:
        config: of a kind that stops.
    """

    def __init__(self, config: StoppingConfig) -> None:
        assert config.kind != "none"
        self.config = config
        self.kind: EarlyEnd = config.kind
        self.smoothed = ExponentialMean(config.smoothing)
        self.judge: Judge = (
            Patience(config.patience) if config.kind == "patience" else Trend(config)
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        """After each validation; the first process judges for all."""
        clock, step = pl_module.clock, trainer.global_step
        warm = clock.fraction(step) >= pl_module.plan.training.optimizer.warmup
        if not trainer.strategy.broadcast(warm) or clock.is_ending_early:
            return
        known = trainer.callback_metrics
        score = self.smoothed.add(float(known["validation_dice"]))
        stop = self.judge.add(score=score, voe=float(known["validation_voe"]))
        if not stop or not clock.end_early(step, cool_down=self.config.cool_down):
            return
        pl_module.stopped_by = self.kind
        if self.config.cool_down == 0:
            trainer.should_stop = True
        pl_module.note(f"{self._why()}: {self._what_follows()}")

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"smoothed": self.smoothed.state_dict(), "judge": self.judge.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.smoothed.load_state_dict(state_dict["smoothed"])
        self.judge.load_state_dict(state_dict["judge"])

    def _why(self) -> str:
        config = self.config
        if self.kind == "patience":
            return f"the score was not better for {config.patience} validations"
        least = f" by more than {config.gain:g}" if config.gain else ""
        return (
            f"1 - Jaccard did not fall{least} over {config.window} validations, at a confidence of "
            f"{config.confidence:g}"
        )

    def _what_follows(self) -> str:
        if self.config.cool_down == 0:
            return "training ends"
        return "the learning rate goes to zero, then training ends"
