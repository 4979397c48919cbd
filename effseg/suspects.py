"""Labels that may be wrong: what models that never trained on a case agree on, against it.

The models of a cross-validation's folds judge one another's training cases. A place where they are
sure of one label and the reference has another is worth a person's look; it may as well be the
models' common mistake.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from effseg.dataset import Case, Dataset, read_dataset, read_label
from effseg.errors import CheckpointError, DataError
from effseg.evaluation.disagreement import SuspectCase, Vote, find_places
from effseg.files import write_text_whole
from effseg.inference import load_run, predict
from effseg.plans import Plan
from effseg.record import PLAN, RECORD, WEIGHTS, RunRecord

AGREEMENT = 0.75
"""Of three models or fewer all must agree, of four three."""

TOLERANCE_MM = 2.0
"""Readers' outlines of one thing lie this far apart."""

TABLE = "suspects.csv"
PREDICTIONS = "predictions"
CLAIM = "judges.json"
"""Says which runs' predictions a folder holds."""


@dataclass(frozen=True)
class Suspects:
    """What was found.

    Attributes:
        cases: that were judged, highest score first.
        n_unjudged: labelled cases that every run trained on, or a case of the same patient.
        table: the file with a line for each place.
        plan: of the first run.
    """

    cases: tuple[SuspectCase, ...]
    n_unjudged: int
    table: Path
    plan: Plan


@dataclass(frozen=True)
class _Judge:
    """A run, and the cases that it may judge."""

    name: str
    folder: Path
    cases: tuple[Case, ...]


def find_suspects(
    runs: Sequence[str | Path],
    dataset: Dataset | str | Path,
    *,
    out: str | Path,
    memory: str | int | None = None,
    device: str | None = None,
    agreement: float = AGREEMENT,
    tolerance_mm: float = TOLERANCE_MM,
    progress: Callable[[float, str], None] | None = None,
) -> Suspects:
    """Judge each labelled case by the runs that trained neither on it nor on its patient.

    Where an earlier call with these runs was stopped, its predictions are kept and the rest is
    made; so is all of them where only `agreement` or `tolerance_mm` has changed.

    One network is loaded at a time. Label maps and how sure the network is are written as
    `predict` writes them and read slab by slab; of a case its reference and two label maps of its
    size are held at once.

    Args:
        runs: folders of runs on one data set, such as its folds, or seeds of these.
        dataset: the data set or its folder or CSV.
        out: a folder for `suspects.csv` and the predictions, new or of an earlier call.
        memory: of each prediction, as `predict` takes it.
        device: as `predict` takes it.
        agreement: share of a case's models that must say the same, above a half.
        tolerance_mm: how far an outline may lie from the reference's.
        progress: called with (share done, the case's name).

    Returns:
        The cases with their places.

    Raises:
        DataError: if the runs are not of this data set, have different labels, or trained on every
            case; or `out` holds something else.
        CheckpointError: if one is no run.
    """
    found = dataset if isinstance(dataset, Dataset) else read_dataset(dataset)
    out = Path(out)
    judges, plan = _judges(runs, found)
    labelled = [case for case in found.cases if case.label is not None]
    n_predictions = sum(len(judge.cases) for judge in judges)
    if not n_predictions:
        raise DataError(
            f"each of {len(judges)} runs trained on all of {len(labelled)} cases; add runs of "
            "other folds"
        )
    _claim(out, judges, found)
    tell = progress or (lambda *_: None)
    votes: dict[str, list[tuple[str, Vote]]] = {}
    n_done = 0
    for judge in judges:
        for case, vote in _votes(judge, out / PREDICTIONS, memory=memory, device=device):
            votes.setdefault(case.name, []).append((judge.name, vote))
            n_done += 1
            tell(n_done / n_predictions, case.name)
    judged = [
        _judged(case, votes[case.name], plan, agreement=agreement, tolerance_mm=tolerance_mm)
        for case in labelled
        if case.name in votes
    ]
    judged.sort(key=lambda one: (-one.score, one.case))
    table = write_text_whole(out / TABLE, _table(judged, plan))
    return Suspects(tuple(judged), len(labelled) - len(judged), table, plan)


def _judges(runs: Sequence[str | Path], dataset: Dataset) -> tuple[list[_Judge], Plan]:
    if not runs:
        raise DataError("no run to judge by; expected one or more, such as the folds of a data set")
    patients = {case.name: case.patient for case in dataset.cases}
    plans = [Plan.load(Path(run) / PLAN) for run in runs]
    judges: list[_Judge] = []
    for i, (run, plan) in enumerate(zip(runs, plans, strict=True)):
        if plan.labels != plans[0].labels or plan.ignore_label != plans[0].ignore_label:
            ours, theirs = (
                ", ".join(f"{label.value} {label.name}" for label in one.labels)
                for one in (plans[0], plan)
            )
            raise DataError(
                f"{runs[0]} has labels {ours} and {run} {theirs}; only runs of the same labels "
                "can judge together"
            )
        record = RunRecord.load(Path(run) / RECORD)
        strange = [name for name in record.train if name not in patients]
        if strange:
            raise DataError(
                f"{run}: {len(strange)} of its {len(record.train)} training cases, {strange[0]} "
                f"for one, are not in {dataset.root}; name the data set that it trained on"
            )
        known = {patients[name] for name in record.train} - {None}
        cases = tuple(
            case
            for case in dataset.cases
            if case.label is not None
            and case.name not in record.train
            and case.patient not in known
        )
        # a number in front: runs of one name from several folders stay apart
        judges.append(_Judge(f"{i + 1}_{Path(run).resolve().name}", Path(run), cases))
    return judges, plans[0]


def _votes(
    judge: _Judge, folder: Path, *, memory: str | int | None, device: str | None
) -> Iterator[tuple[Case, Vote]]:
    """One judge's predictions, as they are made; its network goes when the last one is."""
    run = load_run(judge.folder)
    for case in judge.cases:
        labels = folder / judge.name / f"{case.name}.nii.gz"
        if not labels.exists():  # its name is the last that a prediction gives
            predict(run, case, out=labels, memory=memory, device=device, confidence=True)
        yield case, Vote(labels, labels.parent / "confidence" / labels.name)


def _claim(out: Path, judges: Sequence[_Judge], dataset: Dataset) -> None:
    """Say in the folder whose predictions it holds; refuse one that holds another's."""
    told = json.dumps(
        {"data": str(dataset.root.resolve()), "runs": {j.name: _digest(j.folder) for j in judges}},
        indent=2,
    )
    path = out / CLAIM
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        write_text_whole(path, told + "\n")
    elif not path.is_file() or path.read_text(encoding="utf-8").strip() != told:
        raise DataError(
            f"{out}: not empty, and not of these runs and data; name a new folder for the "
            "predictions and the table"
        )


def _digest(run: Path) -> str:
    """Of the plan and the weights, which a prediction depends on."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (PLAN, WEIGHTS):
        path = run / name
        if not path.is_file():
            raise CheckpointError(f"{run}: no {name}; expected a run that has finished an epoch")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _judged(
    case: Case,
    votes: Sequence[tuple[str, Vote]],
    plan: Plan,
    *,
    agreement: float,
    tolerance_mm: float,
) -> SuspectCase:
    assert case.label is not None
    return SuspectCase(
        case=case.name,
        reference=case.label,
        image=case.images[0],
        models=tuple(name for name, _ in votes),
        predictions=tuple(vote.labels for _, vote in votes),
        places=find_places(
            read_label(case),
            [vote for _, vote in votes],
            agreement=agreement,
            tolerance_mm=tolerance_mm,
            ignore_label=plan.ignore_label,
        ),
    )


def _table(cases: Sequence[SuspectCase], plan: Plan) -> str:
    names = {label.value: label.name for label in plan.labels}
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        (
            "case",
            "score_mm3",
            "reference_label",
            "models_label",
            "volume_mm3",
            "z_mm",
            "y_mm",
            "x_mm",
            "agreement",
            "n_models",
            "mean_probability",
        )
    )
    for case in cases:
        for place in case.places:
            writer.writerow(
                (
                    case.case,
                    f"{place.score:.4g}",
                    names.get(place.reference_label, place.reference_label),
                    names.get(place.models_label, place.models_label),
                    f"{place.volume_mm3:.6g}",
                    *(f"{value:.2f}" for value in place.point_mm),
                    f"{place.agreement:.3f}",
                    len(case.models),
                    f"{place.mean_probability:.3f}",
                )
            )
    return text.getvalue()
