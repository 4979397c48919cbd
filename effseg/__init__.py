"""effseg trains and runs 3-D segmentation networks inside a memory budget that you name.

The names below are loaded when they are first used, so that `import effseg` costs nothing beyond
Python itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Case": "dataset",
    "CheckpointError": "errors",
    "DataError": "errors",
    "Dataset": "dataset",
    "EffsegError": "errors",
    "GeometryError": "errors",
    "Grid": "volume",
    "MemoryBudgetError": "errors",
    "Plan": "plans",
    "PlanError": "errors",
    "Predictor": "inference",
    "TrainingState": "training",
    "Volume": "volume",
    "audit": "dataset",
    "choose_thresholds": "validation",
    "compare_scores": "evaluation",
    "distill": "training",
    "evaluate": "evaluation",
    "find_learning_rate": "training",
    "find_suspects": "suspects",
    "fingerprint": "planner",
    "plan": "planner",
    "predict": "inference",
    "read_dataset": "dataset",
    "read_volume": "io",
    "resample_like": "resample",
    "resample_to_spacing": "resample",
    "score_test_set": "validation",
    "split_nine_ways": "dataset",
    "train": "training",
    "train_adversarially": "training",
    "tune": "planner",
    "validate": "validation",
    "write_report": "report",
    "write_volume": "io",
}

__all__ = [
    "Case",
    "CheckpointError",
    "DataError",
    "Dataset",
    "EffsegError",
    "GeometryError",
    "Grid",
    "MemoryBudgetError",
    "Plan",
    "PlanError",
    "Predictor",
    "TrainingState",
    "Volume",
    "__version__",
    "audit",
    "choose_thresholds",
    "compare_scores",
    "distill",
    "evaluate",
    "find_learning_rate",
    "find_suspects",
    "fingerprint",
    "plan",
    "predict",
    "read_dataset",
    "read_volume",
    "resample_like",
    "resample_to_spacing",
    "score_test_set",
    "split_nine_ways",
    "train",
    "train_adversarially",
    "tune",
    "validate",
    "write_report",
    "write_volume",
]

if TYPE_CHECKING:
    from effseg.dataset import Case, Dataset, audit, read_dataset, split_nine_ways
    from effseg.errors import (
        CheckpointError,
        DataError,
        EffsegError,
        GeometryError,
        MemoryBudgetError,
        PlanError,
    )
    from effseg.evaluation import compare_scores, evaluate
    from effseg.inference import Predictor, predict
    from effseg.io import read_volume, write_volume
    from effseg.planner import fingerprint, plan, tune
    from effseg.plans import Plan
    from effseg.report import write_report
    from effseg.resample import resample_like, resample_to_spacing
    from effseg.suspects import find_suspects
    from effseg.training import (
        TrainingState,
        distill,
        find_learning_rate,
        train,
        train_adversarially,
    )
    from effseg.validation import choose_thresholds, score_test_set, validate
    from effseg.volume import Grid, Volume


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effseg' has no attribute {name!r}")
    value = getattr(import_module(f"effseg.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
