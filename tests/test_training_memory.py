"""The promise while a run goes on: policies act, peaks are counted, a lack of memory is met."""

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import effseg.memory.heap as heap
from effseg.errors import MemoryBudgetError, PlanError
from effseg.memory import stage_policies
from effseg.plans import Plan
from effseg.record import RECORD, RunRecord
from effseg.training import train
from effseg.training.memory_watch import MemoryWatch
from effseg.training.module import SegmentationModule
from effseg.training.step import SampleBySample, Step, WholeBatch


def changed(plan: Plan, **parts: object) -> Plan:
    """The plan with some fields of its parts changed, `memory={"heap": "mapped"}`."""
    content = plan.model_dump()
    for name, change in parts.items():
        content[name] = content[name] | change if isinstance(change, dict) else change
    return Plan.model_validate(content)


def test_the_plans_policies_act_on_the_network_and_not_on_its_average(tiny_plan: Plan) -> None:
    plan = changed(tiny_plan, policies={"encoder.*": "recompute"})
    module = SegmentationModule(plan)
    assert stage_policies(module.network) == dict.fromkeys(("encoder.0", "encoder.1"), "recompute")
    assert stage_policies(module.averaged.module) == {}


def test_a_policy_for_no_stage_is_refused_before_anything_is_read(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = changed(tiny_plan, policies={"encodr.0": "recompute"})
    with pytest.raises(PlanError, match=r"'encodr.0' is no module of DenseUNet.*encoder.0"):
        train(plan, tiny_dataset, out=tmp_path / "r", preparing=lambda *_: pytest.fail("read"))


def test_a_recomputed_run_learns_the_same(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = changed(tiny_plan, policies={"encoder.*": "recompute", "decoder.0": "recompute"})
    runs = [
        train(p, tiny_dataset, out=tmp_path / p.dataset.replace("/", "_") / str(i))
        for i, p in enumerate((tiny_plan, plan))
    ]
    one, other = (load_file(run / "model.safetensors") for run in runs)
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-6)


def test_each_epoch_has_the_predicted_peak_beside_the_measured(tiny_run: Path) -> None:
    predicted = Plan.load(tiny_run / "plan.json").memory.peak_bytes
    with (tiny_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["predicted_peak_bytes"]) for row in rows} == {predicted}
    peaks = [int(row["peak_bytes"]) for row in rows]
    assert peaks == sorted(peaks)
    assert peaks[0] > 0
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(tiny_run / "logs")).Reload()
    for name in ("peak_bytes", "predicted_peak_bytes"):
        assert [event.step for event in log.Scalars(name)] == [6, 12, 18, 24, 30, 36]


def test_more_than_the_budget_is_warned_of_once(
    tiny_plan: Plan,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(MemoryWatch, "peak_bytes", lambda *_: 2 * 2**30)
    with caplog.at_level(logging.WARNING, "effseg"):
        train(tiny_plan, tiny_dataset, out=tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if record.name == "effseg"]
    assert sum("training took 2.00 GiB of a budget of 1.00 GiB" in words for words in said) == 1


def test_a_plan_is_trained_on_the_heap_it_names(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    in_force: dict[str, set[object]] = {"system": set(), "mapped": set(), "kept": set()}
    for kind, seen in in_force.items():

        def look(state: object, seen: set[object] = seen) -> None:
            del state
            seen.add(heap._in_force())

        train(
            changed(tiny_plan, memory={"heap": kind}),
            tiny_dataset,
            out=tmp_path / kind,
            epochs=1,
            progress=look,
        )
    assert in_force == {"system": {None}, "mapped": {"mapped"}, "kept": {"kept"}}
    assert heap._in_force() is None


def refuse_forwards(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Memory is refused in these forwards of a batch in training, from 0."""
    n_calls = [0]
    for way in (WholeBatch, SampleBySample):

        def refusing(self: Step, *batch: torch.Tensor, loss=way.loss) -> torch.Tensor:
            n_calls[0] += 1
            result = loss(self, *batch)
            if n_calls[0] - 1 in calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return result

        monkeypatch.setattr(way, "loss", refusing)


def test_a_run_that_was_short_of_memory_learns_the_same_and_says_so(
    tiny_plan: Plan,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    undisturbed = train(tiny_plan, tiny_dataset, out=tmp_path / "a")
    refuse_forwards(monkeypatch, 7)
    with caplog.at_level(logging.WARNING, "effseg"):
        disturbed = train(tiny_plan, tiny_dataset, out=tmp_path / "b")
    one, other = (load_file(run / "model.safetensors") for run in (undisturbed, disturbed))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-6)
    losses = []
    for run in (undisturbed, disturbed):
        with (run / "metrics.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    (event,) = RunRecord.load(disturbed / RECORD).events
    assert (event.epoch, event.step) == (1, 7)
    assert event.asked == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert event.changed == "from now on 5 more stages are recomputed in backward"
    assert "step 7 ran out of memory" in caplog.text


def test_a_run_that_ends_short_of_memory_keeps_what_it_learnt(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_forwards(monkeypatch, 6, 7, 8)
    with pytest.raises(MemoryBudgetError, match="step 6 ran out of memory") as caught:
        train(tiny_plan, tiny_dataset, out=tmp_path / "run")
    assert caught.value.exit_code == 3
    record = RunRecord.load(tmp_path / "run" / RECORD)
    assert (record.stopped_by, record.epochs) == ("error", 1)
    assert [event.changed for event in record.events][1:] == [
        "from now on 2 samples of a batch go one after the other",
        "nothing was left to change",
    ]
    assert (tmp_path / "run" / "model.safetensors").exists()


REAL = """
import json, resource, sys
import torch
from effseg.plans import Plan
from effseg.training import train

torch.set_num_threads(1)


def taken():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmSize")) * 1024


def lower(state):
    if state.step == 2:
        limit = taken() + int(sys.argv[4]) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


train(Plan.load(sys.argv[1]), sys.argv[2], out=sys.argv[3], progress=lower)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
def test_a_system_that_refuses_memory_does_not_end_a_run(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    """A step takes 341 MiB, 176 recomputed, 57 a sample at a time; 120 are left."""
    network = {"encoder_layers": (2, 2), "decoder_layers": (2,), "memory": "plain"}
    plan = changed(
        tiny_plan,
        network=network,
        patch_size=(32, 32, 32),
        batch_size=3,
        memory={"heap": "mapped"},
        training={"steps_per_epoch": 4, "epochs": 1},
    )
    path = plan.save(tmp_path / "plan.json")
    run = tmp_path / "run"
    command = [sys.executable, "-c", REAL, *map(str, (path, tiny_dataset, run, 120))]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "run.json").read_text())
    assert (record["stopped_by"], record["steps"]) == ("epochs", 4)
    assert [event["step"] for event in record["events"]] == [2, 2]
    assert "can't allocate memory" in record["events"][0]["asked"]
