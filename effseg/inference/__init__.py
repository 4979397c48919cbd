"""Trained networks over new images."""

from effseg.inference.budget import Forecast
from effseg.inference.case_queue import CaseProgress, CaseResult
from effseg.inference.cases import predict_cases, shard_of
from effseg.inference.inputs import find_images
from effseg.inference.margins import write_margins
from effseg.inference.prediction import forecast, predict
from effseg.inference.predictor import Predictor
from effseg.inference.run import Run, load_run, load_runs, mirrored_axes

__all__ = [
    "CaseProgress",
    "CaseResult",
    "Forecast",
    "Predictor",
    "Run",
    "find_images",
    "forecast",
    "load_run",
    "load_runs",
    "mirrored_axes",
    "predict",
    "predict_cases",
    "shard_of",
    "write_margins",
]
