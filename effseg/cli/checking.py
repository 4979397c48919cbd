"""`effseg check`."""

import typer
from rich.table import Table

from effseg.cli.console import console, plain
from effseg.cli.failures import BAD_INPUT
from effseg.cli.options import DatasetPath
from effseg.cli.progress import bar


def check(dataset: DatasetPath) -> None:
    """Audit geometry, labels and duplicates; exit 2 and a table if something is wrong."""
    from effseg.dataset import audit, read_dataset

    found = read_dataset(dataset)
    with bar("reading") as advance:
        report = audit(found, progress=lambda done, total, name: advance(done / total, name))
    if report.findings:
        table = Table("case", "severity", "what", title=f"{found.name}: {len(report.findings)}")
        for finding in report.findings:
            colour = "red" if finding.severity == "error" else "yellow"
            table.add_row(
                finding.case or "(all)", f"[{colour}]{finding.severity}[/]", plain(finding.what)
            )
        console.print(table)
    values = ", ".join(f"{value} ({n:,})" for value, n in sorted(report.labels.items()))
    console.print(f"{found.name}: {report.n_cases} cases, labels (voxels): {values}")
    if not report.ok:
        raise typer.Exit(BAD_INPUT)
    console.print("[green]ready to plan[/]")
