"""Many cases, one after the other: the next is read and the last is written meanwhile."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from effseg.dataset import Case
from effseg.devices import present_device
from effseg.errors import DataError, PlanError
from effseg.inference.budget import budget_of
from effseg.inference.case_queue import CaseProgress, CaseQueue, CaseResult
from effseg.inference.prediction import predict
from effseg.inference.run import Run, Runs, load_runs
from effseg.io import WRITTEN_SUFFIXES
from effseg.plans import PostprocessConfig

_SHARD = re.compile(r"(\d+)/(\d+)")


def predict_cases(
    run: Runs,
    cases: Iterable[Case],
    *,
    out: str | Path,
    memory: str | int | None = None,
    tta: bool = False,
    device: str | None = None,
    postprocess: PostprocessConfig | None = None,
    resume: bool = False,
    skip_constant: bool = False,
    coarse: Run | None = None,
    probabilities: Sequence[int] = (),
    entropy: bool = False,
    skip_existing: bool = False,
    suffix: str = ".nii.gz",
    progress: CaseProgress | None = None,
    report: Callable[[CaseResult], None] | None = None,
) -> tuple[CaseResult, ...]:
    """Label many cases, each as `predict` does; one that fails does not stop the others.

    While a case is computed, the next one is read and the last one is written, each in a thread,
    as far as the budget has room for what they hold; where it has none, they take turns.

    Args:
        run: a run's folder, or a loaded `Run`; or several, as `predict` takes them.
        cases: such as `find_images` gives; their names become the files' names.
        out: the folder for the label maps, made if missing: `NAME` and the suffix. One that is
            there is replaced, once the new one is complete.
        memory: a budget such as "4GiB" for all that is held at once; "auto": what is free now;
            None: no limit.
        tta: as `predict` takes it.
        device: as `predict` takes it.
        postprocess: a rule in place of the plan's.
        resume: as `predict` takes it; each case is read from its files and written in its turn.
        skip_constant: as `predict` takes it.
        coarse: as `predict` takes it.
        probabilities: as `predict` takes them; each case is written in its turn.
        entropy: likewise.
        skip_existing: keep the label maps that are there and do only what is missing.
        suffix: of the label maps' names, which says their format.
        progress: called after each pass of the network.
        report: called with each result as soon as it is known.

    Returns:
        One result a case, in the cases' order, failures with their error. No case: nothing.

    Raises:
        DataError: if two cases have one name, a label map would replace an image, or `out` cannot
            be written; before anything is predicted.
        PlanError: if the budget is no size, the device is not here, or the suffix names no format.
        CheckpointError: if the run cannot be loaded.
    """
    runs = load_runs(run)
    cases = list(cases)
    used = present_device(device or runs[0].device)
    budget_bytes = budget_of(memory, str(used))
    targets = _targets(cases, Path(out), suffix)
    queue = CaseQueue(
        runs,
        partial(
            predict,
            runs,
            tta=tta,
            device=device,
            postprocess=postprocess,
            resume=resume,
            skip_constant=skip_constant,
            coarse=coarse,
            probabilities=probabilities,
            entropy=entropy,
        ),
        reads_ahead=not resume,
        writes_behind=not (resume or probabilities or entropy),
        device=device,
        budget_bytes=budget_bytes,
        progress=progress or (lambda *_: None),
        report=report or (lambda _: None),
    )
    _check_writable(Path(out))
    with queue:
        for case, path in zip(cases, targets, strict=True):
            if skip_existing and path.exists():
                queue.keep(case, path)
            else:
                queue.put(case, path)
    by_name = {result.name: result for result in queue.results}
    return tuple(by_name[case.name] for case in cases)


def shard_of(cases: Sequence[Case], shard: str) -> list[Case]:
    """One of n shares of the cases, so that several machines or devices can split them.

    Sorted by name, shard 2/4 takes the second, the sixth, the tenth, ...: every case is in exactly
    one of 1/4, 2/4, 3/4 and 4/4. Counted from 1, as `--shard` of test runners is.

    Args:
        cases: all of them, the same for every shard.
        shard: "i/n".

    Returns:
        The share, sorted by name; nothing where there are fewer cases than shards before it.

    Raises:
        PlanError: if the text is no shard.
    """
    match = _SHARD.fullmatch(shard.strip())
    which, n = (0, 0) if match is None else (int(match[1]), int(match[2]))
    if not 1 <= which <= n:
        raise PlanError(f"shard {shard!r}; expected i/n with i from 1 to n, such as 1/4 ... 4/4")
    return sorted(cases, key=lambda case: case.name)[which - 1 :: n]


def _targets(cases: Sequence[Case], out: Path, suffix: str) -> list[Path]:
    """Where each case's label map goes.

    Raises:
        DataError: if two would go to one place, or one to that of an image.
        PlanError: if the suffix names no format.
    """
    if suffix not in WRITTEN_SUFFIXES:
        raise PlanError(f"suffix {suffix!r}; expected one of {', '.join(WRITTEN_SUFFIXES)}")
    images = {os.path.realpath(path) for case in cases for path in case.images}
    targets: dict[str, Path] = {}
    for case in cases:
        path = out / f"{case.name}{suffix}"
        if case.name in targets:
            raise DataError(f"two cases are named {case.name}, and both would be {path}")
        if os.path.realpath(path) in images:
            raise DataError(f"{path} is an image to be labelled; choose another folder for labels")
        targets[case.name] = path
    return list(targets.values())


def _check_writable(folder: Path) -> None:
    """Make the folder, and refuse one that takes no file, before hours are spent on what goes in.

    Raises:
        DataError: if it cannot be made or takes none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"{folder}: label maps cannot be written there ({error.strerror or error}); choose "
            "another folder"
        ) from error
