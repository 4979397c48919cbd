"""`effseg compare`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from effseg.cli.console import console, plain

N_NAMED = 5
"""Cases that changed most, named below a table."""


class CompareMetric(StrEnum):
    """What is compared; the signed volume difference cannot be, since nought is its best."""

    dice = "dice"
    iou = "iou"
    voe = "voe"
    surface_dice = "surface_dice"
    hd_mm = "hd_mm"
    hd95_mm = "hd95_mm"
    assd_mm = "assd_mm"


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="two or more runs, folders that hold the runs of several folds, folders with a "
            "metrics.json, or such files; each is held against the first",
            metavar="RUN RUN...",
        ),
    ],
    metric: Annotated[
        CompareMetric, typer.Option("--metric", help="that is compared")
    ] = CompareMetric.dice,
    on: Annotated[
        str, typer.Option("--on", help="the folder in a run whose scores are compared")
    ] = "validation",
    out: Annotated[Path, typer.Option("--out", help="where the page goes")] = Path(
        "comparison.html"
    ),
) -> None:
    """Test runs case by case against the first, and show the cases that changed most."""
    if len(runs) < 2:
        raise typer.BadParameter("give two runs or more; each is held against the first")
    from effseg.evaluation import compare_scores
    from effseg.evaluation.intervals import LEVEL, N_RESAMPLES
    from effseg.ledger import read_scored
    from effseg.report.comparison import (
        TITLES,
        describe_change,
        describe_verdict,
        row_cells,
        write_comparison,
    )

    scored = [read_scored(run, on=on) for run in runs]
    comparisons = compare_scores([(one.name, one.scores) for one in scored], metric=metric.value)
    for comparison in comparisons:
        title = (
            f"{comparison.second} against {comparison.first}: {TITLES[metric.value]} of "
            f"{comparison.n_shared} cases in both"
        )
        if {comparison.n_first, comparison.n_second} != {comparison.n_shared}:
            title += f", of {comparison.n_first} and {comparison.n_second}"
        headings = ("label", "cases", "first", "second", "difference", f"{LEVEL:.0%} interval")
        table = Table(title=plain(title))
        for heading in (*headings, "p, paired t", "p, Wilcoxon"):
            table.add_column(heading, overflow="fold")
        for row in row_cells(comparison):
            table.add_row(plain(row.name), *row.cells)
        console.print(table)
        console.print(f"{plain(comparison.second)}: {describe_verdict(comparison)}", soft_wrap=True)
        for change in comparison.changes[:N_NAMED]:
            said = describe_change(change, comparison)
            console.print(f"  changed: {plain(change.case)} {said}", soft_wrap=True)
    said = f"intervals: {N_RESAMPLES:,} bootstrap resamples of the cases"
    if len(comparisons) > 1:
        said += f"; p values corrected by Holm's method for {len(comparisons)} comparisons"
    console.print(said, soft_wrap=True)
    page = write_comparison(scored, comparisons, out)
    console.print(f"[green]page[/] {page.resolve()}", soft_wrap=True)
