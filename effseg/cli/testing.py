"""`effseg test`."""

from pathlib import Path
from typing import Annotated

import typer

from effseg.cli.console import console
from effseg.cli.evaluation import print_scores
from effseg.cli.progress import bar


def test(
    run: Annotated[Path, typer.Argument(help="a run that trained on a split", metavar="RUN")],
) -> None:
    """Score the cases that a run's split keeps for testing; nothing is chosen by them."""
    from effseg.report import write_report
    from effseg.validation import score_test_set

    with bar("testing") as advance:
        scores = score_test_set(run, progress=advance)
    print_scores(scores)
    console.print(f"[green]report[/] {write_report(run).resolve()}", soft_wrap=True)
