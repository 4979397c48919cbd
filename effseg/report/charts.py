"""Curves as coordinates: the template draws what stands here, in the page's own type and colours.

A chart is laid out in the units of `FRAME`, from the top left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from effseg.report.run import Columns, finite

N_COLOURS = 6
"""Lines that get a colour of their own; more than that are drawn thin and grey."""


@dataclass(frozen=True)
class Frame:
    """The size of a chart, and in it the rectangle of its axes."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


FRAME = Frame(width=560, height=250, left=40, right=548, top=26, bottom=210)


@dataclass(frozen=True)
class Tick:
    """A place along an axis, in units of the chart, and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: for the legend.
        style: the class that colours it.
        points: "x,y x,y ..." as an SVG polyline takes it.
        dots: (x, y) of single points, where there are few enough to mark each.
        last: the last value.
    """

    name: str
    style: str
    points: str
    dots: tuple[tuple[float, float], ...]
    last: float


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to draw one chart; `epochs` are the ticks along `axis`.

    `marks` are vertical lines where another loss came.
    """

    title: str
    lines: tuple[Line, ...]
    epochs: tuple[Tick, ...]
    minutes: tuple[Tick, ...]
    values: tuple[Tick, ...]
    best: Tick | None
    n_not_finite: int
    axis: str = "epoch"
    marks: tuple[Tick, ...] = ()


def draw_curves(columns: Columns, *, best_epoch: int | None = None) -> tuple[Chart, ...]:
    """The loss and the Dice by epoch, with minutes along the top.

    Args:
        columns: of `metrics.csv`.
        best_epoch: marked with a vertical line.

    Returns:
        The charts for which there is at least one finite value; none for no columns.
    """
    prefix = "validation_dice_"
    labels = [name for name in columns if name.startswith(prefix)]
    many = len(labels) > N_COLOURS - 1
    dice = [
        (name.removeprefix(prefix), "thin" if many else f"colour{i}", name)
        for i, name in enumerate(labels, start=1)
    ]
    mean = [("mean" if labels else "validation", "colour0", "validation_dice")]
    losses = [("training", "colour0", "loss"), ("validation", "colour1", "validation_loss")]
    charts = (
        _chart("Loss", losses, columns, best_epoch=best_epoch, limits=None),
        _chart("Dice", dice + mean, columns, best_epoch=best_epoch, limits=(0.0, 1.0)),
    )
    return tuple(chart for chart in charts if chart is not None)


def draw_rates(columns: Columns, *, taken: float) -> tuple[Chart, ...]:
    """The loss by learning rate, of a range test, on a logarithmic axis.

    Args:
        columns: of `learning_rates.csv`.
        taken: the rate that was taken from it, marked with a vertical line.

    Returns:
        One chart; none for no columns.
    """
    rates = [rate for rate in columns.get("learning_rate", ()) if rate is not None and rate > 0]
    names = {"loss": ("each step", "colour1"), "smoothed_loss": ("smoothed", "colour0")}
    found = {name: finite(columns[name]) for name in names if name in columns}
    values = [value for pairs in found.values() for _, value in pairs]
    if len(rates) < 2 or len(rates) != len(columns["learning_rate"]) or not values:
        return ()
    low, high, steps = _axis(min(values), max(values))
    first, last = math.log10(min(rates)), math.log10(max(rates))

    def across(rate: float) -> float:
        share = (math.log10(rate) - first) / max(last - first, 1e-9)
        return round(FRAME.left + share * (FRAME.right - FRAME.left), 1)

    def down(value: float) -> float:
        return round(FRAME.bottom - (value - low) / (high - low) * (FRAME.bottom - FRAME.top), 1)

    lines = tuple(
        Line(
            name=names[name][0],
            style=names[name][1],
            points=" ".join(f"{across(rates[row]):g},{down(value):g}" for row, value in pairs),
            dots=(),
            last=pairs[-1][1],
        )
        for name, pairs in found.items()
        if pairs
    )
    decades = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
    inside = min(rates) <= taken <= max(rates)
    chart = Chart(
        title="Loss by learning rate",
        lines=lines,
        epochs=tuple(Tick(across(10.0**power), f"1e{power}") for power in decades),
        minutes=(),
        values=tuple(Tick(down(t), _number(t, steps)) for t in _multiples(low, high, steps)),
        best=Tick(across(taken), f"taken, {taken:.2g}") if inside else None,
        n_not_finite=0,
        axis="learning rate",
    )
    return (chart,)


def _chart(
    title: str,
    wanted: Sequence[tuple[str, str, str]],
    columns: Columns,
    *,
    best_epoch: int | None,
    limits: tuple[float, float] | None,
) -> Chart | None:
    found = [
        (name, style, finite(columns[key]), columns[key])
        for name, style, key in wanted
        if key in columns
    ]
    values = [value for _, _, pairs, _ in found for _, value in pairs]
    if not values:
        return None
    n_rows = len(next(iter(columns.values())))
    x = [float(i + 1) if e is None else e for i, e in enumerate(columns.get("epoch", ()))]
    x = x or [float(i + 1) for i in range(n_rows)]
    low, high, steps = _axis(*(limits or (min(values), max(values))))
    first, last = min(x), max(x)
    if first == last:
        first, last = first - 0.5, last + 0.5

    def across(value: float) -> float:
        return round(FRAME.left + (value - first) / (last - first) * (FRAME.right - FRAME.left), 1)

    def down(value: float) -> float:
        return round(FRAME.bottom - (value - low) / (high - low) * (FRAME.bottom - FRAME.top), 1)

    lines = []
    for name, style, pairs, _ in found:
        places = [(across(x[row]), down(value)) for row, value in pairs]
        if places:
            lines.append(
                Line(
                    name=name,
                    style=style,
                    points=" ".join(f"{a:g},{b:g}" for a, b in places),
                    dots=tuple(places) if len(places) <= 15 and style != "thin" else (),
                    last=pairs[-1][1],
                )
            )
    epochs = _whole_steps(min(x), max(x))
    stages = [stage or 0.0 for stage in columns.get("loss_stage", ())]
    best = None
    if best_epoch is not None and first <= best_epoch <= last:
        best = Tick(across(best_epoch), f"best, epoch {best_epoch}")
    return Chart(
        title=title,
        lines=tuple(lines),
        epochs=tuple(Tick(across(t), f"{t:g}") for t in epochs),
        minutes=tuple(
            Tick(across(t), text) for t in epochs if (text := _minutes_at(t, x, columns))
        ),
        values=tuple(Tick(down(t), _number(t, steps)) for t in _multiples(low, high, steps)),
        best=best,
        n_not_finite=sum(
            value is not None and not math.isfinite(value)
            for _, _, _, column in found
            for value in column
        ),
        marks=tuple(
            Tick(across(x[row]), f"loss {stages[row] + 1:g}")
            for row in range(1, len(stages))
            if stages[row] > stages[row - 1]
        ),
    )


def step_of(span: float, *, n_steps: int) -> float:
    """The 1, 2 or 5 times a power of ten that cuts `span` into at most `n_steps` steps."""
    rough = span / n_steps
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))


def _axis(low: float, high: float) -> tuple[float, float, float]:
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    step = step_of(high - low, n_steps=5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def _multiples(low: float, high: float, step: float) -> list[float]:
    return [low + i * step for i in range(round((high - low) / step) + 1)]


def _whole_steps(low: float, high: float) -> list[int]:
    step = max(1, round(step_of(max(high - low, 1.0), n_steps=7)))
    ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return ticks or [round(low)]


def _minutes_at(epoch: float, x: Sequence[float], columns: Columns) -> str:
    for where, minutes in zip(x, columns.get("minutes", ()), strict=False):
        if where == epoch and minutes is not None and math.isfinite(minutes):
            return f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.1f}"
    return ""


def _number(value: float, step: float) -> str:
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:.{places}f}"
