"""Suspect labels as one page: a table of places, and pictures of the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effseg.evaluation.disagreement import Place, SuspectCase
from effseg.files import write_text_whole
from effseg.plans import Plan
from effseg.report.planes import View, view_case
from effseg.report.rendering import check_jinja2, render
from effseg.report.wording import write_number, write_share

N_SHOWN = 12
"""Places that are drawn."""

N_LISTED = 200
"""Places in the table; the CSV has all."""


@dataclass(frozen=True)
class Row:
    """One place as written: `cells` are (text, what to sort by)."""

    case: str
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Shown:
    """A place that is drawn."""

    case: str
    what: str
    view: View


def write_suspects(
    cases: Sequence[SuspectCase], plan: Plan, out: str | Path, *, n_unjudged: int = 0
) -> Path:
    """Write one self-contained HTML page about suspect labels.

    Args:
        cases: that were judged.
        plan: names the labels and gives the intensity window of a CT.
        out: the file to write.
        n_unjudged: cases that no model could judge.

    Returns:
        The file, which appears whole or not at all.

    Raises:
        DataError: if it cannot be written.
        EffsegError: if jinja2 is not installed.
    """
    check_jinja2()
    ranked = rank_places(cases)
    context = {
        "n_cases": len(cases),
        "n_suspect": sum(bool(case.places) for case in cases),
        "n_places": len(ranked),
        "n_unjudged": n_unjudged,
        "rows": [_row(case, place, plan) for case, place in ranked[:N_LISTED]],
        "shown": [_show(case, place, plan) for case, place in ranked[:N_SHOWN]],
        "ignored": plan.ignore_label is not None,
    }
    return write_text_whole(out, render("suspects.html", context))


def rank_places(cases: Sequence[SuspectCase]) -> list[tuple[SuspectCase, Place]]:
    """All places with their cases, highest score first."""
    places = [(case, place) for case in cases for place in case.places]
    return sorted(places, key=lambda one: -one[1].score)


def describe_place(case: SuspectCase, place: Place, plan: Plan) -> str:
    """What the models say and the reference does not, in a line."""
    names = {label.value: label.name for label in plan.labels}
    models = names.get(place.models_label, str(place.models_label))
    reference = names.get(place.reference_label, str(place.reference_label))
    n = len(case.models)
    return (
        f"{models} in place of {reference}, {write_number(place.volume_mm3)} mm3, "
        f"{place.agreement:.0%} of {n} model{'s' if n > 1 else ''}, probability "
        f"{write_share(place.mean_probability)}"
    )


def _row(case: SuspectCase, place: Place, plan: Plan) -> Row:
    names = {label.value: label.name for label in plan.labels}
    numbers = (
        (write_number(place.score), place.score),
        (write_number(place.volume_mm3), place.volume_mm3),
        (f"{place.agreement:.0%} of {len(case.models)}", place.agreement),
        (write_share(place.mean_probability), place.mean_probability),
        *((f"{value:.1f}", value) for value in place.point_mm),
    )
    words = [names.get(value, str(value)) for value in (place.reference_label, place.models_label)]
    return Row(
        case.case,
        (*((text, f"{value!r}") for text, value in numbers), *((word, "") for word in words)),
    )


def _show(case: SuspectCase, place: Place, plan: Plan) -> Shown:
    second = case.predictions[1] if len(case.predictions) > 1 else None
    return Shown(
        case=case.case,
        what=describe_place(case, place, plan),
        view=view_case(
            str(case.predictions[0]),
            str(case.reference),
            image=str(case.image),
            plan=plan,
            ignore_label=plan.ignore_label,
            through=place.point_mm,
            other=None if second is None else str(second),
        ),
    )
