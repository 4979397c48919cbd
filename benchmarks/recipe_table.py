"""What recipes come to: paired differences from the plan's own, with intervals."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from result_rows import append_rows

from effseg.types import FloatArray

HERE = Path(__file__).parent
CASES = HERE / "results" / "recipes.csv"
PAGE = HERE.parent / "docs" / "recipes.md"
DEFAULT = "default"
"""The plan as `effseg plan` makes it: what others are held against."""
N_DRAWS = 10_000
LEVEL = 95


@dataclass(frozen=True)
class CaseRow:
    """What a recipe and a seed came to on one unseen case.

    Attributes:
        dataset: its name.
        recipe: its name.
        seed: of weights and patches.
        case: its name.
        dice: the mean over the labels; empty references and predictions are left out.
        minutes: of training, of this seed.
        steps: that were taken.
        peak_mib: of training, measured.
        planned_minutes: that training was given.
    """

    dataset: str
    recipe: str
    seed: int
    case: str
    dice: float
    minutes: float
    steps: int
    peak_mib: float
    planned_minutes: float


@dataclass(frozen=True)
class Outcome:
    """A recipe on a data set, beside what it is held against.

    Attributes:
        recipe: its name.
        against: the other's.
        n_seeds: of the recipe.
        n_cases: that both have.
        dice: mean over seeds and cases.
        difference: of the means over seeds, mean over cases, in Dice points (hundredths).
        low: end of its interval.
        high: likewise.
        minutes: of training, mean over seeds.
        steps: likewise.
        peak_mib: the largest.
    """

    recipe: str
    against: str
    n_seeds: int
    n_cases: int
    dice: float
    difference: float
    low: float
    high: float
    minutes: float
    steps: float
    peak_mib: float

    @property
    def verdict(self) -> str:
        """In words: an interval that holds 0 shows nothing either way."""
        if self.recipe == self.against:
            return "the plan's own"
        if self.low > 0:
            return "helps"
        return "hurts" if self.high < 0 else "no difference shown"


def outcomes(rows: Sequence[CaseRow], against: dict[str, str]) -> Iterator[Outcome]:
    """Each recipe of one data set and length beside another, in the order of `against`.

    The interval is a bootstrap's (Efron 1979): seeds and cases are drawn anew, with replacement,
    and the same draw of cases serves both recipes. Seeds are paired where both recipes have the
    same ones, else drawn for each.

    Args:
        rows: of one data set and length.
        against: for each recipe, what it is held against; those without rows are left out.
    """
    by_recipe: dict[str, dict[int, dict[str, CaseRow]]] = {}
    for row in rows:
        by_recipe.setdefault(row.recipe, {}).setdefault(row.seed, {})[row.case] = row
    for recipe, other in against.items():
        if recipe not in by_recipe or other not in by_recipe:
            continue
        mine, theirs = by_recipe[recipe], by_recipe[other]
        cases = sorted(
            set.intersection(*(set(seed) for seed in (*mine.values(), *theirs.values())))
        )
        a, b = (_dice(seeds, cases) for seeds in (mine, theirs))
        low, high = _interval(a, b, paired=mine.keys() == theirs.keys())
        firsts = [next(iter(seed.values())) for seed in mine.values()]
        yield Outcome(
            recipe=recipe,
            against=other,
            n_seeds=len(mine),
            n_cases=len(cases),
            dice=float(a.mean()),
            difference=100 * float(a.mean() - b.mean()),
            low=low,
            high=high,
            minutes=float(np.mean([row.minutes for row in firsts])),
            steps=float(np.mean([row.steps for row in firsts])),
            peak_mib=max(row.peak_mib for row in firsts),
        )


def _dice(seeds: dict[int, dict[str, CaseRow]], cases: Sequence[str]) -> FloatArray:
    """(seeds, cases), seeds in their order."""
    return np.array([[seeds[seed][case].dice for case in cases] for seed in sorted(seeds)])


def _interval(a: FloatArray, b: FloatArray, *, paired: bool) -> tuple[float, float]:
    """Of 100 x (mean of a - mean of b); (seeds, cases) each."""
    rng = np.random.default_rng(0)
    n_cases = a.shape[1]
    found: NDArray[np.float64] = np.empty(N_DRAWS)
    for i in range(N_DRAWS):
        cases = rng.integers(n_cases, size=n_cases)
        seeds = rng.integers(len(a), size=len(a))
        others = seeds if paired else rng.integers(len(b), size=len(b))
        found[i] = a[seeds][:, cases].mean() - b[others][:, cases].mean()
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(100 * found, (tail, 100 - tail))
    return float(low), float(high)


def as_markdown(rows: Sequence[CaseRow], against: dict[str, str], why: dict[str, str]) -> str:
    """The page: a table for each data set."""
    lines = [
        "# What helps",
        "",
        "Each row changes one thing of the plan that `effseg plan` makes, and is trained for the",
        "same minutes on one core, from several seeds, on the same cases; Dice is that of cases",
        "that were held out. A difference is in Dice points (hundredths) from the row it is held",
        f"against, with its {LEVEL} % interval over seeds and cases. As measured, whichever way it",
        "came out; `python benchmarks/recipes.py` makes the numbers.",
    ]
    for (dataset, minutes), group in groupby(sorted(rows, key=_bench), key=_bench):
        lines += [
            "",
            f"## {dataset}, {minutes:g} minutes",
            "",
            "| recipe | against | seeds | Dice | difference | interval | minutes | steps | MiB | |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for found in outcomes(list(group), against):
            difference = interval = ""
            if found.recipe != found.against:
                difference = f"{found.difference:+.2f}"
                interval = f"{found.low:+.2f} to {found.high:+.2f}"
            lines.append(
                f"| {found.recipe} | {'' if found.recipe == found.against else found.against} "
                f"| {found.n_seeds} | {found.dice:.4f} | {difference} | {interval} "
                f"| {found.minutes:.2f} | {found.steps:.0f} | {found.peak_mib:.0f} "
                f"| {found.verdict} |"
            )
    lines += ["", "## The recipes", "", "| recipe | what it changes |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in why.items()]
    return "\n".join(lines) + "\n"


def _bench(row: CaseRow) -> tuple[str, float]:
    return row.dataset, row.planned_minutes


def read_cases(path: Path) -> list[CaseRow]:
    """What is known; nothing where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            CaseRow(**{f.name: f.type(line[f.name]) for f in fields(CaseRow)})  # type: ignore[operator, misc]
            for line in csv.DictReader(file)
        ]


def write_cases(path: Path, rows: Sequence[CaseRow]) -> None:
    """Append, all at once."""
    append_rows(path, [asdict(row) for row in rows])
