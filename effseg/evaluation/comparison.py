"""Two evaluations of the same cases, case by case: differences, and whether they are chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from effseg.errors import DataError
from effseg.evaluation.intervals import Interval, mean_interval
from effseg.evaluation.scores import CaseScore, LabelScore, Metric, Scores
from effseg.evaluation.significance import holm, paired_t, signed_rank

HIGH_IS_BETTER: dict[Metric, bool] = {
    "dice": True,
    "iou": True,
    "voe": False,
    "surface_dice": True,
    "hd_mm": False,
    "hd95_mm": False,
    "assd_mm": False,
}
"""The metrics that can be compared. The signed volume difference is none: nought lies between."""

FEWEST_CASES = 2

SAME_REFERENCE = 1e-6
"""Relative: volumes of one reference that were summed by two versions."""


@dataclass(frozen=True)
class PairedRow:
    """One label, over the cases where both evaluations define its metric.

    Attributes:
        label: None: each case's mean over its labels.
        name: of the label; "all labels".
        n: cases.
        n_undefined: shared cases that are left out, since one of the two is undefined there.
        first: mean of the first; None without a case.
        second: mean of the second.
        difference: second less first.
        interval: of the difference, by bootstrap over cases; None for fewer than two.
        t_p: of the paired t test, two-sided; None where it is undefined: fewer than two cases, or
            all differ by the same.
        wilcoxon_p: of Wilcoxon's signed-rank test, two-sided, cases without a difference left out;
            None where no case differs.
    """

    label: int | None
    name: str
    n: int
    n_undefined: int
    first: float | None
    second: float | None
    difference: float | None
    interval: Interval | None
    t_p: float | None
    wilcoxon_p: float | None


@dataclass(frozen=True)
class Change:
    """A case in both evaluations.

    Attributes:
        case: its name.
        first: as the first scored it.
        second: as the second did.
        difference: of the metric's mean over labels, second less first.
    """

    case: str
    first: CaseScore
    second: CaseScore
    difference: float


@dataclass(frozen=True)
class Comparison:
    """A second evaluation against a first.

    Attributes:
        first: the first's name.
        second: the second's name.
        metric: that is compared.
        n_shared: cases that both scored.
        n_first: cases of the first.
        n_second: cases of the second.
        rows: one a label, ascending, and one over all where there are several.
        changes: the cases that differ, the largest difference first.
        n_tests: comparisons for which the p values of a row are corrected by Holm's method; 1: not.
    """

    first: str
    second: str
    metric: Metric
    n_shared: int
    n_first: int
    n_second: int
    rows: tuple[PairedRow, ...]
    changes: tuple[Change, ...]
    n_tests: int = 1


def compare_scores(
    named: Sequence[tuple[str, Scores]], *, metric: Metric = "dice"
) -> tuple[Comparison, ...]:
    """Compare each evaluation with the first, over the cases that both scored.

    With several comparisons the p values of one row, a label's say, are corrected for their number
    by Holm's step-down method; labels are not corrected for one another.

    Args:
        named: names and scores, two at least.
        metric: one of `HIGH_IS_BETTER`.

    Returns:
        One comparison for each evaluation but the first.

    Raises:
        DataError: if there are fewer than two evaluations, the metric cannot be compared, or two
            evaluations share too few cases or differ in labels, references or conventions.

    Source of the correction: Holm, "A simple sequentially rejective multiple test procedure",
    Scandinavian Journal of Statistics 6, 1979.
    """
    if len(named) < 2:
        raise DataError(f"{len(named)} evaluation to compare; expected two or more")
    if metric not in HIGH_IS_BETTER:
        raise DataError(f"metric {metric!r}; expected one of {', '.join(HIGH_IS_BETTER)}")
    made = [_compare(named[0], other, metric) for other in named[1:]]
    if len(made) == 1:
        return tuple(made)
    corrected = []
    for position in range(len(made[0].rows)):
        rows = [comparison.rows[position] for comparison in made]
        t_p, wilcoxon_p = holm([r.t_p for r in rows]), holm([r.wilcoxon_p for r in rows])
        corrected.append(
            [
                replace(row, t_p=t, wilcoxon_p=w)
                for row, t, w in zip(rows, t_p, wilcoxon_p, strict=True)
            ]
        )
    return tuple(
        replace(comparison, rows=tuple(row[i] for row in corrected), n_tests=len(made))
        for i, comparison in enumerate(made)
    )


def _compare(first: tuple[str, Scores], second: tuple[str, Scores], metric: Metric) -> Comparison:
    names = _check_comparable(first, second, metric)
    by_case = [{case.case: case for case in scores.cases} for _, scores in (first, second)]
    shared = [name for name in by_case[0] if name in by_case[1]]
    pairs = [(by_case[0][name], by_case[1][name]) for name in shared]
    chosen: list[tuple[int | None, str]] = [*sorted(names.items())]
    if len(chosen) != 1:
        chosen.append((None, "all labels"))
    changes = [
        Change(one.case, one, other, after - before)
        for one, other in pairs
        if (before := one.mean(metric)) is not None
        and (after := other.mean(metric)) is not None
        and after != before
    ]
    return Comparison(
        first=first[0],
        second=second[0],
        metric=metric,
        n_shared=len(shared),
        n_first=len(by_case[0]),
        n_second=len(by_case[1]),
        rows=tuple(_row(pairs, metric, label, name) for label, name in chosen),
        changes=tuple(sorted(changes, key=lambda c: (-abs(c.difference), c.case))),
    )


def _row(
    pairs: Sequence[tuple[CaseScore, CaseScore]], metric: Metric, label: int | None, name: str
) -> PairedRow:
    both = [(_value(one, metric, label), _value(other, metric, label)) for one, other in pairs]
    known = [(a, b) for a, b in both if a is not None and b is not None]
    # Where neither has the label there is nothing to compare; where one has, something is left out.
    n_undefined = sum((a is None) != (b is None) for a, b in both)
    differences = [b - a for a, b in known]
    n = len(known)
    return PairedRow(
        label=label,
        name=name,
        n=n,
        n_undefined=n_undefined,
        first=sum(a for a, _ in known) / n if n else None,
        second=sum(b for _, b in known) / n if n else None,
        difference=sum(differences) / n if n else None,
        interval=mean_interval(differences),
        t_p=paired_t(differences),
        wilcoxon_p=signed_rank(differences),
    )


def _value(case: CaseScore, metric: Metric, label: int | None) -> float | None:
    if label is None:
        return case.mean(metric)
    found: list[LabelScore] = [score for score in case.labels if score.label == label]
    return getattr(found[0], metric) if found else None


def _check_comparable(
    first: tuple[str, Scores], second: tuple[str, Scores], metric: Metric
) -> dict[int, str]:
    """The labels of both, once a comparison makes sense."""
    (one, ours), (other, theirs) = first, second
    labels = [
        {score.label: score.name for case in scores.cases for score in case.labels}
        for scores in (ours, theirs)
    ]
    by_case = [{case.case: case for case in scores.cases} for scores in (ours, theirs)]
    shared = by_case[0].keys() & by_case[1].keys()
    if len(shared) < FEWEST_CASES:
        raise DataError(
            f"{one} and {other} share {len(shared)} of {len(by_case[0])} and {len(by_case[1])} "
            f"cases; expected {FEWEST_CASES} or more: compare runs of one fold, or score both on "
            "the same cases with `effseg predict` and `effseg evaluate`"
        )
    if labels[0].keys() != labels[1].keys():
        ours_text, theirs_text = (", ".join(map(str, sorted(names))) for names in labels)
        raise DataError(
            f"{one} scores labels {ours_text} and {other} labels {theirs_text}; expected the same: "
            "score both against the same references"
        )
    if ours.ignore_label != theirs.ignore_label:
        raise DataError(
            f"{one} leaves label {ours.ignore_label} out of the score and {other} label "
            f"{theirs.ignore_label}; score both alike with `effseg evaluate --ignore-label`"
        )
    if metric == "surface_dice" and ours.tolerance_mm != theirs.tolerance_mm:
        raise DataError(
            f"{one} has a surface Dice at {ours.tolerance_mm:g} mm and {other} at "
            f"{theirs.tolerance_mm:g} mm; score both alike with `effseg evaluate --tolerance-mm`"
        )
    for name in sorted(shared):
        _check_reference(by_case[0][name], by_case[1][name], (one, other))
    return labels[0]


def _check_reference(one: CaseScore, other: CaseScore, names: tuple[str, str]) -> None:
    ours, theirs = (
        {score.label: score.reference_mm3 for score in case.labels} for case in (one, other)
    )
    for label in sorted(ours.keys() | theirs.keys()):
        volumes = ours.get(label, 0.0), theirs.get(label, 0.0)
        if not math.isclose(*volumes, rel_tol=SAME_REFERENCE):
            raise DataError(
                f"case {one.case}: label {label} has {volumes[0]:.6g} mm3 in the reference of "
                f"{names[0]} and {volumes[1]:.6g} mm3 in that of {names[1]}; score both against "
                "the same references"
            )
