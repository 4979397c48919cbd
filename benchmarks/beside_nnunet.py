"""effseg and nnU-Net, trained on the same cases for the same minutes on the same cores.

    python -m venv nnunet && nnunet/bin/pip install torch nnunetv2==2.8.1
    python benchmarks/beside_nnunet.py DATASET --nnunet-venv nnunet --minutes 20 --out FOLDER

Holds out a share of the cases as `real_data.py` does. effseg trains on the rest in a budget,
nnU-Net as it plans by itself: its default planner, `3d_fullres`, and its default trainer, whose
schedule is stretched over the minutes (`nnunet_trainer.py` says what is changed), on the same fold
of the same cases. Both label the cases that were held out, each by its defaults (those of nnU-Net
mirror the image), and `effseg.evaluate` scores both. What is no training (planning, preparing the
cases) does not count as such and stands beside it.

Memory is that of a command and all its workers, without libraries' code, above what an interpreter
holds that has imported the tool (`process_tree.py`).

`--tool effseg` and, on the same folder, `--tool nnU-Net` do one after the other what takes long to
do at once; the table keeps the other's row.
"""

import argparse
import csv
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from nnunet_job import NnUNetJob
from process_tree import Took, imported_bytes, watched
from real_data import hold_out, listed, rounded

from effseg.dataset import read_dataset
from effseg.evaluation import evaluate
from effseg.plans import Plan, format_shape
from effseg.record import PLAN, RECORD, SCORES, RunRecord

RESULTS = Path(__file__).parent / "results" / "beside_nnunet.csv"
MIB = 2**20
EFFSEG, NNUNET = TOOLS = ("effseg", "nnU-Net")
OURS, THEIRS = "effseg.cli,effseg.training,effseg.planner", "nnunetv2.run.run_training"
"""What training imports."""


@dataclass(frozen=True)
class Row:
    """What a tool did.

    Attributes:
        tool: its name.
        dataset: on which.
        seen_cases: that it learnt from.
        unseen_cases: that it was scored on.
        dice: the mean over labels and unseen cases.
        hd95_mm: likewise.
        minutes: of training.
        steps: that were taken.
        other_minutes: of planning, preparing and writing, before and after.
        predict_minutes: of labelling the unseen cases.
        train_mib: peak of memory above the imports, workers included; of nnU-Net without its
            preparing, a command of its own.
        imports_mib: what the imports of training hold.
        budget_mib: that was given; None: there is none to give.
        patch: voxels.
        batch: samples.
        parameters: that were learnt.
        torch: its version, of effseg's interpreter.
        cores: of the machine.
        processor: of the machine.
    """

    tool: str
    dataset: str
    seen_cases: int
    unseen_cases: int
    dice: float | None
    hd95_mm: float | None
    minutes: float
    steps: int
    other_minutes: float
    predict_minutes: float
    train_mib: float
    imports_mib: float
    budget_mib: float | None
    patch: str
    batch: int
    parameters: int
    torch: str = torch.__version__
    cores: int | None = os.cpu_count()
    processor: str = platform.machine()


@dataclass(frozen=True)
class Run:
    """What a tool's commands left.

    Attributes:
        predictions: the folder of its label maps.
        commands: that trained, in their order; the last one is training itself.
        predicted: the command that labelled.
        imports_bytes: that its imports hold.
        facts: of the row, which only the tool knows.
    """

    predictions: Path
    commands: Sequence[Took]
    predicted: Took
    imports_bytes: int
    facts: Mapping[str, Any]


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--nnunet-venv", type=Path, default="nnunet", help="where nnunetv2 lives")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--memory", default="1GiB", help="effseg's budget")
    parser.add_argument("--held-out", type=float, default=0.3, help="share of the cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table's file")
    parser.add_argument("--tool", choices=TOOLS, help="only this one, effseg first; default: both")
    options = parser.parse_args()
    out = options.out.absolute()
    dataset = read_dataset(options.dataset)
    tools = TOOLS if options.tool is None else (options.tool,)
    if EFFSEG in tools:
        listed(hold_out(dataset, out, share=options.held_out, seed=options.seed), out)
    train_csv = out / f"{dataset.name}.csv"
    for tool in tools:
        if tool == EFFSEG:
            run = with_effseg(
                train_csv, out, options.memory, minutes=options.minutes, seed=options.seed
            )
        else:
            run = with_nnunet(
                train_csv, out, options.nnunet_venv.absolute(), minutes=options.minutes
            )
        rows = put_row(row_of(run, dataset.name, out), options.results)
    print(as_text(rows))


def with_effseg(train_csv: Path, out: Path, memory: str, *, minutes: float, seed: int) -> Run:
    """Train and predict with effseg."""
    folder, python = out / "run", Path(sys.executable)
    command = [python, "-m", "effseg.cli"]
    trained = watched(
        [
            *(*command, "train", train_csv, "--out", folder, "--device", "cpu"),
            *("--memory", memory, "--minutes", minutes, "--seed", seed),
        ]
    )
    predicted = watched(
        [*command, "predict", folder, out / "images", "--out", folder / "test", "--device", "cpu"]
    )
    record, plan = RunRecord.load(folder / RECORD), Plan.load(folder / PLAN)
    facts = {
        "tool": EFFSEG,
        "seen_cases": len(record.train),
        "minutes": record.minutes,
        "steps": record.steps,
        "budget_mib": plan.memory.budget_bytes / MIB,
        "patch": format_shape(plan.patch_size),
        "batch": plan.batch_size,
        "parameters": record.n_parameters,
    }
    return Run(folder / "test", [trained], predicted, imported_bytes(python, OURS), facts)


def with_nnunet(train_csv: Path, out: Path, venv: Path, *, minutes: float) -> Run:
    """Plan, train and predict with nnU-Net, on the fold that effseg trained on."""
    record, plan = RunRecord.load(out / "run" / RECORD), Plan.load(out / "run" / PLAN)
    job = NnUNetJob(out / "nnunet", venv)
    job.lay_out(read_dataset(train_csv).cases, out / "images", plan)
    prepared = job.prepare({"train": record.train, "val": record.validation})
    with job.trainer(minutes):
        trained, predicted = job.train(), job.predict()
    job.home.joinpath("test").mkdir()
    for image in (out / "images").iterdir():  # what else nnU-Net leaves there is no label map
        shutil.copy(job.predicted / image.name, job.home / "test")
    facts = job.done()
    facts |= {
        "tool": NNUNET,
        "seen_cases": len(record.train),
        "budget_mib": None,
        "patch": format_shape(tuple(facts["patch"])),
    }
    imports = imported_bytes(venv / "bin" / "python", THEIRS)
    return Run(job.home / "test", [prepared, trained], predicted, imports, facts)


def row_of(run: Run, dataset: str, out: Path) -> Row:
    """Score a tool's label maps, and put all that is known into a row."""
    scores = evaluate(run.predictions, out / "labels", out=run.predictions / SCORES)
    facts = {name: value for name, value in run.facts.items() if name in COLUMNS}
    commands_minutes = sum(took.seconds for took in run.commands) / 60

    peak_bytes = run.commands[-1].peak_bytes - run.imports_bytes
    return Row(
        dataset=dataset,
        unseen_cases=len(scores.cases),
        dice=rounded(scores.mean_dice),
        hd95_mm=rounded(scores.mean("hd95_mm")),
        other_minutes=round(commands_minutes - facts["minutes"], 2),
        predict_minutes=round(run.predicted.seconds / 60, 2),
        train_mib=round(peak_bytes / MIB, 1),
        imports_mib=round(run.imports_bytes / MIB, 1),
        **(facts | {"minutes": round(facts["minutes"], 2)}),
    )


def put_row(row: Row, path: Path) -> list[dict[str, Any]]:
    """Write a tool's row into the table, in place of an older one of it; all rows come back."""
    rows = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [other for other in csv.DictReader(file) if other["tool"] != row.tool]
    rows.append(asdict(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One column a tool."""
    lines = ([name, *(str(row[name]) for row in rows)] for name in COLUMNS)
    return "\n".join("".join(f"{cell:>24}" for cell in line) for line in lines)


COLUMNS = [field.name for field in fields(Row)]


if __name__ == "__main__":
    main()
