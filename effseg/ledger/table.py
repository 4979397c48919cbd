"""A table that a program adds to and a person writes in: nobody's cells are lost."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from effseg.errors import DataError
from effseg.files import write_text_whole

COLUMNS = (
    "run",
    "started",
    "data",
    "parent",
    "changes",
    "score",
    "score_low",
    "score_high",
    "score_of",
    "minutes",
    "steps",
    "peak_mib",
    "predicted_mib",
    "budget_mib",
    "stopped_by",
    "conclusion",
)
"""Of `runs.csv`. `conclusion` is the person's, and so is any other column that is found there."""

DELIMITERS = ",;\t"
"""Spreadsheets of some countries write semicolons."""

LOCK_SECONDS = 30.0
"""A line is written in milliseconds; whoever holds the table longer has stopped."""


@dataclass
class RunTable:
    """A table as it was read, cell by cell.

    Attributes:
        header: the names of the columns.
        rows: each as long as the header, or longer where a person wrote beside it.
        delimiter: between cells.
        mark: what stood before the first letter: the byte order mark of some spreadsheets.
    """

    header: list[str]
    rows: list[list[str]]
    delimiter: str = ","
    mark: str = ""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table; one that is not there is empty.

        Raises:
            DataError: if it is no table with a column `run`.
        """
        if not path.exists():
            return cls(header=list(COLUMNS), rows=[])
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: cannot be read as text ({error}); save it as CSV in UTF-8"
            ) from error
        mark = text[:1] if text.startswith("\ufeff") else ""
        text = text.removeprefix(mark)
        if not text.strip():
            return cls(header=list(COLUMNS), rows=[], mark=mark)
        for delimiter in DELIMITERS:
            try:
                header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
            except csv.Error:
                continue
            if "run" in header and len(header) > 1:
                padded = [row + [""] * (len(header) - len(row)) for row in rows]
                return cls(header=header, rows=padded, delimiter=delimiter, mark=mark)
        raise DataError(
            f"{path}: no column named run in its first line; expected the table of runs: rename "
            "the file, and the next run begins a new one"
        )

    def find(self, run: str, started: str) -> list[str] | None:
        """A run's row: that of its name, unless it is known to have begun at another time."""
        for row in self.rows:
            told = self.cell(row, "started")
            if self.cell(row, "run") == run and (told == started or not _is_time(told)):
                return row
        return None

    def cell(self, row: list[str], column: str) -> str:
        """A cell; empty where there is no such column."""
        return row[self.header.index(column)] if column in self.header else ""

    def put(self, line: Mapping[str, str]) -> None:
        """Fill in a run's row, or add it below the others; cells that `line` lacks stay."""
        for column in COLUMNS:
            if column not in self.header:
                self.header.append(column)
                for row in self.rows:
                    # what was written beside the table stays beside it
                    row.insert(len(self.header) - 1, "")
        found = self.find(line["run"], line.get("started", ""))
        row = [""] * len(self.header) if found is None else found
        if found is None:
            self.rows.append(row)
        for column, value in line.items():
            row[self.header.index(column)] = value

    def save(self, path: Path) -> None:
        """Write the table; the file appears whole or not at all.

        Raises:
            DataError: if it cannot be written.
        """
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter=self.delimiter, lineterminator="\n")
        writer.writerows([self.header, *self.rows])
        write_text_whole(path, self.mark + out.getvalue())


def lock_of(path: Path) -> FileLock:
    """Held while a table is read, changed and written: two runs may end at once.

    The lock is the system's, on a hidden file beside the table; it ends with its process.
    """
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS)


def put_line(path: Path, line: Mapping[str, str]) -> None:
    """Fill in a run's row of the table in a file, or add it.

    Raises:
        DataError: if the file is no table of runs, cannot be written, or stays locked.
    """
    try:
        with lock_of(path):
            table = RunTable.read(path)
            table.put(line)
            table.save(path)
    except Timeout as error:
        raise DataError(
            f"{path}: another process has held it for {LOCK_SECONDS:.0f} s; end that, and add the "
            f"run with effseg.validate"
        ) from error
    except (OSError, NotImplementedError) as error:  # the second: a disk without locks
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be written ({said})") from error


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
