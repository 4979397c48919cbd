"""`effseg report`."""

from effseg.cli.console import console
from effseg.cli.options import RunPath


def report(run: RunPath) -> None:
    """Write one self-contained HTML page about a run."""
    from effseg.report import write_report

    console.print(f"[green]report[/] {write_report(run).resolve()}", soft_wrap=True)
