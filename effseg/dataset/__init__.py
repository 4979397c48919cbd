"""Data sets taken as they lie: cases, layouts, audit, folds, the nine sets of a split."""

from effseg.dataset.cases import Case, Dataset, case_and_channel, read_case, read_image, read_label
from effseg.dataset.findings import AuditReport, Finding, audit
from effseg.dataset.layouts import read_dataset
from effseg.dataset.nine_way import (
    NineWaySplit,
    ThreeSets,
    check_leaks,
    check_there,
    share_annotated,
    split_nine_ways,
)
from effseg.dataset.splits import Fold, folds

__all__ = [
    "AuditReport",
    "Case",
    "Dataset",
    "Finding",
    "Fold",
    "NineWaySplit",
    "ThreeSets",
    "audit",
    "case_and_channel",
    "check_leaks",
    "check_there",
    "folds",
    "read_case",
    "read_dataset",
    "read_image",
    "read_label",
    "share_annotated",
    "split_nine_ways",
]
