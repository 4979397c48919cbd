"""How far a mean over cases can be trusted: bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

N_RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0

_BLOCK_VALUES = 1_000_000
"""Drawn at once: 8 MB, however many cases there are."""


@dataclass(frozen=True)
class Interval:
    """The middle `LEVEL` of the means of resamples."""

    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The percentile bootstrap interval of a mean.

    `N_RESAMPLES` times as many values are drawn with replacement as there are, from `SEED`: the
    same values in the same order give the same interval. Of paired values give the differences.
    Values that belong together, several cases of a patient, count as if they did not, which makes
    the interval too narrow.

    Args:
        values: one a case.

    Returns:
        The interval; None for fewer than two values, which say nothing of how they vary.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """
    if len(values) < 2:
        return None
    array, n = np.asarray(values, dtype=np.float64), len(values)
    rng = np.random.default_rng(SEED)
    block = max(1, _BLOCK_VALUES // n)
    means = np.concatenate(
        [
            array[rng.integers(n, size=(min(block, N_RESAMPLES - done), n))].mean(axis=1)
            for done in range(0, N_RESAMPLES, block)
        ]
    )
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(low), float(high))
