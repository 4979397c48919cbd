"""Does it help? One change of the plan at a time, for equal minutes, on unseen cases of real data.

    python benchmarks/recipes.py FOLDER [FOLDER ...] --out SCRATCH --minutes 3 --nodules 100
    python benchmarks/recipes.py --table

Of each data set a share of the cases is held out before anything looks at them, as `real_data.py`
does, and one plan is made; `--nodules` renders volumes of nodules as `make demo` does, for one
data set more. Each recipe (`recipe_rows.py`) changes something of that plan, trains
from several seeds for the same minutes, one core each, as many at once as the machine has cores,
and labels the held-out cases. What is known of a recipe, minutes and a seed is written down case by
case in `results/recipes.csv` as soon as it is known, and is not run again: stop it at any time, and
go on with the same command. `--table` prints what they come to (`recipe_table.py`), and writes
`docs/recipes.md`.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue

import torch
from real_data import hold_out
from recipe_rows import AGAINST, RECIPES, WHY
from recipe_runs import Bench, changed
from recipe_table import CASES, PAGE, as_markdown, read_cases, write_cases

import effseg
from effseg.cli.adversarial import planned_pair
from effseg.dataset import read_dataset, share_annotated, split_nine_ways
from effseg.plans import Plan

SEEDS = (0, 1, 2)
HELD_OUT = 0.3
FEW_SHARE = 0.1
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "nodules"
NODULES = "rendered-nodules"
EPOCHS = {"training": {"steps_per_epoch": 10, "validation_patches": 16}}
"""So short that the minutes hold epochs enough to follow a score by."""


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("datasets", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, help="a folder for the runs, kept from call to call")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at once, a core each"
    )
    parser.add_argument("--table", action="store_true", help="only print what is known")
    parser.add_argument(
        "--one", nargs=3, metavar=("RECIPE", "SEED", "CORE"), help=argparse.SUPPRESS
    )
    parser.add_argument("--nodules", type=int, help="volumes to render as one more data set")
    options = parser.parse_args()
    if not options.table and (
        options.out is None or not (options.datasets or options.nodules is not None)
    ):
        parser.error("name data sets and --out, or --table")
    if options.nodules is not None:
        options.datasets.append(rendered(options.out / NODULES, options.nodules))
    benches = [
        Bench(
            source=folder.absolute(),
            home=options.out.absolute() / "benches" / folder.name,
            minutes=options.minutes,
            seeds=tuple(options.seeds),
        )
        for folder in options.datasets
    ]
    if options.one is not None:
        (bench,) = benches
        recipe, seed, core = options.one
        os.sched_setaffinity(0, {int(core)})
        write_cases(CASES, RECIPES[recipe].made(bench, int(seed)))
        return
    if not options.table:
        torch.set_num_threads(1)  # a run has one core, and a plan counts on the cores it sees
        for bench in benches:
            set_up(bench, memory=options.memory)
        run_missing(benches, options.recipes, jobs=options.jobs)
    page = as_markdown(read_cases(CASES), AGAINST, WHY)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    print(page)


def rendered(folder: Path, n_volumes: int) -> Path:
    """Volumes around real outlines of nodules, rendered once."""
    sys.path.append(str(EXAMPLE))
    lidc, render = import_module("lidc"), import_module("render")
    if not folder.exists():
        render.render_dataset(
            folder,
            lidc.find_database(),
            n_train=n_volumes,
            n_test=0,
            seed=0,
            min_diameter_mm=8.0,  # as the demo
        )
    return folder


def set_up(bench: Bench, *, memory: str) -> None:
    """Hold cases out and plan for the others, once."""
    if bench.plan.exists():
        return
    learnt = hold_out(read_dataset(bench.source), bench.home, share=HELD_OUT, seed=0)
    few, rest = share_annotated(learnt, FEW_SHARE, seed=0)
    split = split_nine_ways(few, rest, dataset=learnt.name)
    split.save(bench.split)
    pair = planned_pair(learnt, split, memory, device="cpu")
    for plan, path in (
        (pair, bench.pair_plan),
        (effseg.plan(learnt, memory=memory, device="cpu"), bench.plan),
    ):
        Plan.model_validate(changed(plan.model_dump(mode="json"), EPOCHS)).save(path)


def run_missing(benches: Sequence[Bench], recipes: Sequence[str], *, jobs: int) -> None:
    """Each recipe and seed that is not known yet, those that others need first."""
    known = {(row.dataset, row.planned_minutes, row.recipe, row.seed) for row in read_cases(CASES)}
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[:jobs]:
        cores.put(core)

    def run(bench: Bench, recipe: str, seed: int) -> None:
        core = cores.get()
        try:
            command = [sys.executable, __file__, str(bench.source)]
            command += ["--out", str(bench.home.parent.parent), "--minutes", str(bench.minutes)]
            command += ["--seeds", *map(str, bench.seeds)]
            command += ["--one", recipe, str(seed), str(core)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environment, check=True)
            print(f"{bench.name}: {recipe}, seed {seed}", flush=True)
        finally:
            cores.put(core)

    for stage in sorted({RECIPES[name].stage for name in recipes}):
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [
                pool.submit(run, bench, name, seed)
                for bench in benches
                for name in recipes
                for seed in RECIPES[name].seeds(bench)
                if RECIPES[name].stage == stage
                and (bench.name, bench.minutes, name, seed) not in known
            ]
        for one in waiting:
            one.result()


if __name__ == "__main__":
    main()
