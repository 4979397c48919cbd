"""A student of several runs: what it hears, what that takes, and what becomes of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from effseg.cli.application import app
from effseg.dataset import Case
from effseg.errors import CheckpointError, DataError, MemoryBudgetError, PlanError
from effseg.inference import load_run, predict
from effseg.io import read_volume
from effseg.memory import measure_peak
from effseg.networks import DenseUNet, build_network
from effseg.planner import check_plan, trace_plan
from effseg.plans import Plan
from effseg.record import RunRecord
from effseg.report.step import draw_plan
from effseg.training import distill
from effseg.training.distillation import fitting, warn_of_leaks, with_teachers
from effseg.training.module import SegmentationModule
from effseg.training.teachers import Teachers
from effseg.validation import validate


@pytest.fixture
def teachers(tiny_run: Path, tmp_path: Path) -> list[Path]:
    """The run, and one that is a little different."""
    other = shutil.copytree(tiny_run, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file({name: 0.9 * t for name, t in state.items()}, other / "model.safetensors")
    return [tiny_run, other]


def taught(plan: Plan, teachers: list[Path], **choices) -> Plan:
    given = {"unannotated": (), "temperature": 2.0, "weight": 0.5}
    return with_teachers(plan, teachers, **(given | choices))


def batch_of(plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    n, patch = plan.batch_size, plan.patch_size
    return torch.randn(n, 1, *patch), torch.randint(0, 3, (n, *patch), dtype=torch.uint8)


def test_targets_are_the_mean_of_what_the_runs_say(tiny_plan: Plan, teachers: list[Path]) -> None:
    asked = Teachers.of(taught(tiny_plan, teachers))
    assert asked is not None
    assert (len(asked.networks), asked.n_models) == (1, 2)
    image, label = batch_of(tiny_plan)
    expected = 0
    for folder in teachers:
        with torch.no_grad():
            expected = expected + (load_run(folder).network(image) / 2).softmax(1) / 2
    for _ in range(2):  # whoever was in the network last
        soft = asked.soft_labels(image, label)
        got = soft.targets.movedim(-1, 1).unflatten(-1, tiny_plan.patch_size)
        torch.testing.assert_close(got.float(), expected, atol=6e-4, rtol=0)
    assert soft.labels is label
    assert not soft.targets.requires_grad
    assert Teachers.of(tiny_plan) is None


def test_teachers_may_be_of_several_networks(tiny_plan: Plan, teachers: list[Path]) -> None:
    plan = Plan.load(teachers[1] / "plan.json")
    wide = plan.network.model_copy(update={"stem_channels": 16, "memory": "plain"})
    network = build_network(wide).eval()
    plan.model_copy(update={"network": wide}).save(teachers[1] / "plan.json")
    save_file(network.state_dict(), teachers[1] / "model.safetensors")
    student = taught(tiny_plan, teachers)
    asked = Teachers.of(student)
    assert asked is not None
    assert len(asked.networks) == 2
    image, label = batch_of(tiny_plan)
    with torch.no_grad():
        one = load_run(teachers[0]).network(image)
        expected = ((one / 2).softmax(1) + (network(image) / 2).softmax(1)) / 2
    got = asked.soft_labels(image, label).targets.movedim(-1, 1).unflatten(-1, (16, 16, 16))
    torch.testing.assert_close(got.float(), expected, atol=6e-4, rtol=0)
    assert trace_plan(student).peak_bytes > trace_plan(taught(tiny_plan, teachers[:1])).peak_bytes


@pytest.mark.parametrize(("memory", "split"), [("shared", False), ("plain", True)])
def test_the_trace_of_a_taught_step_is_what_it_takes(
    tiny_plan: Plan, teachers: list[Path], split, memory, monkeypatch
) -> None:
    network = tiny_plan.network.model_copy(update={"memory": memory})
    changes = {"network": network, "sample_by_sample": split, "patch_size": (32, 32, 32)}
    alone = tiny_plan.model_copy(update=changes)
    plan = taught(alone, teachers)
    report = trace_plan(plan)
    assert report.peak_bytes > trace_plan(alone).peak_bytes
    assert report.parameter_bytes == trace_plan(alone).parameter_bytes
    module = SegmentationModule(plan)
    monkeypatch.setattr(SegmentationModule, "log", lambda *args, **kwargs: None)
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=1e-3)
    batch = batch_of(plan)

    def step() -> None:
        module.backward(module.training_step(batch, 0))
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert measure_peak(step).peak_bytes == pytest.approx(report.peak_bytes, rel=0.02)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_does_not_grow_with_the_teachers(
    tiny_plan: Plan, teachers: list[Path], device
) -> None:
    plan = tiny_plan.model_copy(update={"device": device})
    one, four = (trace_plan(taught(plan, teachers[:1] * n)) for n in (1, 4))
    assert one.peak_bytes == four.peak_bytes > trace_plan(plan).peak_bytes


def test_what_does_not_fit_is_refused(tiny_plan: Plan, teachers: list[Path]) -> None:
    plan = tiny_plan.model_copy(
        update={"memory": tiny_plan.memory.model_copy(update={"heap": "mapped"})}
    )
    needs = check_plan(plan).memory.peak_bytes
    with_them = check_plan(taught(plan, teachers)).memory.peak_bytes
    assert with_them > needs
    tight = plan.memory.model_copy(update={"budget_bytes": (needs + with_them) // 2})
    plan = plan.model_copy(update={"memory": tight})
    check_plan(plan)
    with pytest.raises(MemoryBudgetError, match=r"raise memory\.budget_bytes"):
        check_plan(taught(plan, teachers))


def test_a_tight_budget_takes_samples_one_after_the_other(
    tiny_plan: Plan, teachers: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    memory = tiny_plan.memory.model_copy(update={"heap": "mapped"})
    plan = taught(tiny_plan.model_copy(update={"memory": memory, "batch_size": 4}), teachers)
    assert fitting(plan) == check_plan(plan)
    split = check_plan(plan.model_copy(update={"sample_by_sample": True}))
    tight = memory.model_copy(update={"budget_bytes": split.memory.peak_bytes})
    assert fitting(plan.model_copy(update={"memory": tight})).sample_by_sample
    assert "samples go one after the other" in caplog.text
    none = memory.model_copy(update={"budget_bytes": split.memory.peak_bytes - 1})
    with pytest.raises(MemoryBudgetError):
        fitting(plan.model_copy(update={"memory": none}))
    batch_norm = plan.network.model_copy(update={"norm": "batch"})
    with pytest.raises(MemoryBudgetError):
        fitting(plan.model_copy(update={"memory": tight, "network": batch_norm}))


def test_misfits_are_refused(tiny_plan: Plan, teachers: list[Path], tmp_path: Path) -> None:
    far = tiny_plan.model_copy(update={"spacing": (2.0, 2.0, 2.0)})
    with pytest.raises(CheckpointError, match="the teacher's spacing are"):
        check_plan(taught(far, teachers))
    with pytest.raises(CheckpointError, match="not a run that can teach"):
        check_plan(taught(tiny_plan, [tmp_path / "nobody"]))
    with pytest.raises(CheckpointError, match="no teacher"):
        distill([], tmp_path, out=tmp_path / "out")
    with pytest.raises(PlanError, match=r"temperature: .* greater than 0, got 0"):
        taught(tiny_plan, teachers, temperature=0)
    scan = Case(name="a", images=(tmp_path / "a.nii.gz",), label=None)
    with pytest.raises(DataError, match="two scans are named a"):
        taught(tiny_plan, teachers, unannotated=(scan, scan))
    plan = taught(tiny_plan, teachers, unannotated=(scan,))
    assert plan.ignore_label == 3
    content = plan.model_dump() | {"ignore_label": None}
    with pytest.raises(ValueError, match="need a value that is no label"):
        Plan.model_validate(content)


@pytest.fixture
def scans(tiny_dataset: Path, tmp_path: Path) -> Path:
    """Two images without labels; one has the name of an annotated case."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for source, name in (("ball_4", "ball_0"), ("ball_5", "other")):
        image = tiny_dataset / "images" / f"{source}.nii.gz"
        shutil.copy(image, folder / f"{name}.nii.gz")
    return folder


def test_a_student_learns_from_teachers_alone(
    tiny_plan: Plan, tiny_dataset: Path, teachers: list[Path], scans: Path, tmp_path: Path
) -> None:
    # labels count for nothing here: what it knows, teachers said
    cases = [Case(name=path.stem, images=(path,), label=None) for path in sorted(scans.iterdir())]
    run = distill(
        teachers[:1], tiny_dataset, out=tmp_path / "run", epochs=6, weight=1.0, unannotated=cases
    )
    mean_dice = validate(run).mean_dice
    assert mean_dice is not None
    assert mean_dice > 0.5
    plan = Plan.load(run / "plan.json")
    assert plan.training.distillation is not None
    assert set(plan.training.distillation.unannotated) == {"ball_0.nii", "other.nii"}
    assert all("distill" not in name for name in load_file(run / "model.safetensors"))
    # a run like any other, also when its teachers are gone
    content = json.loads((run / "plan.json").read_text())
    content["training"]["distillation"]["teachers"] = ["/nowhere"]
    (run / "plan.json").write_text(json.dumps(content))
    image = tiny_dataset / "images" / "ball_0.nii.gz"
    assert np.any(predict(run, image).array)
    chart, why = draw_plan(Plan.load(run / "plan.json"))
    assert chart is None
    assert "/nowhere: not a run that can teach" in why
    assert isinstance(load_run(run).network, DenseUNet)


def test_teachers_stay_as_they_are(tiny_plan: Plan, teachers: list[Path], monkeypatch) -> None:
    module = SegmentationModule(taught(tiny_plan, teachers[:1]))
    monkeypatch.setattr(SegmentationModule, "log", lambda *args, **kwargs: None)
    assert module.teachers is not None
    ((network, _),) = module.teachers.networks
    before = {name: t.clone() for name, t in network.state_dict().items()}
    module.train()
    module.backward(module.training_step(batch_of(tiny_plan), 0))
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not network.training
    assert not any(part is network for part in module.modules())
    assert any(isinstance(p.grad, torch.Tensor) for p in module.network.parameters())
    assert isinstance(module.network, nn.Module)


def test_teachers_that_know_the_held_out_cases_are_told_of(
    tiny_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = RunRecord.load(tiny_run / "run.json")
    warn_of_leaks(record, {tiny_run: record})
    assert not caplog.text
    other = record.model_copy(update={"train": record.train + record.validation[:1]})
    warn_of_leaks(record, {tiny_run: other})
    assert "learnt from 1 of the 2 cases that the student holds out" in caplog.text


def test_the_command_line_makes_a_student(
    tiny_dataset: Path, teachers: list[Path], scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    words = ["distill", *map(str, teachers), "--data", str(tiny_dataset), "--out", str(out)]
    words += ["--unannotated", str(scans), "--epochs", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "2 runs say of each patch is 50% of the loss" in (out / "report.html").read_text()
    assert read_volume(next((out / "validation").glob("*.nii.gz"))).array.ndim == 3
