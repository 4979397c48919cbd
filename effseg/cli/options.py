"""Arguments and options that several verbs take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_DATASET = typer.Argument(
    help="nnU-Net raw or MSD folder, a folder with images/ and labels/, or a CSV of "
    "image,label[,patient]",
    metavar="DATASET",
)
DatasetPath = Annotated[Path, _DATASET]
OptionalDataset = Annotated[Path | None, _DATASET]
RunPath = Annotated[Path, typer.Argument(help="a run's folder", metavar="RUN")]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="the budget: 8GiB, 500MB, or auto: what is free", metavar="SIZE"),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:1", metavar="DEVICE")
]


class Size(StrEnum):
    """How large a network is: width, depth and resolution grow together."""

    b0 = "b0"
    b1 = "b1"
    b2 = "b2"
    b3 = "b3"
    b4 = "b4"
    b5 = "b5"
    b6 = "b6"
    b7 = "b7"


class AugmentPolicy(StrEnum):
    """How much training patches are changed; the names are those of `AugmentConfig.policy`."""

    off = "off"
    light = "light"
    default = "default"
    strong = "strong"


Augment = Annotated[
    AugmentPolicy | None,
    typer.Option("--augment", help="how much training patches are changed"),
]
NetworkSize = Annotated[
    Size | None,
    typer.Option("--size", help="of the network; else: what fits the budget", metavar="b0..b7"),
]
