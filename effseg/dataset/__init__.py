"""Data sets taken as they lie: cases, the layouts they come in, their audit, their folds."""

from effseg.dataset.cases import Case, Dataset, case_and_channel, read_case, read_image, read_label
from effseg.dataset.findings import AuditReport, Finding, audit
from effseg.dataset.layouts import read_dataset
from effseg.dataset.splits import Fold, folds

__all__ = [
    "AuditReport",
    "Case",
    "Dataset",
    "Finding",
    "Fold",
    "audit",
    "case_and_channel",
    "folds",
    "read_case",
    "read_dataset",
    "read_image",
    "read_label",
]
