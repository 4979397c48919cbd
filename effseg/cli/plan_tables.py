"""A plan as it is printed."""

from typing import TYPE_CHECKING

from rich.table import Column, Table

from effseg.cli.console import cell, console, plain

if TYPE_CHECKING:
    from effseg.plans import Plan


def print_plan(made: "Plan") -> None:
    """Every choice with its reason, and what else was weighed."""
    from effseg.plans import format_shape

    table = Table("choice", "value", "because", title=f"plan for {made.dataset}")
    values = {
        "device": made.device,
        "precision": made.precision,
        "spacing": " x ".join(f"{s:.3g}" for s in made.spacing) + " mm",
        "patch_size": format_shape(made.patch_size),
        "batch_size": str(made.batch_size),
        "recompute": made.network.memory,
        "augment": f"{made.training.augment.policy}, flip "
        + (" ".join(made.training.augment.flip_axes) or "none"),
    }
    for choice, why in made.reasons.items():
        table.add_row(choice, values.get(choice, ""), plain(why))
    console.print(table)
    if made.alternatives:
        print_alternatives(made)


def print_alternatives(made: "Plan") -> None:
    """What each step that was weighed would take, and why it was taken or not."""
    from effseg.plans import format_bytes

    budget = made.memory.budget_bytes
    numbers = (Column(name, justify="right") for name in ("peak", "of budget", "s a step"))
    table = Table("choice", *numbers, "why", title="what else was weighed")
    for other in made.alternatives:
        table.add_row(
            plain(other.choice),
            format_bytes(other.peak_bytes),
            f"{other.peak_bytes / budget:.0%}",
            cell(other.seconds),
            plain(other.why),
            style="bold" if other.taken else None,
        )
    console.print(table)
