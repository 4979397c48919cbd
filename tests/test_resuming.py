"""A run that was cut off goes on, and ends as it would have ended."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from effseg import cli
from effseg.errors import CheckpointError
from effseg.plans import Plan
from effseg.record import METRICS, PLAN, RECORD, WEIGHTS, RunRecord
from effseg.training import TrainingState, train


def demanding(plan: Plan) -> Plan:
    """A plan of all that has a state: dropout, slow weights, thawing, patience, several losses."""
    content = plan.model_dump()
    content["network"]["dropout"] = 0.2
    training = content["training"]
    training |= {"epochs": 4, "steps_per_epoch": 3}
    training["optimizer"] |= {"kind": "sgd", "accumulate": 2, "lookahead": {"steps": 2}}
    training["start"] |= {"freeze": ["encoder.0"], "thaw": [{"at": 0.4, "parts": ["encoder.0"]}]}
    training["stopping"] |= {"kind": "patience", "patience": 9, "smoothing": 0.5}
    training["loss_schedule"] = [
        {"from_epoch": 1, "loss": {"balanced": True}},
        {"from_epoch": 3, "loss": {"jaccard_weight": 1.0}},
    ]
    return Plan.model_validate(content)


def columns(run: Path) -> list[list[str]]:
    names = ("epoch", "step", "learning_rate", "loss", "validation_loss", "validation_voe")
    with (run / METRICS).open() as file:
        return [[row[name] for name in names] for row in csv.DictReader(file)]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_ends_as_if_it_had_not_been_cut_off(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path, workers
) -> None:
    plan = demanding(tiny_plan)
    plan = plan.model_copy(
        update={"training": plan.training.model_copy(update={"workers": workers})}
    )
    whole = train(plan, tiny_dataset, out=tmp_path / "whole")
    run = tmp_path / "cut"

    def cut(state: TrainingState) -> None:
        if state.step == 7:  # in epoch 2, after the thaw; the next step is the last
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(plan, tiny_dataset, out=run, progress=cut, notes=("a note",))
    assert RunRecord.load(run / RECORD).stopped_by == "terminate"
    train(run / PLAN, tiny_dataset, out=run, resume=True)
    assert columns(run) == columns(whole)
    ours, theirs = load_file(run / WEIGHTS), load_file(whole / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    last = [
        torch.load(one / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for one in (run, whole)
    ]
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=0)
    record, uncut = (RunRecord.load(one / RECORD) for one in (run, whole))
    assert (record.stopped_by, record.epochs, record.steps) == ("epochs", 4, 12)
    assert (record.best_epoch, record.best_score) == (uncut.best_epoch, uncut.best_score)
    assert record.notes == ("a note",)
    went_on = "went on from here after it was cut off"
    said = [change.what for change in record.changes]
    assert went_on in said
    assert [what for what in said if what != went_on] == [c.what for c in uncut.changes]


@pytest.fixture(scope="module")
def cut_run(tiny_plan: Plan, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that was cut off in the second."""

    def cut(state: TrainingState) -> None:
        if state.step == 7:
            raise KeyboardInterrupt

    run = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_plan, tiny_dataset, out=run, progress=cut)
    return run


def test_the_command_goes_on_and_says_so(
    cut_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut_run, run)
    cli.app(["train", "--resume", str(run)], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "epoch 1: went on from here after it was cut off" in said
    assert f"report {run / 'report.html'}" in said
    assert "step 6: went on from here after it was cut off" in (run / "report.html").read_text()
    assert RunRecord.load(run / RECORD).stopped_by == "epochs"


@pytest.mark.parametrize("what", ["plan", "data", "finished", "no epoch"])
def test_what_cannot_go_on_is_refused_in_one_line(
    cut_run: Path, tiny_dataset: Path, tmp_path: Path, what
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(cut_run, run)
    shutil.copytree(tiny_dataset, data)
    words = "changed since it was trained"
    if what == "plan":
        content = json.loads((run / PLAN).read_text())
        content["training"]["optimizer"]["weight_decay"] = 0.5
        (run / PLAN).write_text(json.dumps(content))
    elif what == "data":
        shutil.copy(data / "labels" / "ball_1.nii.gz", data / "labels" / "ball_0.nii.gz")
    elif what == "finished":
        record = RunRecord.load(run / RECORD)
        record.model_copy(update={"stopped_by": "minutes"}).save(run / RECORD)
        words = "stopped by its minutes; only what was cut off goes on"
    else:
        shutil.rmtree(run / "checkpoints")
        words = "no whole epoch is kept"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=words) as caught:
        train(run / PLAN, data, out=run, resume=True)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


CHECKPOINT = """
import sys
import torch
from effseg.memory import PeakResident
from effseg.training.trainer import StreamedCheckpoint

state = {"weights": {str(i): torch.ones(2**20) for i in range(16)}}
resident = PeakResident().start()
StreamedCheckpoint().save_checkpoint(state, sys.argv[1])
print(resident.stop())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_checkpoint_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    command = [sys.executable, "-c", CHECKPOINT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 64 * 2**20
    assert int(done.stdout) < 8 * 2**20
