"""The page: what the template is given, and how the file gets there whole."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from effseg.evaluation import CaseScore, Scores
from effseg.files import write_text_whole
from effseg.plans import Plan, format_bytes
from effseg.record import PLAN, REPORT, RunMemory
from effseg.report import results
from effseg.report.charts import FRAME, draw_curves, draw_rates
from effseg.report.choices import list_choices, list_facts
from effseg.report.planes import View, view_case
from effseg.report.previews import preview_augmentation
from effseg.report.rendering import check_jinja2, render
from effseg.report.run import Run, read_run
from effseg.report.step import FRAME as STEP_FRAME
from effseg.report.step import draw_plan
from effseg.report.wording import write_score, write_share


@dataclass(frozen=True)
class Shown:
    """A case that is drawn, with its scores in a line."""

    case: str
    scores: str
    view: View


@dataclass(frozen=True)
class Section:
    """One evaluation as the template takes it."""

    name: str
    scores: Scores
    labels: tuple[results.LabelRow, ...]
    lesions: tuple[results.LesionRow, ...]
    cases: results.CaseTable
    galleries: tuple[tuple[str, tuple[Shown, ...]], ...]


@dataclass(frozen=True)
class Bar:
    """One of the memory bars: `parts` are (style, share of the longest) from the left."""

    name: str
    parts: tuple[tuple[str, float], ...]
    n_bytes: int
    text: str


@dataclass(frozen=True)
class Verdict:
    """The first line of the page.

    Attributes:
        score: the number in it; empty where there is none yet.
        score_of: what it is a score of.
        minutes: training time, in words; empty while the run goes on.
        memory: what it took, in words.
        over: whether that is more than the budget.
    """

    score: str
    score_of: str
    minutes: str
    memory: str
    over: bool


def write_report(run: str | Path, *, out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about a run.

    Args:
        run: a run folder; all but its `plan.json` may be missing, and the page says so.
        out: the file to write; None: `report.html` in the run folder.

    Returns:
        The file, which appears whole or not at all.

    Raises:
        CheckpointError: if the folder is no run, or a record in it is damaged.
        PlanError: if its plan cannot be read.
        DataError: if its scores cannot be read, or the page cannot be written.
        EffsegError: if jinja2 is not installed.
    """
    check_jinja2()
    found = read_run(run)
    path = found.folder / REPORT if out is None else Path(out)
    return write_text_whole(path, render("page.html", _context(found)))


def _context(run: Run) -> dict[str, Any]:
    plan, record = run.plan, run.record
    best = None if record is None else record.best_epoch
    step, no_step = draw_plan(plan)
    return {
        "run": run,
        "plan": plan,
        "record": record,
        "verdict": _verdict(run),
        "choices": list_choices(plan),
        "facts": list_facts(plan.fingerprint),
        "charts": (
            *draw_curves(run.columns, best_epoch=best),
            *draw_rates(run.rates, taken=plan.training.optimizer.learning_rate),
        ),
        "frame": FRAME,
        "step": step,
        "no_step": no_step,
        "step_frame": STEP_FRAME,
        "previews": preview_augmentation(plan, record),
        "bars": _bars(plan, None if record is None else record.memory),
        "sections": [_section(name, scores, plan) for name, scores in run.scores.items()],
        "columns": results.COLUMNS,
        "commands": list(_commands(run)),
        "plan_json": _plan_without_lists(plan),
    }


def _verdict(run: Run) -> Verdict:
    record, score, score_of = run.record, "", "No score yet"
    for name, scores in run.scores.items():
        if scores.mean_dice is not None:
            n = scores.n_defined("dice")
            score = write_share(scores.mean_dice)
            score_of = f"mean Dice on {n} {name} case{'s' if n > 1 else ''}"
            break
    else:
        if record is not None and record.best_score is not None:
            score = write_share(record.best_score)
            score_of = "best Dice on validation patches"
    memory, over = f"planned for {format_bytes(run.plan.memory.budget_bytes)}", False
    minutes = ""
    if record is not None and record.minutes is not None:
        minutes = f"{record.minutes:.1f} minutes"
    taken = None if record is None else record.memory
    if taken is not None and taken.measured_peak_bytes is not None:
        over = taken.measured_peak_bytes > taken.budget_bytes
        memory = (
            f"{format_bytes(taken.measured_peak_bytes)} of a budget of "
            f"{format_bytes(taken.budget_bytes)}"
        )
    return Verdict(score=score, score_of=score_of, minutes=minutes, memory=memory, over=over)


def _bars(plan: Plan, memory: RunMemory | None) -> tuple[Bar, ...]:
    """Budget, prediction and measurement on one scale."""
    budget = plan.memory.budget_bytes if memory is None else memory.budget_bytes
    predicted = plan.memory.peak_bytes if memory is None else memory.predicted_peak_bytes
    measured = None if memory is None else memory.measured_peak_bytes
    longest = max(budget, predicted, measured or 0)
    saved = min(plan.memory.saved_bytes, predicted)
    bars = [
        Bar("budget", (("budget", budget / longest),), budget, ""),
        Bar(
            "predicted",
            (("saved", saved / longest), ("predicted", (predicted - saved) / longest)),
            predicted,
            f"at the peak of a training step; {format_bytes(saved)} of it kept from forward to "
            "backward",
        ),
    ]
    if memory is not None and measured is not None:
        ratio = f"{measured / predicted:.2f} times the prediction" if predicted else ""
        text = "; ".join(part for part in (memory.measured, ratio) if part)
        style = "over" if measured > budget else "measured"
        bars.append(Bar("measured", ((style, measured / longest),), measured, text))
    return tuple(bars)


def _section(name: str, scores: Scores, plan: Plan) -> Section:
    worst, best = results.pick_cases(scores)
    chosen: tuple[tuple[str, Literal["error", "centre"], tuple[CaseScore, ...]], ...] = (
        ("Worst" if best else "The case", "error", worst),
        ("Best", "centre", best),
    )
    return Section(
        name=name,
        scores=scores,
        labels=results.list_labels(scores),
        lesions=results.list_lesions(scores),
        cases=results.list_cases(scores),
        galleries=tuple(
            (title, tuple(_show(case, scores, plan, through=through) for case in cases))
            for title, through, cases in chosen
            if cases
        ),
    )


def _show(
    case: CaseScore, scores: Scores, plan: Plan, *, through: Literal["error", "centre"]
) -> Shown:
    view = View(planes=(), problem="No picture: the scores name no files.")
    if case.prediction is not None and case.reference is not None:
        view = view_case(
            case.prediction,
            case.reference,
            image=case.image,
            plan=plan,
            ignore_label=scores.ignore_label,
            through=through,
        )
    parts = [f"Dice {write_share(case.mean('dice'))}"]
    if 1 < len(case.labels) <= results.MOST_LABEL_COLUMNS:
        each = (f"{score.name} {write_share(score.dice)}" for score in case.labels)
        parts[0] += f" ({', '.join(each)})"
    distance = case.mean("hd95_mm")
    if distance is not None:
        parts.append(f"HD95 {write_score(distance, 'mm')} mm")
    return Shown(case=case.case, scores=" · ".join(parts), view=view)


def _commands(run: Run) -> Iterator[str]:
    """What to type to get this run and this page again."""
    record, plan = run.record, run.plan
    words = ["effseg", "train", plan.dataset if record is None else record.dataset]
    words += ["--plan", str(run.folder / PLAN), "--out", "RUN"]
    if record is not None and record.fold is not None:
        words += ["--fold", str(record.fold)]
    yield shlex.join(words)
    yield "effseg report RUN"


def _plan_without_lists(plan: Plan) -> str:
    """The plan as JSON; what is long stands in tables of its own."""
    return plan.model_dump_json(indent=2, exclude={"alternatives", "fingerprint", "reasons"})
