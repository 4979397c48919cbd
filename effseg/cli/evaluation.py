"""`effseg evaluate`, and scores as they are printed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from effseg.cli.console import cell, console
from effseg.cli.progress import bar

if TYPE_CHECKING:
    from effseg.evaluation import Scores

SCORE_COLUMNS = {
    "name": "label",
    "dice": "Dice",
    "surface_dice": "surface",
    "hd95_mm": "HD95 mm",
    "assd_mm": "ASSD mm",
    "sensitivity": "lesions found",
    "false_positives_per_case": "false a case",
}


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="folder or file", metavar="PREDICTIONS")],
    references: Annotated[Path, typer.Argument(help="folder or file", metavar="REFERENCES")],
    out: Annotated[Path, typer.Option("--out", help="where the scores go")] = Path("metrics.json"),
    images: Annotated[
        Path | None, typer.Option("--images", help="folder of the images, for a report")
    ] = None,
    tolerance_mm: Annotated[
        float, typer.Option("--tolerance-mm", help="of the surface Dice")
    ] = 1.0,
    ignore_label: Annotated[
        int | None, typer.Option("--ignore-label", help="left out of the score")
    ] = None,
) -> None:
    """Score label maps against references, in mm, per case, label and lesion."""
    from effseg.evaluation import evaluate as evaluate_all

    with bar("scoring") as advance:
        scores = evaluate_all(
            predictions,
            references,
            out=out,
            images=images,
            tolerance_mm=tolerance_mm,
            ignore_label=ignore_label,
            progress=lambda done, total: advance(done / max(total, 1), ""),
        )
    print_scores(scores)
    console.print(f"[green]scores[/] {out}", soft_wrap=True)


def print_scores(scores: "Scores") -> None:
    """A row a label, and one over all of them; nothing where there is no score."""
    rows = scores.summary()
    if not rows:
        return
    table = Table(title=f"{len(scores.cases)} cases, surface Dice at {scores.tolerance_mm:g} mm")
    for heading in SCORE_COLUMNS.values():
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row[column]) for column in SCORE_COLUMNS))
    console.print(table)
