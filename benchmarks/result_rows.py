"""Rows of a table of results, added as they are measured."""

import csv
import fcntl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append, all at once: several processes write into the same file; its first row names columns.

    Args:
        path: of a CSV, made with its folder where it is missing.
        rows: of the same columns. None: nothing is written.
    """
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if file.tell() == 0:
            table.writeheader()
        table.writerows(rows)
