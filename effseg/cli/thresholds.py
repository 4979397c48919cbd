"""`effseg thresholds`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from effseg.cli.console import cell, console
from effseg.cli.options import Device, Memory
from effseg.cli.progress import bar

if TYPE_CHECKING:
    from effseg.validation import Thresholds


def thresholds(
    runs: Annotated[
        list[Path], typer.Argument(help="runs of one plan, such as folds", metavar="RUN...")
    ],
    memory: Memory = None,
    device: Device = None,
) -> None:
    """Choose thresholds of probability and volume by the cases that runs held out."""
    from effseg.validation import choose_thresholds

    with bar("predicting") as advance:
        chosen = choose_thresholds(runs, memory=memory, device=device, progress=advance)
    print_thresholds(chosen)


def print_thresholds(chosen: "Thresholds") -> None:
    """A row a label, one over all of them, and what became of it."""
    table = Table(
        title=f"{chosen.n_cases} held-out cases, each scored at what the others of "
        f"{chosen.n_groups} groups say"
    )
    for heading in ("label", "threshold", "Dice at 0.5", "Dice at the others'"):
        table.add_column(heading, overflow="fold")
    for row in chosen.labels:
        cells = (row.threshold, row.dice_before, row.dice_after)
        table.add_row(row.name, *map(cell, cells))
    table.add_row("all", "", cell(chosen.dice_before), cell(chosen.dice_after))
    console.print(table)
    console.print(f"smallest component {chosen.minimum_mm3:.4g} mm3")
    said = "no better than what the plans have, which stay as they are"
    if chosen.taken:
        said = "[green]written[/] into the plans: predictions are cut so from now on"
    console.print(said, soft_wrap=True)
