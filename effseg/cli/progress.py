"""Bars that move while a verb works; they are drawn beside what it prints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from effseg.cli.console import errors


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[[float, str], None]]:
    """A progress bar; the function moves it to (done, of `total` or of 1) and names the item."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if total is not None else TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}"),
    ]
    with Progress(*columns, console=errors, transient=True) as bars:
        task = bars.add_task(what, total=total or 1, item="")

        def advance(done: float, item: str) -> None:
            bars.update(task, completed=done, item=item)

        yield advance


@contextmanager
def training_bars(
    n_cases: int,
) -> Iterator[tuple[Callable[[int, int], None], Callable[..., None]]]:
    """Bars for preparing the cases and for training: loss, Dice and the time left."""
    from effseg.training import TrainingState

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
    ]
    with Progress(*columns, console=errors) as bars:
        preparing = bars.add_task("preparing", total=n_cases, state="")
        training = bars.add_task("training", total=1.0, state="")

        def prepared(done: int, total: int) -> None:
            bars.update(preparing, completed=done, total=total)

        def trained(state: TrainingState) -> None:
            left = f"{int(state.seconds_left) // 60}:{int(state.seconds_left) % 60:02d}"
            dice = "" if state.dice is None else f", Dice {state.dice:.3f}"
            bars.update(
                training,
                completed=state.fraction,
                state=f"epoch {state.epoch}, loss {state.loss:.3f}{dice}, {left} left",
            )

        yield prepared, trained
