"""`effseg split`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from effseg.cli.console import console
from effseg.cli.options import DatasetPath

if TYPE_CHECKING:
    from effseg.dataset import Case, Dataset, NineWaySplit

UNANNOTATED = "scans without labels, or a CSV of a data set whose labels are not to be used"


def split(
    dataset: DatasetPath,
    out: Annotated[Path, typer.Option("--out", help="where the split goes, JSON")],
    unannotated: Annotated[
        Path | None,
        typer.Option("--unannotated", help=UNANNOTATED, metavar="FOLDER"),
    ] = None,
    annotated: Annotated[
        float | None,
        typer.Option(
            "--annotated",
            help="in place of --unannotated: the share of DATASET's cases whose labels are used, "
            "0.1 for one",
        ),
    ] = None,
    proportions: Annotated[
        str,
        typer.Option("--proportions", help="of train, validation and test", metavar="A,B,C"),
    ] = "0.6,0.2,0.2",
    seed: Annotated[int, typer.Option("--seed", help="of the draw")] = 0,
) -> None:
    """Draw the nine sets of adversarial training, whole patients, none overlapping another."""
    from effseg.dataset import read_dataset, share_annotated, split_nine_ways

    shares = _shares(proportions)
    found = read_dataset(dataset)
    if (unannotated is None) == (annotated is None):
        raise typer.BadParameter("give --unannotated FOLDER or --annotated SHARE, one of the two")
    if annotated is not None:
        ours, theirs = share_annotated(found, annotated, seed=seed)
    else:
        assert unannotated is not None
        ours, theirs = found.cases, scans_in(unannotated, like=found)
    drawn = split_nine_ways(
        ours,
        theirs,
        dataset=found.name,
        segmenter=shares,
        discriminator=shares,
        apart=shares,
        seed=seed,
    )
    table = Table("cases", "train", "validation", "test", title=f"split of {found.name}")
    for name, sets in (
        ("segmenter, annotated", drawn.segmenter),
        ("discriminator, annotated: of the segmenter's train", drawn.discriminator.annotated),
        ("discriminator, unannotated", drawn.discriminator.unannotated),
    ):
        table.add_row(name, *(str(len(part)) for part in (sets.train, sets.validation, sets.test)))
    console.print(table)
    console.print(f"[green]split[/] {drawn.save(out)}", soft_wrap=True)


def annotated_part(dataset: "Dataset", split: "NineWaySplit") -> "Dataset":
    """The cases that a segmenter learns from or is chosen by; no test case is looked at.

    Raises:
        DataError: if one of them is not in the data set.
    """
    from effseg.dataset import check_there

    seen = (*split.segmenter.train, *split.segmenter.validation)
    check_there(seen, dataset.cases, of=split.dataset)
    return replace(dataset, cases=tuple(c for c in dataset.cases if c.name in set(seen)))


def scans_in(path: Path, *, like: "Dataset") -> "tuple[Case, ...]":
    """The unannotated cases that a path means.

    Args:
        path: a folder of images, one image, or the CSV of a data set, which knows patients.
        like: the annotated data, whose images have as many files a case.
    """
    from effseg.dataset import read_dataset
    from effseg.inference import find_images

    if path.suffix.lower() == ".csv":
        return read_dataset(path).cases
    return tuple(find_images([path], n_channels=len(like.cases[0].images)).values())


def _shares(text: str) -> tuple[float, float, float]:
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"--proportions {text}; expected three numbers, such as 0.6,0.2,0.2"
        ) from None
    return train, validation, test
