"""A plan as it is printed."""

from typing import TYPE_CHECKING

from rich.table import Table

from effseg.cli.console import console, plain

if TYPE_CHECKING:
    from effseg.plans import Plan


def print_plan(made: "Plan") -> None:
    """Every choice with its reason."""
    from effseg.plans import format_shape

    table = Table("choice", "value", "because", title=f"plan for {made.dataset}")
    values = {
        "device": made.device,
        "precision": made.precision,
        "spacing": " x ".join(f"{s:.3g}" for s in made.spacing) + " mm",
        "patch_size": format_shape(made.patch_size),
        "batch_size": str(made.batch_size),
        "recompute": made.network.memory,
        "augment": "flip " + (" ".join(made.training.augment.flip_axes) or "none"),
    }
    for choice, why in made.reasons.items():
        table.add_row(choice, values.get(choice, ""), plain(why))
    console.print(table)
