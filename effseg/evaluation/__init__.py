"""How good predictions are: overlap, surface and lesion scores, per case and label, in mm."""

from effseg.evaluation.cases import evaluate_case
from effseg.evaluation.folders import CONVENTIONS, evaluate
from effseg.evaluation.scores import CaseScore, LabelScore, Lesion, LesionScore, Metric, Scores

__all__ = [
    "CONVENTIONS",
    "CaseScore",
    "LabelScore",
    "Lesion",
    "LesionScore",
    "Metric",
    "Scores",
    "evaluate",
    "evaluate_case",
]
