"""Folds of cross-validation: which cases train and which validate."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass

from effseg.dataset.cases import Dataset
from effseg.errors import DataError


@dataclass(frozen=True)
class Fold:
    """One cut of a data set in two; case names in the data set's order."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def folds(dataset: Dataset, *, n_folds: int = 5, seed: int = 0) -> tuple[Fold, ...]:
    """Cut a data set `n_folds` times, so that each case validates exactly once.

    A patient's cases stay together; a case without a known patient counts as its own. Groups are
    dealt largest first to the fold that has the fewest cases, so sizes are as even as groups allow.
    The cut depends on names and seed alone: neither on the order of the cases nor on any library's
    random numbers.

    Raises:
        DataError: if `n_folds` is less than 2 or there are fewer groups than folds.
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case in dataset.cases:
        key = ("case", case.name) if case.patient is None else ("patient", case.patient)
        groups[key].append(case.name)
    if n_folds < 2:
        raise DataError(f"n_folds {n_folds}; expected at least 2, one to train and one to validate")
    if len(groups) < n_folds:
        n_cases = len(dataset.cases)
        have = f"{n_cases} cases" + (f" of {len(groups)} patients" if len(groups) < n_cases else "")
        advice = f"set n_folds to {len(groups)} or less" if len(groups) > 1 else "add cases"
        raise DataError(f"{dataset.root}: {have} for {n_folds} folds; {advice}")
    shuffled = sorted(groups, key=lambda key: _draw(seed, key))
    parts: list[set[str]] = [set() for _ in range(n_folds)]
    for key in sorted(shuffled, key=lambda key: -len(groups[key])):
        min(parts, key=len).update(groups[key])
    names = [case.name for case in dataset.cases]
    return tuple(
        Fold(
            train=tuple(name for name in names if name not in part),
            validation=tuple(name for name in names if name in part),
        )
        for part in parts
    )


def _draw(seed: int, key: tuple[str, str]) -> bytes:
    """A number that looks random and is the same on every machine."""
    return hashlib.blake2b(repr((seed, key)).encode(), digest_size=16).digest()
