"""The kinds of recipes: how what is changed gets trained, and its label maps of unseen cases."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipe_table import DEFAULT, CaseRow

import effseg
from effseg.cli.splitting import annotated_part
from effseg.dataset import NineWaySplit, read_dataset
from effseg.evaluation import Scores
from effseg.inference import find_images, load_runs
from effseg.plans import Plan
from effseg.record import PLAN, RECORD, SCORES, SPLIT, WEIGHTS, RunRecord

MIB = 2**20


@dataclass(frozen=True)
class Bench:
    """A data set, cut in two, and how long each recipe may train on it.

    Attributes:
        source: the data set's folder.
        home: where its runs lie, and in `images` and `labels` what is held out of them.
        minutes: of each training.
        seeds: that each recipe is trained from.
    """

    source: Path
    home: Path
    minutes: float
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.source.name

    @property
    def plan(self) -> Path:
        """As `effseg plan` makes it."""
        return self.home / PLAN

    @property
    def split(self) -> Path:
        """The nine sets, of few labels."""
        return self.home / SPLIT

    @property
    def pair_plan(self) -> Path:
        """Of few labels, with room for a discriminator."""
        return self.home / "pair.json"

    def learnt(self) -> effseg.Dataset:
        """The cases that may be learnt from."""
        held_out = find_images([self.home / "images"])
        dataset = read_dataset(self.source)
        return replace(dataset, cases=tuple(c for c in dataset.cases if c.name not in held_out))

    def folder(self, recipe: str, seed: int) -> Path:
        """Of a recipe's run."""
        return self.home / f"{self.minutes:g}_minutes" / recipe.replace(" ", "_") / str(seed)


class Recipe:
    """What all kinds share."""

    name: str

    def seeds(self, bench: Bench) -> Sequence[int]:
        """All of them."""
        return bench.seeds


class TrainedRecipe(Recipe):
    """One that has runs of its own."""

    def made(self, bench: Bench, seed: int) -> list[CaseRow]:
        """Train, label the unseen cases, score."""
        folder = bench.folder(self.name, seed)
        if not (folder / WEIGHTS).exists():
            self.train(bench, seed, folder)
            judge_small(folder)
        return labelled([folder], bench, self.name, seed)

    def train(self, bench: Bench, seed: int, out: Path) -> None:
        """Fill the run's folder."""
        raise NotImplementedError


@dataclass(frozen=True)
class Trained(TrainedRecipe):
    """The plan with something changed, trained.

    Attributes:
        name: of the recipe.
        why: what it changes, in words.
        changes: of the plan's JSON, nested as it is.
        against: the recipe that it is held against.
        stage: recipes of an earlier stage are run first.
    """

    name: str
    why: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    against: str = DEFAULT
    stage: int = 0

    def train(self, bench: Bench, seed: int, out: Path) -> None:
        """Fill the run's folder."""
        plan = changed(json.loads(bench.plan.read_text()), self.changes)
        effseg.train(
            Plan.model_validate(plan),
            bench.learnt(),
            out=out,
            minutes=bench.minutes,
            seed=seed,
        )


@dataclass(frozen=True)
class Mirrored(Recipe):
    """The default's runs, that label each case and its mirror images."""

    name: str = "mirrored"
    why: str = "the default's own runs label a case's mirror images too"
    against: str = DEFAULT
    stage: int = 1

    def made(self, bench: Bench, seed: int) -> list[CaseRow]:
        """Label and score."""
        return labelled([bench.folder(DEFAULT, seed)], bench, self.name, seed, tta=True)


@dataclass(frozen=True)
class Ensemble(Recipe):
    """The default's runs of all seeds together."""

    name: str = "ensemble"
    why: str = "the default's runs of all seeds label a case together"
    against: str = DEFAULT
    stage: int = 1

    def seeds(self, bench: Bench) -> Sequence[int]:
        """There is one ensemble; it goes by the first seed."""
        return bench.seeds[:1]

    def made(self, bench: Bench, seed: int) -> list[CaseRow]:
        """Label and score."""
        runs = [bench.folder(DEFAULT, one) for one in bench.seeds]
        return labelled(runs, bench, self.name, seed)


@dataclass(frozen=True)
class Student(TrainedRecipe):
    """One network of the ensemble's knowledge."""

    name: str = "student"
    why: str = "learns from the labels and from what the default's runs of all seeds say together"
    against: str = DEFAULT
    stage: int = 1

    def train(self, bench: Bench, seed: int, out: Path) -> None:
        """Fill the run's folder."""
        effseg.distill(
            [bench.folder(DEFAULT, one) for one in bench.seeds],
            bench.learnt(),
            out=out,
            plan=bench.plan,
            minutes=bench.minutes,
            seed=seed,
        )


@dataclass(frozen=True)
class FewLabels(TrainedRecipe):
    """Trained as if few of the cases had labels, with the others as scans or without them.

    Attributes:
        name: of the recipe.
        why: what it does, in words.
        adversarial: whether a discriminator makes use of the scans without labels.
        against: the recipe that it is held against.
        stage: recipes of an earlier stage are run first.
    """

    name: str
    why: str
    adversarial: bool
    against: str
    stage: int = 0

    def train(self, bench: Bench, seed: int, out: Path) -> None:
        """Fill the run's folder."""
        learnt, split = bench.learnt(), NineWaySplit.load(bench.split)
        if self.adversarial:
            effseg.train_adversarially(
                bench.pair_plan,
                learnt,
                split=split,
                out=out,
                minutes=bench.minutes,
                seed=seed,
            )
        else:
            effseg.train(
                bench.pair_plan,
                annotated_part(learnt, split),
                split=split,
                out=out,
                minutes=bench.minutes,
                seed=seed,
            )


def judge_small(run: Path) -> None:
    """Where small components are dropped, let the validation cases say how small."""
    if Plan.load(run / PLAN).inference.postprocess.minimum_mm3 > 0:
        effseg.validate(run)


def labelled(
    runs: Sequence[Path], bench: Bench, name: str, seed: int, *, tta: bool = False
) -> list[CaseRow]:
    """What runs label together, scored case by case."""
    folder = bench.folder(name, seed)
    out = folder.with_name(f"{folder.name}_labelled")
    loaded = load_runs(runs)
    for case in find_images([bench.home / "images"]).values():
        effseg.predict(loaded, case, out=out / f"{case.name}.nii.gz", device="cpu", tta=tta)
    plan = Plan.load(bench.plan)
    scores = effseg.evaluate(
        out,
        bench.home / "labels",
        labels={label.value: label.name for label in plan.labels},
        ignore_label=plan.ignore_label,
        out=out / SCORES,
    )
    records = [RunRecord.load(run / RECORD) for run in runs]
    return [
        CaseRow(
            dataset=bench.name,
            recipe=name,
            seed=seed,
            case=case,
            dice=round(dice, 5),
            minutes=round(sum(record.minutes or 0 for record in records), 3),
            steps=sum(record.steps or 0 for record in records),
            peak_mib=round(max(_peak_bytes(record) for record in records) / MIB, 1),
            planned_minutes=bench.minutes,
        )
        for case, dice in case_dice(scores).items()
    ]


def _peak_bytes(record: RunRecord) -> int:
    assert record.memory is not None
    return record.memory.measured_peak_bytes or 0


def case_dice(scores: Scores) -> dict[str, float]:
    """Of each case the mean over its labels; a case of which no label has one is left out."""
    found = {case.case: case.mean("dice") for case in scores.cases}
    return {name: dice for name, dice in found.items() if dice is not None}


def changed(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's JSON with some values replaced, wherever they are nested."""
    result = dict(content)
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(name), dict):
            value = changed(result[name], value)
        result[name] = value
    return result
