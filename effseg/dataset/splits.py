"""Folds of cross-validation: which cases train and which validate."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from effseg.dataset.cases import Case, Dataset, some
from effseg.errors import DataError

Group = tuple[str, str]
"""Whom cases belong to: ("patient", name), or ("case", name) where no patient is known."""


@dataclass(frozen=True)
class Fold:
    """One cut of a data set in two; case names in the data set's order."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def folds(
    dataset: Dataset,
    *,
    n_folds: int = 5,
    seed: int = 0,
    loads: Mapping[str, float] | None = None,
) -> tuple[Fold, ...]:
    """Cut a data set `n_folds` times, so that each case validates exactly once.

    A patient's cases stay together; a case without a known patient counts as its own. Groups are
    dealt largest first to the fold that has the fewest cases, so sizes are as even as groups allow.
    The cut depends on names, seed and loads alone: neither on the order of the cases nor on any
    library's random numbers.

    Args:
        dataset: whose cases are dealt.
        n_folds: at least 2.
        seed: of the order in which groups of one size are dealt.
        loads: a number for each case by its name, its foreground in mm3 for one. Groups of one size
            are then dealt in strata of `n_folds` that are alike in their cases' mean load, so that
            each fold gets one of each stratum. None: any case is like any other.

    Raises:
        DataError: if `n_folds` is less than 2, there are fewer groups than folds, or a case has no
            load.
    """
    groups = grouped(dataset.cases)
    if n_folds < 2:
        raise DataError(f"n_folds {n_folds}; expected at least 2, one to train and one to validate")
    if len(groups) < n_folds:
        n_cases = len(dataset.cases)
        have = f"{n_cases} cases" + (f" of {len(groups)} patients" if len(groups) < n_cases else "")
        advice = f"set n_folds to {len(groups)} or less" if len(groups) > 1 else "add cases"
        raise DataError(f"{dataset.root}: {have} for {n_folds} folds; {advice}")
    strata = dict.fromkeys(groups, 0) if loads is None else _strata(groups, loads, size=n_folds)
    parts: list[set[str]] = [set() for _ in range(n_folds)]
    for key in sorted(shuffled(groups, seed), key=lambda key: (-len(groups[key]), strata[key])):
        min(parts, key=len).update(groups[key])
    names = [case.name for case in dataset.cases]
    return tuple(
        Fold(
            train=tuple(name for name in names if name not in part),
            validation=tuple(name for name in names if name in part),
        )
        for part in parts
    )


def grouped(cases: Iterable[Case]) -> dict[Group, list[str]]:
    """The names of the cases that stay together: a patient's, or a single case's own."""
    groups: dict[Group, list[str]] = defaultdict(list)
    for case in cases:
        groups[group_of(case)].append(case.name)
    return dict(groups)


def group_of(case: Case) -> Group:
    """Whom a case belongs to."""
    return ("case", case.name) if case.patient is None else ("patient", case.patient)


def shuffled(groups: Iterable[Group], seed: int) -> list[Group]:
    """Groups in an order that seed and names decide, the same on every machine."""
    return sorted(groups, key=lambda key: _draw(seed, key))


def _strata(
    groups: Mapping[Group, list[str]], loads: Mapping[str, float], *, size: int
) -> dict[Group, int]:
    """A number for each group: the same for `size` groups, of one number of cases, alike in load.

    Counted apart for each number of cases, since groups are dealt by that first.
    """
    unknown = sorted({name for names in groups.values() for name in names} - set(loads))
    if unknown:
        raise DataError(
            f"{len(unknown)} cases have no load to stratify by: {some(unknown)}; plan this data "
            "set again, or give each case a number"
        )
    alike: dict[int, list[Group]] = defaultdict(list)
    for key, names in groups.items():
        alike[len(names)].append(key)
    return {
        key: rank // size
        for keys in alike.values()
        for rank, key in enumerate(
            sorted(keys, key=lambda key: (-sum(loads[name] for name in groups[key]), key))
        )
    }


def _draw(seed: int, key: Group) -> bytes:
    """A number that looks random and is the same on every machine."""
    return hashlib.blake2b(repr((seed, key)).encode(), digest_size=16).digest()
