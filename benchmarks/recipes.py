"""Does it help? One change of the plan at a time, for equal minutes, on unseen cases of real data.

    python benchmarks/recipes.py FOLDER [FOLDER ...] --out SCRATCH --minutes 2
    python benchmarks/recipes.py --table

Of each data set a share of the cases is held out before anything looks at them, as `real_data.py`
does, and one plan is made. Each recipe (`recipe_rows.py`) changes something of that plan, trains
from several seeds for the same minutes, one core each, as many at once as the machine has cores,
and labels the held-out cases. What is known of a recipe and a seed is written down case by case in
`results/recipes.csv` as soon as it is known, and is not run again: stop it at any time, and go on
with the same command. `--table` prints what they come to (`recipe_table.py`), and writes
`docs/recipes.md`.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from real_data import hold_out
from recipe_rows import AGAINST, RECIPES, WHY, Bench, changed
from recipe_table import CASES, PAGE, as_markdown, read_cases, write_cases

import effseg
from effseg.dataset import read_dataset
from effseg.plans import Plan

SEEDS = (0, 1, 2)
HELD_OUT = 0.3
EPOCH_STEPS = 10
"""So few that the minutes hold epochs enough to follow a score by."""


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
    options = parser.parse_args()
    if not options.table and (options.out is None or not options.datasets):
        parser.error("name data sets and --out, or --table")
    benches = [
        Bench(
            name=folder.name,
            home=options.out.absolute() / folder.name,
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
        for folder, bench in zip(options.datasets, benches, strict=True):
            set_up(folder, bench, memory=options.memory)
        run_missing(benches, options.recipes, jobs=options.jobs)
    page = as_markdown(read_cases(CASES), AGAINST, WHY)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    print(page)


def set_up(folder: Path, bench: Bench, *, memory: str) -> None:
    """Hold cases out and plan for the others, once."""
    if bench.plan.exists():
        return
    listed = hold_out(read_dataset(folder), bench.home, share=HELD_OUT, seed=0)
    listed.rename(bench.cases)
    plan = effseg.plan(bench.cases, memory=memory, device="cpu")
    epochs = {"training": {"steps_per_epoch": EPOCH_STEPS}}
    Plan.model_validate(changed(plan.model_dump(mode="json"), epochs)).save(bench.plan)


def run_missing(benches: Sequence[Bench], recipes: Sequence[str], *, jobs: int) -> None:
    """Each recipe and seed that is not known yet, those that others need first."""
    known = {(row.dataset, row.recipe, row.seed) for row in read_cases(CASES)}
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[:jobs]:
        cores.put(core)

    def run(bench: Bench, recipe: str, seed: int) -> None:
        core = cores.get()
        try:
            command = [sys.executable, __file__, bench.name, "--out", str(bench.home.parent)]
            command += ["--minutes", str(bench.minutes), "--seeds", *map(str, bench.seeds)]
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
                if RECIPES[name].stage == stage and (bench.name, name, seed) not in known
            ]
        for one in waiting:
            one.result()


if __name__ == "__main__":
    main()
