"""The recipes: what each changes, and how its label maps of unseen cases come to be."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe_table import DEFAULT, CaseRow

import effseg
from effseg.evaluation import Scores
from effseg.inference import find_images
from effseg.plans import Plan
from effseg.record import PLAN, RECORD, SCORES, WEIGHTS, RunRecord

MIB = 2**20


@dataclass(frozen=True)
class Bench:
    """A data set, cut in two, and how long each recipe may train on it.

    Attributes:
        name: of the data set.
        home: where its runs lie.
        minutes: of each training.
        seeds: that each recipe is trained from.
    """

    name: str
    home: Path
    minutes: float
    seeds: tuple[int, ...]

    @property
    def cases(self) -> Path:
        """The list of those that may be learnt from."""
        return self.home / "train.csv"

    @property
    def plan(self) -> Path:
        """As `effseg plan` makes it."""
        return self.home / PLAN

    def folder(self, recipe: str, seed: int) -> Path:
        """Of a recipe's run."""
        return self.home / "runs" / recipe.replace(" ", "_") / str(seed)


@dataclass(frozen=True)
class Trained:
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

    def seeds(self, bench: Bench) -> Sequence[int]:
        """All of them."""
        return bench.seeds

    def made(self, bench: Bench, seed: int) -> list[CaseRow]:
        """Train, label the unseen cases, score."""
        folder = bench.folder(self.name, seed)
        if not (folder / WEIGHTS).exists():
            plan = changed(json.loads(bench.plan.read_text()), self.changes)
            effseg.train(
                Plan.model_validate(plan),
                bench.cases,
                out=folder,
                minutes=bench.minutes,
                seed=seed,
            )
            effseg.validate(folder)
        return labelled([folder], bench, self.name, seed)


@dataclass(frozen=True)
class Mirrored:
    """The default's runs, that label each case and its mirror images."""

    name: str = "mirrored"
    why: str = "the default's own runs label the 8 mirror images of a case too"
    against: str = DEFAULT
    stage: int = 1

    def seeds(self, bench: Bench) -> Sequence[int]:
        """All of them."""
        return bench.seeds

    def made(self, bench: Bench, seed: int) -> list[CaseRow]:
        """Label and score."""
        return labelled([bench.folder(DEFAULT, seed)], bench, self.name, seed, tta=True)


@dataclass(frozen=True)
class Ensemble:
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


def labelled(
    runs: Sequence[Path], bench: Bench, name: str, seed: int, *, tta: bool = False
) -> list[CaseRow]:
    """What runs label together, scored case by case."""
    out = bench.home / "labelled" / name.replace(" ", "_") / str(seed)
    for case in find_images([bench.home / "images"]).values():
        effseg.predict(runs, case, out=out / f"{case.name}.nii.gz", device="cpu", tta=tta)
    scores = effseg.evaluate(out, bench.home / "labels", out=out / SCORES)
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


def _loss(name: str, why: str, **terms: Any) -> Trained:
    """A loss in place of the plan's: of its terms only those that are named count."""
    off = {"dice_weight": 0.0, "cross_entropy_weight": 0.0}
    return Trained(name, why, {"training": {"loss": off | terms}})


def _optimizer(name: str, why: str, **changes: Any) -> Trained:
    return Trained(name, why, {"training": {"optimizer": changes}})


def _augment(policy: str, why: str) -> Trained:
    name = f"augment {policy}"
    return Trained(name, why, {"training": {"augment": {"policy": policy}}})


ALL = (
    Trained(DEFAULT, "nothing: the plan as `effseg plan` makes it"),
    _loss("cross-entropy", "cross-entropy alone", cross_entropy_weight=1.0),
    _loss(
        "weighted cross-entropy",
        "cross-entropy, classes weighed by the inverse of their voxels",
        cross_entropy_weight=1.0,
        class_weights="voxel_shares",
    ),
    _loss("focal", "focal cross-entropy, gamma 2", cross_entropy_weight=1.0, focal_gamma=2.0),
    _loss(
        "balanced",
        "cross-entropy, balanced by the batches of late",
        cross_entropy_weight=1.0,
        balanced=True,
    ),
    _loss(
        "Dice + balanced",
        "Dice, and cross-entropy balanced by the batches of late",
        dice_weight=1.0,
        cross_entropy_weight=1.0,
        balanced=True,
    ),
    _loss("Dice", "Dice alone", dice_weight=1.0),
    _loss("squared Dice", "Dice of squared probabilities alone", squared_dice_weight=1.0),
    _loss("focal Dice", "(1 - Dice) ^ 0.75 alone", dice_weight=1.0, overlap_power=0.75),
    _loss("Jaccard", "Jaccard alone", jaccard_weight=1.0),
    _loss(
        "BCE + Jaccard",
        "a sigmoid for each class: binary cross-entropy and Jaccard",
        jaccard_weight=1.0,
        cross_entropy_weight=1.0,
        one_vs_rest=True,
    ),
    _loss("Tversky", "Tversky, 0.3 and 0.7, alone", tversky_weight=1.0),
    Trained(
        "cross-entropy, then both",
        "cross-entropy alone, and with Dice once that has not helped for 3 epochs",
        {
            "training": {
                "loss": {"dice_weight": 0.0},
                "loss_schedule": [{"loss": {}, "stalled_epochs": 3}],
            }
        },
    ),
    _optimizer(
        "SGD",
        "SGD with Nesterov's momentum 0.99, rate 1e-2",
        kind="sgd",
        momentum=0.99,
        learning_rate=1e-2,
    ),
    _optimizer("lookahead", "lookahead around AdamW, 5 steps, half the way", lookahead={}),
    _optimizer("poly", "the rate falls as (1 - share) ^ 0.9", schedule={"kind": "poly"}),
    _optimizer(
        "constant, then decay",
        "the full rate for half of the time, then straight to 0",
        schedule={"kind": "constant_then_decay"},
    ),
    _optimizer("no average", "the last weights, not their running mean", ema_decay=0.0),
    _augment("off", "patches as they are"),
    _augment("light", "fewer and smaller changes of patches"),
    _augment("strong", "more and larger changes of patches"),
    Trained(
        "stop by trend",
        "ends when a line through the validations' 1 - Jaccard no longer falls",
        {"training": {"stopping": {"kind": "trend"}}},
    ),
    Mirrored(),
    Ensemble(),
)
RECIPES = {recipe.name: recipe for recipe in ALL}
AGAINST = {recipe.name: recipe.against for recipe in ALL}
WHY = {recipe.name: recipe.why for recipe in ALL}
