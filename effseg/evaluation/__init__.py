"""How good predictions are: overlap, surface and lesion scores, per case and label, in mm."""

from effseg.evaluation.cases import evaluate_case
from effseg.evaluation.comparison import Change, Comparison, PairedRow, compare_scores
from effseg.evaluation.folders import CONVENTIONS, evaluate
from effseg.evaluation.intervals import Interval, mean_interval
from effseg.evaluation.margins import (
    MarginCounts,
    best_cuts,
    bins_of,
    labels_at,
    mean_defined,
    threshold_of,
)
from effseg.evaluation.scores import CaseScore, LabelScore, Lesion, LesionScore, Metric, Scores

__all__ = [
    "CONVENTIONS",
    "CaseScore",
    "Change",
    "Comparison",
    "Interval",
    "LabelScore",
    "Lesion",
    "LesionScore",
    "MarginCounts",
    "Metric",
    "PairedRow",
    "Scores",
    "best_cuts",
    "bins_of",
    "compare_scores",
    "evaluate",
    "evaluate_case",
    "labels_at",
    "mean_defined",
    "mean_interval",
    "threshold_of",
]
