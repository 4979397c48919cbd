"""The experiment record: `runs.csv` beside the runs, a line each, and runs set side by side.

A line says what a run changed against its parent, what came of it and what it took; the last word,
`conclusion`, is a person's.
"""

from effseg.ledger.changes import list_changes
from effseg.ledger.lines import RUNS, add_run, check_parent, note_run, read_line
from effseg.ledger.scored import Scored, read_scored

__all__ = [
    "RUNS",
    "Scored",
    "add_run",
    "check_parent",
    "list_changes",
    "note_run",
    "read_line",
    "read_scored",
]
