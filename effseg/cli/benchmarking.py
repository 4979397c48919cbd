"""`effseg benchmark`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from effseg.cli.console import cell, console, plain
from effseg.cli.failures import INTERNAL
from effseg.errors import DataError


class Suite(StrEnum):
    """The benchmark suites."""

    resample = "resample"
    memory = "memory"
    head_loss = "head_loss"
    inference = "inference"
    tuning = "tuning"
    augment = "augment"


def benchmark(
    suite: Annotated[Suite, typer.Option("--suite", help="which suite")] = Suite.memory,
) -> None:
    """Run a benchmark suite of a source checkout: one table, bytes beside seconds."""
    import json
    import subprocess
    import tempfile

    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    script = folder / f"bench_{suite.value}.py"
    if not script.is_file():
        raise DataError(
            f"{script}: not there; the benchmarks come with the source: clone the repository and "
            "install it with `pip install -e .`"
        )
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "record.json"
        command = [sys.executable, "-m", "pytest", str(script), "--benchmark-enable", "--quiet"]
        command += [f"--benchmark-json={record}", "--benchmark-disable-gc", "--benchmark-quiet"]
        command += ["-W", "ignore", "-rs"]
        code = subprocess.call(command, cwd=folder.parent)  # noqa: S603 - our own file
        if code != 0:
            raise typer.Exit(INTERNAL)
        runs = json.loads(record.read_text(encoding="utf-8"))["benchmarks"]
    print_benchmarks(suite.value, runs)


def print_benchmarks(suite: str, runs: list[dict[str, Any]]) -> None:
    """One row a benchmark: the median of its seconds beside what it counted."""
    counted = list(dict.fromkeys(key for run in runs for key in run["extra_info"]))
    numbers = (Column(name, no_wrap=True) for name in ("median s", *counted))
    names = Column("benchmark", overflow="fold", min_width=24)
    table = Table(names, *numbers, title=f"suite {suite}")
    for run in runs:
        cells = (cell(run["extra_info"].get(key)) for key in counted)
        name = plain(run["param"] or run["name"])
        table.add_row(name, f"{run['stats']['median']:.4f}", *cells)
    console.print(table)
