"""Training as planned."""

from effseg.training.callbacks import TrainingState
from effseg.training.fit import choose_fold, find_learning_rate, train
from effseg.training.rates import LearningRates

__all__ = ["LearningRates", "TrainingState", "choose_fold", "find_learning_rate", "train"]
