"""Whether differences between pairs are chance: two tests, and a correction for many."""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEAST_SPREAD = 1e-12
"""Scores that differ by less are the same: what is left is rounding."""


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p values for their number by Holm's method; undefined ones stay and do not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[i] = highest
    return corrected


def paired_t(differences: Sequence[float]) -> float | None:
    """The two-sided p value of the paired t test; None where it is undefined.

    Source: Student, "The probable error of a mean", Biometrika 6, 1908.
    """
    spread = max(differences, default=0.0) - min(differences, default=0.0)
    if len(differences) < 2 or spread <= LEAST_SPREAD:
        return None
    return float(stats.ttest_1samp(np.asarray(differences, dtype=np.float64), 0.0).pvalue)


def signed_rank(differences: Sequence[float]) -> float | None:
    """The two-sided p value of Wilcoxon's signed-rank test; None where all differences are 0.

    Exact up to 50 cases without ties, by the normal distribution beyond.

    Source: Wilcoxon, "Individual comparisons by ranking methods", Biometrics Bulletin 1, 1945.
    """
    moved = np.asarray([d for d in differences if d != 0], dtype=np.float64)
    if moved.size == 0:
        return None
    with warnings.catch_warnings():  # ties of few cases: the p value says it as well as it can
        warnings.simplefilter("ignore")
        return float(stats.wilcoxon(moved).pvalue)
