"""Arguments and options that several verbs take."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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
NetworkName = Annotated[
    str | None,
    typer.Option(
        "--network",
        help="one of MONAI's, monai:SegResNet, or a function (in_channels, out_channels, ...) of a "
        "module that Python finds; else: effseg's own",
        metavar="MODULE:NAME",
    ),
]
NetworkOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--network-option",
        help="of the network, init_filters=16 or decoder=linknet; may be given several times",
        metavar="KEY=VALUE",
    ),
]


def network_options(given: list[str] | None) -> dict[str, Any]:
    """Options by name; a value is JSON where it is some, else text.

    Raises:
        BadParameter: if one is no KEY=VALUE, or a key comes twice.
    """
    options: dict[str, Any] = {}
    for one in given or []:
        key, equals, text = one.partition("=")
        if not (key and equals) or key in options:
            raise typer.BadParameter(f"--network-option {one}; expected KEY=VALUE, each key once")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options
