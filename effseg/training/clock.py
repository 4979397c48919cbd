"""How much of a run is over, in minutes or in epochs, and the learning rate that goes with it."""

import math
import time
from dataclasses import dataclass

from effseg.errors import PlanError
from effseg.plans import OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class _CoolDown:
    """The end of a run that is cut short: where it began, and how long it takes."""

    since: float
    length: float


class Clock:
    """The share of a run that is over, by wall clock or by steps.

    A run that `end_early` cuts short does not stop dead: a learning rate that has not come down yet
    leaves weights that the last of it would still improve. The rate goes straight to zero from
    where it is, within a cool-down.

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
        self._elapsed = 0.0
        self.started = time.monotonic()
        self._cool_down: _CoolDown | None = None

    def start(self) -> None:
        """Training starts now, or goes on."""
        self.started = time.monotonic() - self._elapsed

    @property
    def elapsed_seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    @property
    def is_ending_early(self) -> bool:
        """Whether the run was cut short."""
        return self._cool_down is not None

    def fraction(self, step: int) -> float:
        """The share of the run that is over after `step` steps, 0 to 1."""
        down = self._cool_down
        return _share(self._now(step), self._length if down is None else down.since + down.length)

    def end_early(self, step: int, *, cool_down: float) -> bool:
        """Cut the run short after `step` steps.

        Whatever else follows the share of the run that is over sees it jump: the run is taken to
        have been planned as short as it is now.

        Args:
            step: steps done.
            cool_down: how long the rest takes, as a share of what was trained until now.

        Returns:
            Whether the run became shorter; it does not where its own end is as near.
        """
        now = self._now(step)
        rest = cool_down * now
        if self._cool_down is not None or now + rest >= self._length:
            return False
        self._cool_down = _CoolDown(since=now, length=rest)
        return True

    def rate_factor(self, step: int, config: OptimizerConfig) -> float:
        """What the learning rate is multiplied with after `step` steps: as scheduled, or cooling.

        Args:
            step: steps done.
            config: warm-up and schedule.
        """
        now, down = self._now(step), self._cool_down
        if down is None:
            return learning_rate_factor(_share(now, self._length), config)
        left = 1 - _share(now - down.since, down.length)
        return left * learning_rate_factor(_share(down.since, self._length), config)

    def state(self) -> dict[str, float | None]:
        """What a clock needs to go on later."""
        down = self._cool_down
        return {
            "elapsed_seconds": self.elapsed_seconds,
            "since": None if down is None else down.since,
            "length": None if down is None else down.length,
        }

    def restore(self, state: dict[str, float | None]) -> None:
        """Go on from a `state`; the time between does not count."""
        self._elapsed = state["elapsed_seconds"] or 0.0
        if state["since"] is not None and state["length"] is not None:
            self._cool_down = _CoolDown(since=state["since"], length=state["length"])

    @property
    def _length(self) -> float:
        length = self.steps if self.seconds is None else self.seconds
        assert length is not None
        return length

    def _now(self, step: int) -> float:
        return step if self.seconds is None else self.elapsed_seconds


def learning_rate_factor(fraction: float, config: OptimizerConfig) -> float:
    """What the learning rate is multiplied with: linear from 0 to 1, then as scheduled.

    Args:
        fraction: of the run that is over, 0 to 1.
        config: warm-up and schedule.

    Sources: one_cycle, Loshchilov and Hutter, "SGDR", 2017, one cycle of it; poly, Chen et al.,
    "DeepLab", 2018, section 4.1.
    """
    warmup, schedule = config.warmup, config.schedule
    if fraction < warmup:
        return max(fraction / warmup, 1e-3)
    if schedule.kind == "step":
        return float(schedule.factor ** sum(fraction >= at for at in schedule.at))
    if schedule.kind == "constant_then_decay":
        return 1 - _gone(fraction, since=max(schedule.until, warmup))
    gone = _gone(fraction, since=warmup)
    if schedule.kind == "poly":
        return float((1 - gone) ** schedule.power)
    return 0.5 * (1 + math.cos(math.pi * gone))


def _gone(fraction: float, *, since: float) -> float:
    """The share that is over of what follows `since`."""
    return min(max(fraction - since, 0.0) / max(1 - since, 1e-9), 1.0)


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0 else 1.0
