"""The recipes: what each changes of the plan that `effseg plan` makes."""

from typing import Any

from recipe_runs import Ensemble, FewLabels, Mirrored, Student, Trained
from recipe_table import DEFAULT

FEW = "few labels"


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
    _loss(
        "squared Dice + cross-entropy",
        "Dice of squared probabilities, and cross-entropy",
        squared_dice_weight=1.0,
        cross_entropy_weight=1.0,
    ),
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
    _optimizer("higher rate", "AdamW's rate 5e-3", learning_rate=5e-3),
    _optimizer("lower rate", "AdamW's rate 7e-4", learning_rate=7e-4),
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
    Student(),
    FewLabels(
        FEW,
        "a tenth of the cases have labels; the others are not there",
        adversarial=False,
        against=DEFAULT,
    ),
    FewLabels(
        "few labels, adversarial",
        "the same tenth; the others' scans are there, and a discriminator",
        adversarial=True,
        against=FEW,
    ),
)
RECIPES = {recipe.name: recipe for recipe in ALL}
AGAINST = {recipe.name: recipe.against for recipe in ALL}
WHY = {recipe.name: recipe.why for recipe in ALL}
