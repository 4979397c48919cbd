"""Runs side by side as one page: scores, tests, and the cases that changed most, in pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effseg.evaluation import Change, Comparison, Interval, Metric, mean_interval
from effseg.evaluation.comparison import HIGH_IS_BETTER
from effseg.evaluation.intervals import LEVEL, N_RESAMPLES, SEED
from effseg.files import write_text_whole
from effseg.ledger import Scored, list_changes
from effseg.plans import Plan, format_bytes
from effseg.report.planes import View, view_case
from effseg.report.rendering import check_jinja2, render
from effseg.report.results import COLUMNS
from effseg.report.wording import DASH, MINUS, write_p, write_score

N_SHOWN = 4
"""Cases of a comparison that are drawn."""

TITLES: dict[Metric, str] = {column.metric: column.title for column in COLUMNS} | {
    "iou": "IoU",
    "voe": "VOE",
    "hd_mm": "Hausdorff distance, mm",
}


@dataclass(frozen=True)
class Entry:
    """One of those that are compared.

    Attributes:
        name: as it was asked for.
        n: cases.
        score: mean over all its cases, with its interval.
        minutes: of training; empty where it is not known.
        memory: measured, or else predicted; likewise.
        changes: against the first; empty where it is the first, or one of the two is no run.
    """

    name: str
    n: int
    score: str
    minutes: str
    memory: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One label of a comparison, as written."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Dot:
    """One case: where it lies, from 0 to 1, in the strip of all differences."""

    at: float
    text: str


@dataclass(frozen=True)
class Shown:
    """A case that is drawn."""

    case: str
    scores: str
    view: View


@dataclass(frozen=True)
class Pair:
    """One comparison as the template takes it.

    Attributes:
        comparison: the numbers.
        verdict: a sentence on the last row.
        rows: labels.
        dots: the difference of each case.
        nought: where no difference lies among the dots.
        ends: the smallest and the largest difference, as written.
        shown: the cases that changed most.
    """

    comparison: Comparison
    verdict: str
    rows: tuple[Row, ...]
    dots: tuple[Dot, ...]
    nought: float
    ends: tuple[str, str]
    shown: tuple[Shown, ...]


def write_comparison(
    scored: Sequence[Scored], comparisons: Sequence[Comparison], out: str | Path
) -> Path:
    """Write one self-contained HTML page about a comparison.

    Args:
        scored: what was compared, the first of all first.
        comparisons: of each other with the first, as `compare_scores` makes them.
        out: the file to write.

    Returns:
        The file, which appears whole or not at all.

    Raises:
        DataError: if it cannot be written.
        EffsegError: if jinja2 is not installed.
    """
    check_jinja2()
    metric = comparisons[0].metric
    context = {
        "metric": metric,
        "title": TITLES[metric],
        "better": "higher" if HIGH_IS_BETTER[metric] else "lower",
        "entries": [_entry(one, scored[0], comparisons[0]) for one in scored],
        "pairs": [
            _pair(comparison, other, scored[0])
            for comparison, other in zip(comparisons, scored[1:], strict=True)
        ],
        "n_resamples": f"{N_RESAMPLES:,}",
        "level": f"{LEVEL:.0%}",
        "seed": SEED,
        "ignored": scored[0].scores.ignore_label is not None,
    }
    return write_text_whole(out, render("comparison.html", context))


def row_cells(comparison: Comparison) -> tuple[Row, ...]:
    """The rows of a comparison as written: cases, both means, difference, interval, p values."""
    kind = _kind(comparison.metric)
    return tuple(
        Row(
            name=row.name,
            cells=(
                f"{row.n}" + (f" ({row.n_undefined} left out)" if row.n_undefined else ""),
                write_score(row.first, kind),
                write_score(row.second, kind),
                write_change(row.difference, kind),
                write_interval(row.interval, kind),
                write_p(row.t_p),
                write_p(row.wilcoxon_p),
            ),
        )
        for row in comparison.rows
    )


def write_change(value: float | None, kind: str) -> str:
    """A difference with its sign; a dash where it is undefined."""
    text = write_score(value, kind)
    return text if value is None or text.startswith(MINUS) else f"+{text}"


def write_interval(interval: Interval | None, kind: str) -> str:
    """Both ends of an interval of differences; a dash where there is none."""
    if interval is None:
        return DASH
    return f"{write_change(interval.low, kind)} to {write_change(interval.high, kind)}"


def describe_change(change: Change, comparison: Comparison) -> str:
    """The case's score in both, in a few words."""
    kind = _kind(comparison.metric)
    before, after = (one.mean(comparison.metric) for one in (change.first, change.second))
    return (
        f"{write_score(before, kind)} to {write_score(after, kind)} "
        f"({write_change(change.difference, kind)})"
    )


def _kind(metric: Metric) -> str:
    return "mm" if metric.endswith("_mm") else "share"


def _entry(one: Scored, first: Scored, comparison: Comparison) -> Entry:
    metric = comparison.metric
    kind = _kind(metric)
    values = [v for case in one.scores.cases if (v := case.mean(metric)) is not None]
    interval = mean_interval(values)
    score = write_score(one.scores.mean(metric), kind)
    if interval is not None:
        score += f" ({write_score(interval.low, kind)} to {write_score(interval.high, kind)})"
    changes: tuple[str, ...] = ()
    if one is not first and one.plan is not None and first.plan is not None:
        changes = list_changes((first.plan, first.record), (one.plan, one.record))
    record = one.record
    minutes = "" if record is None or record.minutes is None else f"{record.minutes:.1f}"
    return Entry(one.name, len(one.scores.cases), score, minutes, _memory(one), changes)


def _memory(one: Scored) -> str:
    memory = None if one.record is None else one.record.memory
    if memory is None:
        return ""
    if memory.measured_peak_bytes is None:
        return f"{format_bytes(memory.predicted_peak_bytes)} predicted"
    return format_bytes(memory.measured_peak_bytes)


def _pair(comparison: Comparison, other: Scored, first: Scored) -> Pair:
    kind = _kind(comparison.metric)
    differences = [change.difference for change in comparison.changes]
    low, high = min(differences, default=0.0), max(differences, default=0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    extent = high - low or 1.0
    return Pair(
        comparison=comparison,
        verdict=describe_verdict(comparison),
        rows=row_cells(comparison),
        dots=tuple(
            Dot((c.difference - low) / extent, f"{c.case}: {describe_change(c, comparison)}")
            for c in comparison.changes
        ),
        nought=-low / extent,
        ends=(write_change(low, kind), write_change(high, kind)),
        shown=tuple(
            Shown(
                change.case,
                describe_change(change, comparison),
                _view(change, first.plan or other.plan, first.scores.ignore_label),
            )
            for change in comparison.changes[:N_SHOWN]
        ),
    )


def describe_verdict(comparison: Comparison) -> str:
    """What the last row says: better, worse, or not to be told apart by these cases."""
    row = comparison.rows[-1]
    if row.difference is None:
        return "no case has a score in both"
    if row.interval is None or row.interval.low <= 0 <= row.interval.high:
        return f"not told apart by {row.n} cases"
    better = (row.difference > 0) == HIGH_IS_BETTER[comparison.metric]
    return f"{'better' if better else 'worse'} on {row.n} cases"


def _view(change: Change, plan: Plan | None, ignore_label: int | None) -> View:
    first, second = change.first, change.second
    if first.prediction is None or second.prediction is None or first.reference is None:
        return View(planes=(), problem="No picture: the scores name no files.")
    return view_case(
        first.prediction,
        first.reference,
        image=first.image or second.image,
        plan=plan,
        ignore_label=ignore_label,
        through="error",
        other=second.prediction,
    )
