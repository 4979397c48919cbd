"""Where the command line speaks, and how values are written there."""

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


def plain(text: str) -> str:
    """Text that is printed as it is, whatever brackets are in it."""
    return escape(text)


def cell(value: object) -> str:
    """A value as it stands in a table; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
