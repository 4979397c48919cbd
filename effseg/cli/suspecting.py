"""`effseg suspects`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from effseg.cli.console import console, plain
from effseg.cli.options import Device, Memory
from effseg.cli.progress import bar

N_NAMED = 10
"""Places in the printed table."""


def suspects(
    runs: Annotated[
        list[Path], typer.Argument(help="runs of several folds of one data set", metavar="RUN...")
    ],
    data: Annotated[
        Path, typer.Option("--data", help="the data set they trained on", metavar="DATASET")
    ],
    out: Annotated[Path, typer.Option("--out", help="folder for table, page and predictions")],
    memory: Memory = None,
    device: Device = None,
    agreement: Annotated[
        float, typer.Option("--agreement", help="share of the models that say the same, over 0.5")
    ] = 0.75,
    tolerance_mm: Annotated[
        float, typer.Option("--tolerance-mm", help="how far outlines may lie apart")
    ] = 2.0,
) -> None:
    """List labels that models which never saw the case agree against, with pictures."""
    from effseg.report.suspects import rank_places, write_suspects
    from effseg.suspects import find_suspects

    with bar("labelling") as advance:
        found = find_suspects(
            runs,
            data,
            out=out,
            memory=memory,
            device=device,
            agreement=agreement,
            tolerance_mm=tolerance_mm,
            progress=advance,
        )
    ranked = rank_places(found.cases)
    n_suspect = sum(bool(case.places) for case in found.cases)
    said = f"{len(ranked)} places in {n_suspect} of {len(found.cases)} judged cases"
    if found.n_unjudged:
        said += f"; {found.n_unjudged} could not be judged: every run trained on them"
    if ranked:
        names = {label.value: label.name for label in found.plan.labels}
        table = Table(title=said)
        for heading in ("case", "score mm3", "volume mm3", "reference", "models say", "agree"):
            table.add_column(heading, overflow="fold")
        table.add_column("probability")
        for case, place in ranked[:N_NAMED]:
            table.add_row(
                plain(case.case),
                f"{place.score:.4g}",
                f"{place.volume_mm3:.4g}",
                plain(names.get(place.reference_label, str(place.reference_label))),
                plain(names.get(place.models_label, str(place.models_label))),
                f"{place.agreement:.0%} of {len(case.models)}",
                f"{place.mean_probability:.3f}",
            )
        console.print(table)
    else:
        console.print(said)
    page = write_suspects(
        found.cases, found.plan, out / "suspects.html", n_unjudged=found.n_unjudged
    )
    console.print(f"[green]table[/] {found.table}", soft_wrap=True)
    console.print(f"[green]page[/] {page.resolve()}", soft_wrap=True)
