"""The nine sets of semi-supervised, adversarial training, drawn once and written down.

A segmenter learns from annotated scans. A discriminator sees what it makes of scans that it was
trained on and of scans that it never saw, and tells one from the other. So its annotated scans are
some that the segmenter trains on: in the segmenter's validation and test sets the segmenter is as
blind as in unannotated scans. Of these three sets none overlaps another, as of all others:

| | train | validation | test |
|---|---|---|---|
| segmenter | annotated | annotated | annotated |
| discriminator, annotated | of the segmenter's train | of the segmenter's train | likewise |
| discriminator, unannotated | unannotated | unannotated | unannotated |
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from effseg.dataset.cases import Case, Dataset, some
from effseg.dataset.splits import Group, group_of, grouped, shuffled
from effseg.errors import DataError
from effseg.files import load_model, write_text_whole

Names = Annotated[tuple[str, ...], Field(min_length=1)]
Proportions = tuple[float, float, float]
"""Of train, validation and test; they are scaled to a sum of one."""

PROPORTIONS: Proportions = (0.6, 0.2, 0.2)
PARTS = ("train", "validation", "test")


class _Part(BaseModel):
    """Frozen, no unknown keys: the manners of a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ThreeSets(_Part):
    """Case names of three sets; none is empty."""

    train: Names
    validation: Names
    test: Names

    @property
    def names(self) -> tuple[str, ...]:
        """Of all three."""
        return (*self.train, *self.validation, *self.test)


class DiscriminatorSets(_Part):
    """What the discriminator learns to tell apart."""

    annotated: ThreeSets = Field(description="cases that the segmenter trains on")
    unannotated: ThreeSets = Field(description="cases that it never sees a label of")


class NineWaySplit(_Part):
    """Nine sets of case names. Sets that must not overlap by name are refused if they do."""

    format: Literal[1] = Field(1, description="of this file")
    dataset: str = Field(description="whose cases these are")
    seed: int
    segmenter: ThreeSets = Field(description="annotated cases")
    discriminator: DiscriminatorSets

    @model_validator(mode="after")
    def _no_leak(self) -> Self:
        found = _overlap(self, {name: ("case", name) for name in self.all_names})
        if found is not None:
            raise ValueError(found)
        foreign = sorted(set(self.discriminator.annotated.names) - set(self.segmenter.train))
        if foreign:
            raise ValueError(
                f"discriminator.annotated holds {some(foreign)}, which segmenter.train does not; "
                "it is drawn from what the segmenter trains on: draw the split again"
            )
        return self

    @property
    def annotated(self) -> tuple[str, ...]:
        """Names of all cases whose labels are used."""
        return self.segmenter.names

    @property
    def unannotated(self) -> tuple[str, ...]:
        """Names of all cases whose labels are not used, or not there."""
        return self.discriminator.unannotated.names

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names of all cases."""
        return (*self.annotated, *self.unannotated, *self.discriminator.annotated.names)

    def save(self, path: str | Path) -> Path:
        """Write the split as JSON; the file appears whole or not at all.

        Raises:
            DataError: if it cannot be written.
        """
        return write_text_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a split.

        Raises:
            DataError: if the file is missing, is no JSON, has a key that is not known, or two sets
                overlap that must not.
        """
        hint = "`effseg split` writes one"
        return load_model(cls, path, error=DataError, what="split", hint=hint)


def split_nine_ways(
    annotated: Sequence[Case],
    unannotated: Sequence[Case],
    *,
    dataset: str,
    segmenter: Proportions = PROPORTIONS,
    discriminator: Proportions = PROPORTIONS,
    apart: Proportions = PROPORTIONS,
    seed: int = 0,
) -> NineWaySplit:
    """Draw the nine sets.

    A patient's cases stay together, and in one set. What is drawn depends on names, patients,
    proportions and seed alone.

    Args:
        annotated: cases whose labels are used.
        unannotated: cases whose labels are not.
        dataset: its name, for the record.
        segmenter: how annotated cases are dealt.
        discriminator: how those that the segmenter trains on are dealt once more.
        apart: how unannotated cases are dealt.
        seed: of the draw.

    Raises:
        DataError: if a proportion is not above 0, there are too few patients for three sets, or a
            case or a patient is both annotated and unannotated.
    """
    _check_apart(annotated, unannotated)
    by_name = {case.name: case for case in annotated}
    own = _three_sets(annotated, segmenter, seed=seed, of="annotated cases")
    seen = [by_name[name] for name in own.train]
    return NineWaySplit(
        dataset=dataset,
        seed=seed,
        segmenter=own,
        discriminator=DiscriminatorSets(
            annotated=_three_sets(
                seen, discriminator, seed=seed, of="cases that the segmenter trains on"
            ),
            unannotated=_three_sets(unannotated, apart, seed=seed, of="unannotated cases"),
        ),
    )


def share_annotated(
    dataset: Dataset, share: float, *, seed: int = 0
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Annotated and unannotated cases of one labelled data set, whole patients, as if few were.

    Args:
        dataset: labelled.
        share: of the cases whose labels are used, above 0 and below 1.
        seed: of the draw.

    Returns:
        Both in the data set's order; at least one patient on either side.

    Raises:
        DataError: if the share is no share, or there are fewer than two patients.
    """
    if not 0 < share < 1:
        raise DataError(f"annotated share {share:g}; expected above 0 and below 1")
    parts = _dealt(grouped(dataset.cases), (share, 1 - share), seed=seed, of="cases")
    chosen = [tuple(case for case in dataset.cases if case.name in part) for part in parts]
    return chosen[0], chosen[1]


def check_leaks(
    split: NineWaySplit, annotated: Iterable[Case], unannotated: Iterable[Case]
) -> None:
    """Hold a split, read from a file for one, against the cases that it names.

    Args:
        split: whose sets overlap nowhere by name: that is seen when it is made.
        annotated: cases among which its annotated ones are.
        unannotated: likewise; both may be all cases of one data set.

    Raises:
        DataError: if a case is not there, or a patient stands in two sets that must not overlap.
    """
    groups: dict[str, Group] = {}
    for names, cases, what in (
        (split.annotated, annotated, "annotated"),
        (split.unannotated, unannotated, "unannotated"),
    ):
        there = check_there(names, cases, of=split.dataset, what=what)
        groups |= {name: group_of(there[name]) for name in names}
    found = _overlap(split, groups)
    if found is not None:
        raise DataError(f"split of {split.dataset}: {found}")


def check_there(
    names: Iterable[str], cases: Iterable[Case], *, of: str, what: str = "labelled"
) -> dict[str, Case]:
    """The cases by name, among which those that a split names must be.

    Args:
        names: of a split.
        cases: that are there.
        of: the data set that was split, in messages.
        what: the cases are, in messages.

    Raises:
        DataError: if one is not there.
    """
    there = {case.name: case for case in cases}
    absent = sorted(set(names) - set(there))
    if absent:
        raise DataError(
            f"split of {of}: {some(absent)} not among the {len(there)} {what} cases given; give "
            "the data that were split, or split again"
        )
    return there


def _check_apart(annotated: Sequence[Case], unannotated: Sequence[Case]) -> None:
    for what, ours, theirs in (
        ("cases", {case.name for case in annotated}, {case.name for case in unannotated}),
        (
            "patients",
            {case.patient for case in annotated if case.patient is not None},
            {case.patient for case in unannotated if case.patient is not None},
        ),
    ):
        if both := sorted(ours & theirs):
            raise DataError(
                f"{what} {some(both)} both annotated and unannotated; leave them out of one side: "
                "what the segmenter was trained on is to be told from what it never saw"
            )


def _overlap(split: NineWaySplit, groups: Mapping[str, Group]) -> str | None:
    """The first two sets, of those that must not, that share a patient or a case; in words."""
    inner, outer = split.discriminator.annotated, split.discriminator.unannotated
    own = list(_named("segmenter", split.segmenter))
    apart = list(_named("discriminator.unannotated", outer))
    for family in ([*own, *apart], list(_named("discriminator.annotated", inner))):
        for (first, ours), (second, theirs) in combinations(family, 2):
            both = sorted({groups[name] for name in ours} & {groups[name] for name in theirs})
            if both:
                kind, name = both[0]
                more = f" and {len(both) - 1} more" if len(both) > 1 else ""
                return f"{kind} {name}{more} in both {first} and {second}; draw the split again"
    return None


def _named(whose: str, sets: ThreeSets) -> list[tuple[str, Names]]:
    return [(f"{whose}.{part}", getattr(sets, part)) for part in PARTS]


def _three_sets(
    cases: Sequence[Case], proportions: Proportions, *, seed: int, of: str
) -> ThreeSets:
    parts = _dealt(grouped(cases), proportions, seed=seed, of=of)
    train, validation, test = (
        tuple(case.name for case in cases if case.name in part) for part in parts
    )
    return ThreeSets(train=train, validation=validation, test=test)


def _dealt(
    groups: Mapping[Group, list[str]], proportions: Sequence[float], *, seed: int, of: str
) -> list[set[str]]:
    """Names dealt to parts, whole groups, largest first to the part that lacks most; none empty."""
    if not min(proportions) > 0:
        raise DataError(f"proportions {tuple(proportions)}; expected each above 0")
    if len(groups) < len(proportions):
        raise DataError(
            f"{len(groups)} patients of {of} for {len(proportions)} sets; expected at least one "
            "each: give more"
        )
    n_cases, whole = sum(map(len, groups.values())), sum(proportions)
    wanted = [n_cases * share / whole for share in proportions]
    parts: list[set[str]] = [set() for _ in proportions]
    order = sorted(shuffled(groups, seed), key=lambda key: -len(groups[key]))
    for left, key in zip(range(len(order), 0, -1), order, strict=True):
        empty = [i for i, part in enumerate(parts) if not part]
        # the last groups are for whoever has none yet
        to = empty if left <= len(empty) else range(len(parts))
        best = max(to, key=lambda i: wanted[i] - len(parts[i]))
        parts[best].update(groups[key])
    return parts
