"""Training as planned."""

from effseg.training.callbacks import TrainingState
from effseg.training.fit import choose_fold, train

__all__ = ["TrainingState", "choose_fold", "train"]
