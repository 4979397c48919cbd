"""Scores as tables: each label with mean, median and worst, each case, and which to draw."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from effseg.evaluation import CaseScore, LesionScore, Metric, Scores
from effseg.report.wording import DASH, write_score

N_SHOWN = 3
"""Worst cases that are drawn, and best ones."""

MOST_LABEL_COLUMNS = 6
"""With more labels than this the table of cases shows their mean alone."""


@dataclass(frozen=True)
class Column:
    """How one metric is written, and which end of it is bad."""

    metric: Metric
    title: str
    kind: str
    high_is_bad: bool


COLUMNS = (
    Column("dice", "Dice", "share", False),
    Column("surface_dice", "Surface Dice", "share", False),
    Column("hd95_mm", "HD95, mm", "mm", True),
    Column("assd_mm", "ASSD, mm", "mm", True),
    Column("relative_volume_difference", "Volume diff.", "percent", True),
)


@dataclass(frozen=True)
class Cell:
    """A number in a table.

    Attributes:
        text: as written.
        value: to sort by; None where it is undefined.
        hint: shown when pointed at.
        rule: whether a group of columns begins here.
    """

    text: str
    value: float | None
    hint: str = ""
    rule: bool = False


@dataclass(frozen=True)
class LabelRow:
    """One label over all cases.

    Attributes:
        name: of the label; "all labels" in the last row of several.
        n: cases with a defined Dice, of how many where some have none.
        dots: (Dice, case) of every case.
        median: of these.
        cells: mean, median and worst of each of `COLUMNS`.
    """

    name: str
    n: str
    dots: tuple[tuple[float, str], ...]
    median: float | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class LesionRow:
    """The components of one label over all cases."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class CaseTable:
    """Every case, worst first."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def list_labels(scores: Scores) -> tuple[LabelRow, ...]:
    """A row a label, and one over all where there are several."""
    names = {score.label: score.name for case in scores.cases for score in case.labels}
    chosen: list[tuple[int | None, str]] = [*sorted(names.items())]
    if len(names) > 1:
        chosen.append((None, "all labels"))
    rows = []
    for label, name in chosen:
        dots = _values(scores, "dice", label)
        cells: list[Cell] = []
        n = scores.n_defined("dice", label)
        for column in COLUMNS:
            cells += _mean_median_worst(scores, column, label)
        rows.append(
            LabelRow(
                name=name,
                n=f"{n}" if n == len(scores.cases) else f"{n} of {len(scores.cases)}",
                dots=tuple(dots),
                median=statistics.median(value for value, _ in dots) if dots else None,
                cells=tuple(cells),
            )
        )
    return tuple(rows)


def list_lesions(scores: Scores) -> tuple[LesionRow, ...]:
    """A row a label, and one over all where there are several; none without any component."""
    rows = []
    found = [row for row in scores.summary() if row["label"] is None or _lesions(scores, row)]
    for row in found[:-1] if len(found) == 2 else found:
        lesions = _lesions(scores, row)
        n = sum(score.n_reference for score in lesions)
        rows.append(
            LesionRow(
                name="all labels" if row["label"] is None else str(row["name"]),
                cells=(
                    _cell(n, "count"),
                    _cell(sum(score.n_detected for score in lesions), "count"),
                    _cell(_number(row["sensitivity"]), "share"),
                    _cell(sum(score.n_false_positives for score in lesions), "count"),
                    _cell(_number(row["false_positives_per_case"]), "mm"),
                    _cell(_number(row["mean_lesion_dice"]), "share"),
                ),
            )
        )
    anything = any(s.n_reference or s.n_false_positives for c in scores.cases for s in c.lesions)
    return tuple(rows) if anything else ()


def list_cases(scores: Scores) -> CaseTable:
    """Every case with its Dice by label, worst first; undefined ones last."""
    names = {score.label: score.name for case in scores.cases for score in case.labels}
    single = names if 1 < len(names) <= MOST_LABEL_COLUMNS else {}
    several = len(names) > 1
    titles = [f"{c.title}, mean" if several and not i else c.title for i, c in enumerate(COLUMNS)]
    titles[1:1] = [f"Dice, {name}" for _, name in sorted(single.items())]
    titles += ["Reference, ml", "Prediction, ml", "Missed", "False positives"]
    rows = []
    for case in sorted(scores.cases, key=_dice_order):
        by_label = {score.label: score for score in case.labels}
        cells = [_cell(case.mean(column.metric), column.kind) for column in COLUMNS]
        cells[1:1] = [
            _cell(by_label[label].dice if label in by_label else None, "share")
            for label in sorted(single)
        ]
        cells += [
            _cell(sum(score.reference_mm3 for score in case.labels) / 1000, "ml"),
            _cell(sum(score.prediction_mm3 for score in case.labels) / 1000, "ml"),
            _cell(sum(score.n_reference - score.n_detected for score in case.lesions), "count"),
            _cell(sum(score.n_false_positives for score in case.lesions), "count"),
        ]
        rows.append((case.case, tuple(cells)))
    return CaseTable(titles=tuple(titles), rows=tuple(rows))


def pick_cases(scores: Scores) -> tuple[tuple[CaseScore, ...], tuple[CaseScore, ...]]:
    """The worst cases, worst first, and the best, best first, by mean Dice; none in both."""
    ranked = sorted((c for c in scores.cases if c.mean("dice") is not None), key=_dice_order)
    n_worst = min(N_SHOWN, (len(ranked) + 1) // 2)
    n_best = min(N_SHOWN, len(ranked) - n_worst)
    return tuple(ranked[:n_worst]), tuple(reversed(ranked[len(ranked) - n_best :]))


def _dice_order(case: CaseScore) -> tuple[bool, float, str]:
    dice = case.mean("dice")
    return (dice is None, dice or 0.0, case.case)


def _values(scores: Scores, metric: Metric, label: int | None) -> list[tuple[float, str]]:
    """(value, case) wherever the metric is defined; without a label, of each case's mean."""
    found = []
    for case in scores.cases:
        values: Sequence[float | None] = [case.mean(metric)]
        if label is not None:
            values = [getattr(score, metric) for score in case.labels if score.label == label]
        found += [(value, case.case) for value in values if value is not None]
    return found


def _mean_median_worst(scores: Scores, column: Column, label: int | None) -> list[Cell]:
    values = _values(scores, column.metric, label)
    if not values:
        return [Cell(DASH, None, rule=True), Cell(DASH, None), Cell(DASH, None)]
    worst, case = max(values, key=lambda v: abs(v[0]) if column.high_is_bad else -v[0])
    return [
        _cell(scores.mean(column.metric, label), column.kind, rule=True),
        _cell(statistics.median(value for value, _ in values), column.kind),
        _cell(worst, column.kind, hint=case),
    ]


def _cell(value: float | None, kind: str, *, hint: str = "", rule: bool = False) -> Cell:
    return Cell(text=write_score(value, kind), value=value, hint=hint, rule=rule)


def _lesions(scores: Scores, row: dict[str, str | int | float | None]) -> list[LesionScore]:
    return [
        score
        for case in scores.cases
        for score in case.lesions
        if row["label"] in (None, score.label)
    ]


def _number(value: str | int | float | None) -> float | None:
    return float(value) if isinstance(value, int | float) else None
