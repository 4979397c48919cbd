"""The verbs under one name, and how a call of it ends."""

import logging
import sys
from typing import Annotated

import typer
from rich.logging import RichHandler

from effseg import __version__
from effseg.cli.adversarial import adversarial
from effseg.cli.benchmarking import benchmark
from effseg.cli.checking import check
from effseg.cli.comparing import compare
from effseg.cli.console import console, errors, plain
from effseg.cli.distillation import distill
from effseg.cli.evaluation import evaluate
from effseg.cli.failures import INTERNAL, STOPPED, USAGE, explained
from effseg.cli.planning import plan
from effseg.cli.prediction import predict
from effseg.cli.reporting import report
from effseg.cli.splitting import split
from effseg.cli.suspecting import suspects
from effseg.cli.testing import test
from effseg.cli.thresholds import thresholds
from effseg.cli.training import train

# typer carries click's exceptions, in newer versions as its own copy: take the class from typer
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="effseg",
    help="Trains and runs 3-D segmentation networks inside a memory budget that you name.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def settings(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say what is done")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Set up logging for every verb."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_path=False, show_time=False)],
        force=True,
    )
    if version:
        console.print(f"effseg {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.print(context.get_help())


# as --help lists them
for verb in (
    check,
    plan,
    split,
    train,
    adversarial,
    predict,
    evaluate,
    test,
    thresholds,
    distill,
    report,
    compare,
    suspects,
    benchmark,
):
    app.command()(verb)


def main() -> None:
    """Run the command line; every failure is one line and an exit code."""
    try:
        code = app(standalone_mode=False)
        if code == STOPPED:  # what newer typers make of an interrupt; older ones abort
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        errors.print("stopped")
        sys.exit(STOPPED)
    except UsageError as error:
        message = getattr(error, "format_message", error.__str__)()
        errors.print(f"[red]usage[/] {plain(message)}", soft_wrap=True)
        errors.print("`effseg --help` lists the verbs, `effseg VERB --help` their options")
        sys.exit(USAGE)
    except Exception as error:
        message, code = explained(error)
        kind = "" if code == INTERNAL else "[red]error[/] "
        errors.print(f"{kind}{message}", soft_wrap=True)
        sys.exit(code)
