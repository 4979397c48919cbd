"""What the cases that runs held out say: of their predictions, and of how these are best cut."""

from effseg.validation.held_out import score_test_set, validate
from effseg.validation.smallest import stricter
from effseg.validation.thresholds import LabelThreshold, Thresholds, choose_thresholds

__all__ = [
    "LabelThreshold",
    "Thresholds",
    "choose_thresholds",
    "score_test_set",
    "stricter",
    "validate",
]
