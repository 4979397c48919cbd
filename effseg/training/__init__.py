"""Training as planned."""

from effseg.training.adversarial import train_adversarially
from effseg.training.callbacks import TrainingState
from effseg.training.choices import choose_fold
from effseg.training.contest import ContestState
from effseg.training.distillation import distill
from effseg.training.external import parse_external
from effseg.training.fit import find_learning_rate, train
from effseg.training.pair_memory import plan_pair
from effseg.training.rates import LearningRates

__all__ = [
    "ContestState",
    "LearningRates",
    "TrainingState",
    "choose_fold",
    "distill",
    "find_learning_rate",
    "parse_external",
    "plan_pair",
    "train",
    "train_adversarially",
]
