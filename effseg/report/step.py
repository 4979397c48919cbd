"""Memory over one step of training, module by module, as coordinates for the template."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from effseg.errors import CheckpointError, PlanError
from effseg.memory import MemoryEvent, MemoryReport
from effseg.planner import retrace_plan
from effseg.plans import Plan, format_bytes
from effseg.report.charts import N_COLOURS, Frame, Tick, step_of

FRAME = Frame(width=1080, height=344, left=58, right=1068, top=40, bottom=246)
NARROWEST = 11.0
"""Units along the axis that a module needs for its name to stand below it."""
LONGEST = 14
"""Letters of a name below the axis; pointing at the module shows all of it."""
FAR = 2.0
"""A budget of more than so many times the peak is named, not drawn: the curve would lie flat."""
ROOM = 17.0
"""Units that a line of text takes, with air around it."""


@dataclass(frozen=True)
class Area:
    """What is alive while one module runs: a polygon, its colour, and words to point at."""

    style: str
    points: str
    title: str


@dataclass(frozen=True)
class Level:
    """A number of bytes as a line across the chart, and where its words stand."""

    style: str
    at: float
    text: str
    text_at: float


@dataclass(frozen=True)
class Words:
    """Words at a place, and the side of it that they begin at: "start" or "end"."""

    x: float
    y: float
    text: str
    anchor: str


@dataclass(frozen=True)
class Share:
    """One entry of the legend: modules of one kind, and the most that is alive in any of them."""

    name: str
    style: str
    text: str


@dataclass(frozen=True)
class StepChart:
    """Everything the template needs to draw a step.

    Attributes:
        areas: one a module and phase, in the order they run.
        names: of modules, below the axis; left out where there is no room.
        phases: where each begins.
        values: bytes, along the axis.
        levels: the budget and the predicted peak; a budget far above is in the caption instead.
        levels_at: where the words of the levels stand, away from the peak.
        peak: the highest point; its words stand beside it.
        legend: kinds of modules.
        caption: what is seen, in words.
    """

    areas: tuple[Area, ...]
    names: tuple[Tick, ...]
    phases: tuple[Tick, ...]
    values: tuple[Tick, ...]
    levels: tuple[Level, ...]
    levels_at: Words
    peak: Words
    legend: tuple[Share, ...]
    caption: str


@dataclass(frozen=True)
class _Run:
    """Stretches of one module in one phase, from x to x."""

    name: str
    phase: str
    left: float
    right: float
    events: tuple[MemoryEvent, ...]

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def peak_bytes(self) -> int:
        return max(event.peak_bytes for event in self.events)

    def places(self) -> Iterator[tuple[float, int]]:
        """(x, bytes) of what is alive: at the start, most and end of each stretch."""
        width = (self.right - self.left) / len(self.events)
        for i, event in enumerate(self.events):
            x = self.left + i * width
            yield x, event.start_bytes
            yield x + width / 2, event.peak_bytes
            yield x + width, event.end_bytes


def draw_plan(plan: Plan) -> tuple[StepChart | None, str]:
    """The step of a plan, traced and drawn; None and the reason where it cannot be traced."""
    try:
        report = retrace_plan(plan)
    except (PlanError, CheckpointError) as error:  # teachers may be gone
        return None, f"No picture of a step: {error}."
    if not report.timeline:
        return None, "No picture of a step: no operator ran in it."
    return draw_step(report, plan), ""


def draw_step(report: MemoryReport, plan: Plan) -> StepChart:
    """What is alive over a step.

    Args:
        report: of the step; at least one operator ran.
        plan: whose budget and predicted peak are drawn.
    """
    budget, predicted = plan.memory.budget_bytes, plan.memory.peak_bytes
    runs = _runs(report.timeline)
    top = max(run.peak_bytes for run in runs)
    top = max(top, predicted if predicted <= FAR * top else 0)
    far = budget > FAR * top
    values = _axis(top if far else max(top, budget))
    highest = values[-1]

    def down(n_bytes: float) -> float:
        return round(FRAME.bottom - n_bytes / highest * (FRAME.bottom - FRAME.top), 1)

    styles = _styles(runs)
    most = max(runs, key=lambda run: run.peak_bytes)
    x, n_bytes = max(most.places(), key=lambda place: place[1])
    leftwards = x > (FRAME.left + FRAME.right) / 2
    levels = [] if far else [("budget", budget, f"budget {format_bytes(budget)}")]
    if predicted <= highest:
        levels.append(("predicted", predicted, f"predicted peak {format_bytes(predicted)}"))
    return StepChart(
        areas=tuple(_area(run, styles[run.kind], down) for run in runs),
        names=tuple(
            Tick(round((run.left + run.right) / 2, 1), _cut(run.name))
            for run in runs
            if run.right - run.left >= NARROWEST
        ),
        phases=tuple(
            Tick(next(run.left for run in runs if run.phase == phase), phase)
            for phase in dict.fromkeys(run.phase for run in runs)
        ),
        values=tuple(Tick(down(value), _bytes(value, highest)) for value in values),
        levels=_apart([(style, down(value), text) for style, value, text in levels]),
        levels_at=Words(
            x=FRAME.left + 8 if leftwards else FRAME.right - 8,
            y=0.0,
            text="",
            anchor="start" if leftwards else "end",
        ),
        peak=Words(
            x=round(x, 1),
            y=down(n_bytes),
            text=f"{format_bytes(n_bytes)} in {most.name}, {most.phase}",
            anchor="end" if leftwards else "start",
        ),
        legend=_legend(runs, styles),
        caption=_caption(report, plan, far=far),
    )


def _runs(timeline: Sequence[MemoryEvent]) -> tuple[_Run, ...]:
    """The stretches of one top-level module after another, each module as wide as the next."""
    names = _short_names([event.module for event in timeline])
    groups = [
        (name, phase, tuple(event for _, event in group))
        for (name, phase), group in groupby(
            zip(names, timeline, strict=True), key=lambda pair: (pair[0], pair[1].phase)
        )
    ]
    width = (FRAME.right - FRAME.left) / len(groups)
    return tuple(
        _Run(
            name=name or ("optimizer" if phase == "optimizer" else "outside"),
            phase=phase,
            left=FRAME.left + i * width,
            right=FRAME.left + (i + 1) * width,
            events=events,
        )
        for i, (name, phase, events) in enumerate(groups)
    )


def _short_names(paths: Sequence[str]) -> list[str]:
    """The module that each path is in, below the outermost one and below what that alone holds.

    Of a list the entry, `encoder.0`; a module beside the network is its loss.
    """
    split = [path.split(".") for path in paths]
    root = split[0][0]
    inner = {parts[1] for parts in split if parts[0] == root and len(parts) > 1}
    skip = 2 if len(inner) == 1 else 1

    def short(parts: list[str]) -> str:
        if parts[0] != root:
            return "loss" if parts[0] else ""
        name, *below = parts[skip : skip + 2] or ["network"]
        return ".".join((name, *(part for part in below if part.isdigit())))

    return [short(parts) for parts in split]


def _styles(runs: Sequence[_Run]) -> dict[str, str]:
    """A colour for each kind of module of the network, as they first run; grey once all are out."""
    kinds = dict.fromkeys(run.kind for run in runs)
    return {kind: f"colour{i}" if i < N_COLOURS else "other" for i, kind in enumerate(kinds)}


def _area(run: _Run, style: str, down: Callable[[float], float]) -> Area:
    corners = [(run.left, FRAME.bottom), *((x, down(n)) for x, n in run.places())]
    corners.append((run.right, FRAME.bottom))
    return Area(
        style=style,
        points=" ".join(f"{x:.1f},{y:g}" for x, y in corners),
        title=f"{run.name}, {run.phase}: {format_bytes(run.peak_bytes)}",
    )


def _legend(runs: Sequence[_Run], styles: dict[str, str]) -> tuple[Share, ...]:
    entries: dict[str, int] = {}
    for run in runs:
        key = run.kind if styles[run.kind] != "other" else "the rest"
        entries[key] = max(entries.get(key, 0), run.peak_bytes)
    return tuple(
        Share(name=name, style=styles.get(name, "other"), text=format_bytes(n_bytes))
        for name, n_bytes in entries.items()
    )


def _apart(levels: Sequence[tuple[str, float, str]]) -> tuple[Level, ...]:
    """Words above their line; below it where the line above is too near for both."""
    placed: list[Level] = []
    for style, at, text in sorted(levels, key=lambda level: level[1]):
        near = bool(placed) and at - placed[-1].at < ROOM
        placed.append(Level(style=style, at=at, text=text, text_at=at + 13 if near else at - 5))
    return tuple(placed)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _axis(highest: float) -> list[float]:
    """Round numbers of bytes from 0 to `highest` or just above."""
    unit = _unit(highest)
    step = step_of(highest / unit, n_steps=5) * unit
    return [i * step for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _unit(n_bytes: float) -> int:
    return next((unit for unit in (2**30, 2**20, 2**10) if n_bytes >= unit), 1)


def _bytes(value: float, highest: float) -> str:
    unit = _unit(highest)
    name = {2**30: "GiB", 2**20: "MiB", 2**10: "KiB", 1: "B"}[unit]
    return f"{value / unit:g} {name}" if value else "0"


def _caption(report: MemoryReport, plan: Plan, *, far: bool) -> str:
    budget, predicted = plan.memory.budget_bytes, plan.memory.peak_bytes
    said = (
        f"All tensors that live at once, traced, not run: {format_bytes(report.peak_bytes)} at "
        f"most. The plan counts {format_bytes(predicted)}, with averaged weights and what is no "
        "tensor: workspaces and what is kept of freed memory"
    )
    if far:
        said += f". The budget, {format_bytes(budget)}, lies far above"
    return said + "."
