"""The main job on real data, by its command line: train, predict unseen cases, score.

    python benchmarks/real_data.py DATASET --minutes 10 --memory 1GiB --out FOLDER

Holds out a share of the cases before anything looks at them, runs `effseg train`, `effseg predict`
and `effseg evaluate`, prints one row, and adds it to benchmarks/results/real_data.csv.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from result_rows import append_rows

from effseg.dataset import Dataset, read_dataset
from effseg.evaluation import Scores
from effseg.io import VOLUME_SUFFIXES

RESULTS = Path(__file__).parent / "results" / "real_data.csv"


def main() -> None:
    """Run the job and write its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--held-out", type=float, default=0.3, help="share of the cases")
    parser.add_argument("--tta", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dataset = read_dataset(options.dataset)
    learnt = hold_out(dataset, options.out, share=options.held_out, seed=options.seed)
    train_csv = listed(learnt, options.out)

    started = time.monotonic()
    run = options.out / "run"
    effseg("train", train_csv, "--out", run, "--memory", options.memory,
           "--minutes", options.minutes, "--seed", options.seed)  # fmt: skip
    trained = time.monotonic()
    tta = ["--tta"] if options.tta else []
    effseg("predict", run, options.out / "images", "--out", run / "test", *tta)
    effseg("evaluate", run / "test", options.out / "labels", "--images", options.out / "images",
           "--out", run / "test" / "metrics.json")  # fmt: skip
    effseg("report", run)

    scores = Scores.load(run / "test" / "metrics.json")
    record = json.loads((run / "run.json").read_text())
    row = {
        "dataset": dataset.name,
        "unseen_cases": len(scores.cases),
        "minutes": record["minutes"],
        "steps": record["steps"],
        "parameters": record["n_parameters"],
        "tta": options.tta,
        "seed": options.seed,
        "dice": rounded(scores.mean_dice),
        "lesion_dice": rounded(scores.mean_lesion_dice),
        "sensitivity": rounded(scores.sensitivity),
        "false_positives": rounded(scores.false_positives_per_case),
        "hd95_mm": rounded(scores.mean("hd95_mm")),
        "budget_mib": record["memory"]["budget_bytes"] >> 20,
        "predicted_mib": record["memory"]["predicted_peak_bytes"] >> 20,
        "measured_mib": record["memory"]["measured_peak_bytes"] >> 20,
        "train_command_minutes": round((trained - started) / 60, 2),
        "device": record["device"],
        "threads": record["n_threads"],
        "processor": platform.machine(),
        "effseg": record["effseg"],
        "torch": record["torch"],
    }
    append_rows(RESULTS, [row])
    for name, value in row.items():
        print(f"{name:>22} {value}")


def hold_out(dataset: Dataset, out: Path, *, share: float, seed: int) -> Dataset:
    """Link the held-out cases into images/ and labels/; gives the data set of the others."""
    order = np.random.default_rng(seed).permutation(len(dataset.cases))
    n_held = round(share * len(order))
    for index in sorted(order[:n_held]):
        case = dataset.cases[index]
        assert case.label is not None
        for kind, path in (("images", case.images[0]), ("labels", case.label)):
            suffix = next(s for s in VOLUME_SUFFIXES if path.name.endswith(s))
            link = out / kind / f"{case.name}{suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    return replace(dataset, cases=tuple(dataset.cases[i] for i in sorted(order[n_held:])))


def listed(dataset: Dataset, out: Path) -> Path:
    """The cases in a CSV, which the command line reads."""
    path = out / f"{dataset.name}.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "name"])
        for case in dataset.cases:
            assert case.label is not None
            table.writerow([case.images[0].resolve(), case.label.resolve(), case.name])
    return path


def effseg(*arguments: object) -> None:
    """Run the command line as a user does."""
    subprocess.run([sys.executable, "-m", "effseg.cli", *map(str, arguments)], check=True)


def rounded(value: float | None) -> float | None:
    """Four digits say it all."""
    return None if value is None else round(value, 4)


if __name__ == "__main__":
    main()
