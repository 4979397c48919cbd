"""The inference suite measures what it says, on sizes that take no time."""

import csv
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filled import filled

from effseg.memory import mapped_blocks
from effseg.resample import logits_to_labels
from effseg.volume import Grid

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
cases: Any = import_module("inference_cases")
suite: Any = import_module("bench_inference")

MIB = 2**20
TINY = cases.Case(n_classes=5, shape=(14, 9, 8), window=(6, 6, 6))


def test_a_peak_is_what_the_call_holds_at_once() -> None:
    def call() -> np.ndarray:
        filled(24 * MIB).sum()
        return filled(48 * MIB)

    found = cases.measured(call)
    assert 48 * MIB <= found.peak_bytes < 56 * MIB
    assert found.seconds > 0


def test_a_fresh_process_is_another_one_and_is_asked_once() -> None:
    there = suite.fresh(os.getpid)
    assert there != os.getpid()
    assert suite.fresh(os.getpid) == there


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        replace(TINY, n_features=3),
        replace(TINY, n_features=3, features=True),
        replace(TINY, n_features=3, on_disk=True),
    ],
)
def test_every_case_runs(case) -> None:
    assert cases.blend("effseg", case).seconds > 0
    if case.on_disk:
        assert cases.by_effseg(case, case.network(), case.image()) is None
    else:
        assert cases.by_effseg(case, case.network(), case.image()).shape == case.shape


def test_features_are_blended_whatever_the_number_of_classes() -> None:
    many = replace(TINY, n_features=3, features=True)
    few = replace(many, n_classes=2)
    assert cases.by_effseg(many, many.network(), many.image()).max() > 1
    assert cases.by_effseg(few, few.network(), few.image()).max() == 1
    assert torch.equal(many.network()[0].weight, few.network()[0].weight)


@pytest.mark.parametrize("tool", ["monai", "torchio", "konfai"])
def test_tools_label_the_same_image_alike(tool: str) -> None:
    pytest.importorskip(tool)
    case = replace(TINY, shape=(18, 17, 16))
    network, image = case.network(), case.image()
    ours, theirs = (cases.BLENDERS[one](case, network, image) for one in ("effseg", tool))
    assert ours.dtype == theirs.dtype == np.uint8
    assert ours.shape == theirs.shape
    assert (ours == theirs).mean() > 0.9  # their windows lie elsewhere, their weights differ


def test_tools_are_timed_in_turns() -> None:
    case = replace(TINY, shape=(18, 18, 18))
    seconds = cases.blend_in_turns(("effseg", "monai"), case, 2)
    assert [len(of_tool) for of_tool in seconds] == [2, 2]


@pytest.mark.parametrize("n_features", [None, 2])
def test_labels_are_counted_against_logits_of_the_whole(n_features: int | None) -> None:
    case = replace(TINY, n_features=n_features)
    found = cases.against_in_memory(case, 2)
    assert found.n_different == 0
    logits = cases.in_memory([case.network(0), case.network(1)], case.image(), case)
    labels = logits.argmax(0).numpy().astype(np.uint8)
    place = np.unravel_index(int((logits.topk(2, 0)[0].diff(dim=0)).argmin()), case.shape)
    labels[place] += 1
    again = cases.compared(labels, logits)
    assert (again.n_different, again.n_ties) == (1, found.n_ties)
    assert cases.compared(labels, torch.zeros_like(logits)).n_ties == labels.size


def test_exports_lie_on_one_grid() -> None:
    found = cases.export("effseg", 3, 8, 12)
    assert found.n_different == 0
    assert found.n_ties < 5
    logits = np.random.default_rng(1).standard_normal((3, 8, 8, 8), dtype=np.float32)
    reference = cases.interpolated(logits, (12, 12, 12))
    theirs = cases.compared(cases.zoomed_labels(logits, (12, 12, 12)), reference)
    assert theirs.n_different == 0
    off = logits_to_labels(logits, Grid((8,) * 3), Grid((12,) * 3, spacing=(2 / 3,) * 3))
    assert cases.compared(off.array, reference).n_different > 50  # where the corner is not moved
    assert cases.export("nnU-Net", 3, 8, 12).seconds > 0


def test_a_run_labels_an_image_of_many_classes() -> None:
    with mapped_blocks():  # what earlier tests left on the heap is given back before
        found = cases.whole_body((20, 24, 24), 30, 16, 1.5, (1.0, 0.75, 0.75))
    assert found.predicted_bytes > 0
    assert found.process_bytes > found.peak_bytes > 0


def test_components_stream_a_map_of_bricks() -> None:
    slabs = list(cases.brick_slabs((45, 20, 50), 118, 16))
    assert [len(slab) for slab in slabs] == [16, 16, 13]
    labels = np.concatenate(slabs)
    assert labels.shape == (45, 20, 50)
    assert labels.max() <= 118
    assert (labels[:20, :16, :16] == labels[0, 0, 0]).all()
    assert cases.streamed_components((45, 40, 50), 118, 16).seconds > 0


def test_rows_are_worked_out_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(function: Any, *arguments: Any) -> Any:
        match function.__name__, arguments:
            case "blend_again", (_, case):
                return cases.Measured(peak_bytes=MIB * (5 * case.shape[0] - 20), seconds=3.0)
            case "blend", (_, case):
                return cases.Measured(peak_bytes=4 * MIB * case.shape[0], seconds=2.0)
            case "export", (tool, *_):
                return cases.Measured(3 * MIB, 6.0 if tool == "nnU-Net" else 1.5, 7, 9)
            case "blend_in_turns", _:
                return [[2.0, 3.0, 9.0], [4.0, 1.0, 6.0]]
            case "best_seconds", (by, _):
                return 2e-6 if by.__name__ == "by_stream" else 1e-6
            case "streamed_components", _:
                return cases.Measured(peak_bytes=6000, seconds=1.0)
            case "whole_body", _:
                return cases.Measured(
                    peak_bytes=90, predicted_bytes=100, process_bytes=3 * 2**30, seconds=1.0
                )
        raise AssertionError(function)

    monkeypatch.setattr(suite, "fresh", fresh)
    row = suite.blended(TINY, at_most=0.5)
    assert row.value == 4 * MIB * 14 / (5 * 14 * 9 * 8)
    assert row.cells()["met"] == "no"
    assert row.cells()["note"] == "56 MiB"
    long = replace(TINY, shape=(28, 9, 8))
    ratio = suite.peak_ratio(long, TINY, at_most=2.5).cells()  # 112 or 120 over 56 or 50 MiB
    assert (ratio["value"], ratio["note"], ratio["met"]) == (2.24, "112 over 50 MiB", "yes")
    assert suite.export_bytes(4, 8, 16).value == 3 * MIB / (4 * 16**3)
    assert suite.export_speed(4, 8, 16).value == 4.0
    assert suite.export_labels(4, 8, 16).cells() == {
        "value": 7.0,
        "unit": "labels",
        "goal": "<= 0",
        "met": "no",
        "seconds": "",
        "note": "9 of 4096 voxels are ties",
    }
    assert suite.time_over_monai(TINY, rounds=3).value == 0.75
    speed = suite.component_speed(lambda: np.zeros((10, 10, 10)))
    assert speed.value == pytest.approx(500)
    assert speed.cells()["goal"] == ">= 150"
    assert suite.component_memory((20, 10, 10), 3, 5).value == 12
    assert suite.whole_body_memory().value == 3.0
    forecast = suite.whole_body_forecast().cells()
    assert (forecast["value"], forecast["goal"], forecast["met"]) == (
        0.9,
        ">= 0.85, <= 1.15",
        "yes",
    )
    assert suite.blended(TINY).cells()["goal"] == suite.blended(TINY).cells()["met"] == ""


def test_rows_are_written(tmp_path: Path) -> None:
    rows = {"one": suite.Row(1.25, "x", at_most=2), "two": suite.Row(1234.5, "MiB", note="a, b")}
    suite.write_rows(rows, tmp_path / "results" / "inference.csv")
    with (tmp_path / "results" / "inference.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [line["row"] for line in written] == ["one", "two"]
    assert (written[0]["value"], written[0]["met"]) == ("1.25", "yes")
    assert (written[1]["value"], written[1]["note"]) == ("1234.0", "a, b")
