"""The record of a run, as training writes it and others read it."""

import json
from pathlib import Path

import pytest

from effseg.errors import CheckpointError
from effseg.record import RECORD, RunMemory, RunRecord

RECORDED = RunRecord(
    format=1,
    effseg="0.1.0",
    dataset="data/lungs",
    train=("a", "b"),
    validation=("c",),
    memory=RunMemory(budget_bytes=2**30, predicted_peak_bytes=2**20),
)


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    assert RunRecord.load(RECORDED.save(tmp_path / RECORD)) == RECORDED


def test_what_training_records_is_all_that_a_record_has(tiny_run: Path) -> None:
    content = json.loads((tiny_run / RECORD).read_text())
    assert list(content) == list(RunRecord.model_fields)
    assert None not in content.values()
    assert RunRecord.load(tiny_run / RECORD).started is not None


def test_what_a_newer_version_adds_is_passed_over(tmp_path: Path) -> None:
    path = RECORDED.save(tmp_path / RECORD)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))
    assert RunRecord.load(path) == RECORDED


@pytest.mark.parametrize("name", ["format", "dataset", "train", "validation"])
def test_without_what_validation_needs_it_is_no_record(tmp_path: Path, name: str) -> None:
    path = RECORDED.save(tmp_path / RECORD)
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{RECORD}: {name}: Field required"):
        RunRecord.load(path)


def test_a_run_without_a_record_has_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such record; `effseg train` writes one"):
        RunRecord.load(tmp_path / RECORD)
