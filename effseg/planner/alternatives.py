"""What a search weighed, in words."""

from collections.abc import Sequence

from effseg.planner.candidates import Candidates
from effseg.planner.step import Step
from effseg.plans import Alternative, format_bytes, format_shape


def weighed(
    candidates: Candidates, step: Step, too_large: Step | None, others: Sequence[Step]
) -> tuple[Alternative, ...]:
    """The step that was taken first, then the next larger patch, then what others would show."""
    taken = Alternative(
        choice=describe(step),
        peak_bytes=step.peak_bytes,
        seconds=step.seconds,
        taken=True,
        why="the most context a second that fits",
    )
    rows = [taken]
    if too_large is not None:
        why = (
            "fits, but shows less context a second"
            if candidates.fits(too_large)
            else f"needs {format_bytes(candidates.needed_bytes(too_large))}; the budget is "
            f"{format_bytes(candidates.budget_bytes)}"
        )
        rows.append(
            Alternative(
                choice=describe(too_large),
                peak_bytes=too_large.peak_bytes,
                seconds=too_large.seconds,
                why=why,
            )
        )
    rows += [
        Alternative(
            choice=describe(other),
            peak_bytes=other.peak_bytes,
            seconds=other.seconds,
            why=f"{candidates.score(other) / candidates.score(step):.2f} x the context a second",
        )
        for other in others
        if describe(other) != describe(step)
    ]
    return tuple(rows)


def describe(step: Step) -> str:
    """A step in words."""
    n_stages, kinds = len(step.policies), sorted(set(step.policies.values()))
    how = {"plain": "nothing computed twice", "shared": "features stored once"}.get(
        step.mode, "bottlenecks computed twice"
    )
    if n_stages:
        how = f"{n_stages} stages {'offloaded' if kinds == ['offload'] else 'recomputed'}"
    if step.split:
        how += ", samples one after the other"
    if step.heap == "kept":
        how += ", freed memory kept"
    return f"patch {format_shape(step.patch)}, batch {step.batch}, {how}"
