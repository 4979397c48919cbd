"""Arguments and options that several verbs take."""

from pathlib import Path
from typing import Annotated

import typer

DatasetPath = Annotated[
    Path,
    typer.Argument(
        help="nnU-Net raw or MSD folder, a folder with images/ and labels/, or a CSV of "
        "image,label[,patient]",
        metavar="DATASET",
    ),
]
RunPath = Annotated[Path, typer.Argument(help="a run's folder", metavar="RUN")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="the budget, e.g. 8GiB or 500MB", metavar="SIZE")
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:1", metavar="DEVICE")
]
