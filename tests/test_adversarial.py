"""A segmenter against a discriminator: stages, the frozen one, going on after a kill, memory."""

import csv
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_dataset
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import effseg.training.pair as pair_module
from effseg.cli import app
from effseg.dataset import NineWaySplit, read_dataset, share_annotated, split_nine_ways
from effseg.errors import CheckpointError, DataError, EffsegError, MemoryBudgetError, PlanError
from effseg.evaluation import Scores
from effseg.memory import measure_peak
from effseg.planner import plan as make_plan
from effseg.planner.step import TRAINER_BYTES
from effseg.plans import AdversarialConfig, Plan
from effseg.record import RECORD, RunRecord
from effseg.training import ContestState, plan_pair, train_adversarially
from effseg.training.contest_data import ContestData
from effseg.training.discriminator import Discriminator, surprise
from effseg.training.frozen import Frozen, evaluating, fingerprint_of
from effseg.training.pair import Pair
from effseg.training.pair_memory import _trace, check_pair
from effseg.training.snapshot import load_snapshot, save_snapshot
from effseg.training.stages import Stage, judge, stages_of

QUICK = AdversarialConfig(
    voe=0.99,
    accuracy=0.9,
    chance=0.0,
    turns=1,
    segmenter_steps=6,
    discriminator_steps=6,
    check_every=3,
    check_patches=2,
    save_every=2,
    channels=4,
    depth=2,
)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("balls") / "balls", n_cases=9)


@pytest.fixture(scope="module")
def split(balls: Path) -> NineWaySplit:
    return split_nine_ways(*share_annotated(read_dataset(balls), 0.6), dataset="balls")


@pytest.fixture
def quick(tiny_plan: Plan) -> Plan:
    """Stages of a few steps; batch norm, whose buffers move in training mode."""
    network = tiny_plan.network.model_copy(update={"norm": "batch", "dropout": 0.1})
    return tiny_plan.model_copy(update={"adversarial": QUICK, "network": network})


def with_contest(plan: Plan, **changes: object) -> Plan:
    assert plan.adversarial is not None
    config = AdversarialConfig.model_validate(plan.adversarial.model_dump() | changes)
    return plan.model_copy(update={"adversarial": config})


def test_stages_take_turns_and_the_bound_is_tightened() -> None:
    config = AdversarialConfig(voe=0.4, tighten=0.5, turns=2)
    assert [(stage.name, stage.bound) for stage in stages_of(config)] == [
        ("segmenter alone", 0.4),
        ("discriminator 1", 0.75),
        ("segmenter 1", 0.2),
        ("discriminator 2", 0.75),
        ("segmenter 2", 0.1),
    ]


@pytest.mark.parametrize(
    ("stage", "step", "score", "end"),
    [
        (Stage("segmenter", 0, 0.4, 100), 10, 0.5, None),
        (Stage("segmenter", 0, 0.4, 100), 10, 0.39, (True, False)),
        (Stage("segmenter", 0, 0.4, 100), 100, 0.5, (False, True)),
        (Stage("segmenter", 2, 0.4, 100), 100, 0.5, (False, False)),
        (Stage("discriminator", 1, 0.8, 50), 10, 0.79, None),
        (Stage("discriminator", 1, 0.8, 50), 50, 0.81, (True, False)),
        (Stage("discriminator", 1, 0.8, 50), 50, 0.6, (False, False)),
        (Stage("discriminator", 1, 0.8, 50), 50, 0.5, (False, True)),
        (Stage("discriminator", 1, 0.8, 50), 10, float("nan"), None),
    ],
)
def test_criteria_end_stages_and_limits_go_on_or_stop(stage, step, score, end) -> None:
    verdict = judge(stage, step, score, chance=0.55)
    assert (verdict and (verdict.met, verdict.stops)) == end
    if verdict is not None:
        assert stage.name in verdict.said
        assert ("stopping" in verdict.said) == verdict.stops


def test_looking_restores_the_mode_of_each_part() -> None:
    network = nn.Sequential(nn.BatchNorm3d(1), nn.Sequential(nn.Dropout()), nn.Dropout())
    network[1].eval()
    modes = [part.training for part in network.modules()]
    with evaluating(network):
        assert not any(part.training for part in network.modules())
        assert not torch.is_grad_enabled()
    with suppress(ZeroDivisionError), evaluating(network):
        raise ZeroDivisionError
    assert [part.training for part in network.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_frozen_network_is_held_to_every_bit() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    frozen = Frozen(network, name="segmenter", stage="discriminator 1")
    network(torch.randn(2, 1, 4, 4, 4))
    frozen.check()
    network[1].train()
    with pytest.raises(EffsegError, match=r"the segmenter is frozen, but 1 is in training mode"):
        frozen.check_mode()
    network(torch.randn(2, 1, 4, 4, 4))
    network[1].eval()  # the mode looks right again, the running statistics have moved
    with pytest.raises(EffsegError, match="discriminator 1: the segmenter is frozen, but its"):
        frozen.check()


def test_fingerprints_tell_the_sign_of_zero_and_types() -> None:
    network = nn.Linear(1, 1, bias=False)
    seen = set()
    for value in (0.0, -0.0, 1.0):
        nn.init.constant_(network.weight, value)
        seen.add(fingerprint_of(network))
    seen.add(fingerprint_of(network.to(torch.bfloat16)))
    assert len(seen) == 4


def test_a_snapshot_is_what_was_saved(tmp_path: Path) -> None:
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "mean": torch.randn(2, 3)}}},
        "groups": [{"betas": (0.9, 0.99), "rate": 0.1, "foreach": None}],
        "random": torch.get_rng_state(),
        "empty": {},
        "nan": float("nan"),
    }
    save_snapshot(tmp_path / "s", state)
    back = load_snapshot(tmp_path / "s")
    assert repr(back) == repr(state)
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="no state of a training that can be read"):
        load_snapshot(tmp_path / "s")


def test_the_discriminator_reads_image_and_labels_and_learns() -> None:
    network = Discriminator(1, 3, QUICK)
    image = torch.randn(2, 1, 9, 8, 1)  # any size, odd and flat ones too
    sure, unsure = torch.zeros(2, 3, 9, 8, 1), torch.full((2, 3, 9, 8, 1), 1 / 3)
    sure[:, 0] = 1
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(60):
        loss = surprise(network(image, sure), known=True)
        loss = loss + surprise(network(image, unsure), known=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network(image, sure) > 0).all()
    assert (network(image, unsure) < 0).all()
    assert surprise(torch.zeros(4), known=True) == pytest.approx(torch.log(torch.tensor(2.0)))


@pytest.fixture(scope="module")
def whole(tiny_plan: Plan, balls: Path, split: NineWaySplit, tmp_path_factory) -> Path:
    """A run through all stages."""
    network = tiny_plan.network.model_copy(update={"norm": "batch", "dropout": 0.1})
    plan = tiny_plan.model_copy(update={"adversarial": QUICK, "network": network})
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"epochs": None})})
    return train_adversarially(
        plan, balls, split=split, out=tmp_path_factory.mktemp("whole") / "run"
    )


def test_a_run_is_a_run_like_any_other(whole: Path, split: NineWaySplit) -> None:
    record = RunRecord.load(whole / RECORD)
    assert record.stopped_by == "stages"
    assert record.train == split.segmenter.train
    assert record.validation == split.segmenter.validation
    assert record.memory is not None
    assert record.memory.measured_peak_bytes
    assert any(note.startswith("stage segmenter alone: training VOE") for note in record.notes)
    assert Plan.load(whole / "plan.json").adversarial == QUICK
    assert NineWaySplit.load(whole / "split.json") == split
    assert not (whole / "cache").exists()
    with (whole / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["stage"] for row in rows} == {"0", "1", "2"}
    assert all(bool(row["training_voe"]) == (int(row["stage"]) % 2 == 0) for row in rows)
    done = CliRunner().invoke(app, ["report", str(whole)])
    assert done.exit_code == 0, done.output
    assert "stage segmenter alone" in (whole / "report.html").read_text()


def test_what_the_split_keeps_for_testing_is_scored_and_chooses_nothing(
    whole: Path, split: NineWaySplit, tmp_path: Path
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in ("plan.json", "run.json")}
    done = CliRunner().invoke(app, ["test", str(run)])
    assert done.exit_code == 0, done.output
    scores = Scores.load(run / "test" / "metrics.json")
    assert [case.case for case in scores.cases] == list(split.segmenter.test)
    assert all((run / "test" / f"{name}.nii.gz").is_file() for name in split.segmenter.test)
    assert before == {name: (run / name).read_bytes() for name in before}
    assert split.segmenter.test[0] in (run / "report.html").read_text()
    (run / "split.json").unlink()
    done = CliRunner().invoke(app, ["test", str(run)])
    assert isinstance(done.exception, CheckpointError)
    assert "trained on no split" in str(done.exception)


def test_a_run_that_was_stopped_anywhere_ends_at_the_same_weights(
    whole: Path, balls: Path, split: NineWaySplit, tmp_path: Path
) -> None:
    plan = Plan.load(whole / "plan.json")

    def stop(stage: str, step: int, state: ContestState) -> None:
        if (state.stage, state.step) == (stage, step):
            raise KeyboardInterrupt

    train = partial(train_adversarially, dataset=balls, out=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(plan, split=split, progress=partial(stop, "segmenter alone", 3))
    with pytest.raises(KeyboardInterrupt):
        train(None, split=None, resume=True, progress=partial(stop, "discriminator 1", 1))
    assert RunRecord.load(tmp_path / "run" / RECORD).stopped_by == "interrupt"
    train(None, split=None, resume=True)
    assert_same(whole, tmp_path / "run")


def assert_same(one: Path, other: Path) -> None:
    """Kept weights and the last state of both networks, to the bit."""
    a, b = (load_file(run / "model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (load_snapshot(run / "checkpoints" / "adversarial.safetensors") for run in (one, other))
    for state in (a, b):  # what the clock and the system say
        for row in (state["standing"], *state["standing"]["rows"]):
            for name in ("seconds", "minutes", "peak_bytes"):
                row.pop(name, None)
    assert repr(a["standing"]) == repr(b["standing"])
    assert_equal(a["pair"], b["pair"])


def assert_equal(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def test_an_evaluation_that_leaves_the_frozen_network_training_is_caught(
    quick: Plan, balls: Path, split: NineWaySplit, tmp_path: Path, monkeypatch
) -> None:
    @contextmanager
    def careless(*networks: nn.Module) -> Iterator[None]:
        for network in networks:
            network.eval()
        with torch.no_grad():
            yield
        for network in networks:
            network.train()  # the bug: whatever mode it was in

    monkeypatch.setattr(pair_module, "evaluating", careless)
    words = "stage discriminator 1: the segmenter is frozen, but it is in training mode"
    with pytest.raises(EffsegError, match=words):
        train_adversarially(quick, balls, split=split, out=tmp_path / "run")
    assert RunRecord.load(tmp_path / "run" / RECORD).stopped_by == "error"


def test_something_that_trains_the_frozen_network_is_caught_at_the_stage_s_end(
    quick: Plan, balls: Path, split: NineWaySplit, tmp_path: Path, monkeypatch
) -> None:
    move = Pair.move_discriminator

    def careless(self: Pair) -> None:
        move(self)
        with torch.no_grad():
            next(self.segmenter.parameters()).mul_(1 + 1e-6)

    monkeypatch.setattr(Pair, "move_discriminator", careless)
    with pytest.raises(EffsegError, match="the segmenter is frozen, but its parameters or buffers"):
        train_adversarially(quick, balls, split=split, out=tmp_path / "run")


def test_a_snapshot_whose_frozen_network_was_changed_is_refused(
    whole: Path, balls: Path, tmp_path: Path
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    path = run / "checkpoints" / "adversarial.safetensors"
    state = load_snapshot(path)
    state["standing"] |= {"stage": 1, "step": 2, "frozen": "0" * 64, "ended": False}
    save_snapshot(path, state)
    with pytest.raises(CheckpointError, match="the segmenter is not the one that stage disc"):
        train_adversarially(None, balls, split=None, out=run, resume=True)
    path.write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="no state of a training that can be read"):
        train_adversarially(None, balls, split=None, out=run, resume=True)


def test_what_cannot_begin_is_refused_at_the_door(
    quick: Plan, balls: Path, split: NineWaySplit, tmp_path: Path
) -> None:
    train = partial(train_adversarially, dataset=balls, out=tmp_path / "run")
    with pytest.raises(DataError, match="no adversarial training to resume"):
        train(None, split=None, resume=True)
    with pytest.raises(PlanError, match="has its own plan and split"):
        train(quick, split=None, resume=True)
    with pytest.raises(PlanError, match="a new run needs a plan and a split"):
        train(quick, split=None)
    with pytest.raises(PlanError, match="precision float16"):
        train(quick.model_copy(update={"precision": "float16"}), split=split)
    optimizer = quick.training.optimizer.model_copy(update={"accumulate": 2})
    training = quick.training.model_copy(update={"optimizer": optimizer})
    with pytest.raises(PlanError, match=r"training.optimizer.accumulate is set.*set it to 1"):
        train(quick.model_copy(update={"training": training}), split=split)
    absent = read_dataset(balls).cases[:2]
    with pytest.raises(DataError, match="not among the 2 unannotated cases given"):
        train(quick, split=split, unannotated=absent)
    memory = quick.memory.model_copy(update={"budget_bytes": 2**20})
    with pytest.raises(MemoryBudgetError, match="with a discriminator takes"):
        train(quick.model_copy(update={"memory": memory}), split=split)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(DataError, match="not empty"):
        train(quick, split=split)


def test_labels_of_unannotated_cases_are_not_read(
    quick: Plan, balls: Path, split: NineWaySplit, tmp_path: Path
) -> None:
    gone = [
        replace(case, label=Path("nowhere.nii.gz"))
        for case in read_dataset(balls).cases
        if case.name in split.unannotated
    ]
    data = ContestData(quick, split, read_dataset(balls).cases, gone, tmp_path)
    known, unknown = data.known(1, 0), data.unknown(1, 0)
    assert known.shape == unknown.shape == (2, 1, 16, 16, 16)
    assert torch.equal(unknown, data.unknown(1, 0))
    assert not torch.equal(unknown, data.unknown(1, 1))
    assert not torch.equal(unknown, data.unknown(3, 0))


@pytest.fixture
def opponents(tiny_plan: Plan) -> tuple[Plan, Pair]:
    plan = with_contest(
        tiny_plan.model_copy(update={"adversarial": QUICK, "patch_size": (32, 32, 32)}),
        channels=16,
        depth=4,
    )
    return plan, Pair(plan, torch.device("cpu"))


def test_traces_hold_what_the_steps_take(opponents: tuple[Plan, Pair]) -> None:
    plan, pair = opponents
    telling, alone = stages_of(plan.adversarial)[1], stages_of(plan.adversarial)[2]
    ours, theirs = (
        sum(p.numel() * 4 for p in network.parameters())
        for network in (pair.segmenter, pair.discriminator)
    )
    scans = torch.randn(2, 1, 32, 32, 32)
    label = torch.zeros(2, 32, 32, 32, dtype=torch.uint8)

    def segmenter() -> None:
        pair.enter(alone)
        pair.learn_labels(scans, label)
        pair.learn_verdict(scans)
        pair.move_segmenter()

    def discriminator() -> None:
        pair.enter(telling)
        pair.learn_to_tell(scans, known=True)
        pair.learn_to_tell(scans, known=False)
        pair.move_discriminator()

    for step, learns, beside in (
        # gradients of the first half; averaged weights and the other's state are no part of a call
        (segmenter, "segmenter", ours),
        (discriminator, "discriminator", theirs),
    ):
        step()
        traced = _trace(plan, learns=learns).peak_bytes + beside
        taken = measure_peak(step).peak_bytes
        assert taken == pytest.approx(traced, rel=0.01)


def test_a_budget_is_planned_for_both(opponents: tuple[Plan, Pair]) -> None:
    plan = opponents[0].model_copy(update={"patch_size": (64, 64, 64)})
    small = plan.model_copy(update={"patch_size": (16, 16, 16)})
    budget = check_pair(small).memory.peak_bytes + 2**20
    asked = []

    def make(n_bytes: int) -> Plan:
        asked.append(n_bytes)
        memory = plan.memory.model_copy(update={"budget_bytes": n_bytes})
        made = plan if n_bytes == budget else small
        return made.model_copy(update={"memory": memory})

    found = plan_pair(make, budget)
    assert asked == [budget, round(0.85 * budget)]
    assert found.patch_size == small.patch_size
    assert found.memory.budget_bytes == budget
    assert TRAINER_BYTES < found.memory.peak_bytes <= budget


def test_a_budget_that_no_plan_fits_is_refused_as_the_least_one_was() -> None:
    def make(n_bytes: int) -> Plan:
        raise MemoryBudgetError(f"{n_bytes} is too little")

    with pytest.raises(MemoryBudgetError, match="200 is too little"):
        plan_pair(make, 1000)


def test_samples_one_after_the_other_give_the_same_gradients(opponents) -> None:
    plan, _ = opponents
    scans, found = torch.randn(2, 1, 32, 32, 32), []
    for split in (False, True):
        torch.manual_seed(0)
        pair = Pair(plan.model_copy(update={"sample_by_sample": split}), torch.device("cpu"))
        pair.learn_verdict(scans)
        pair.discriminator.zero_grad()
        pair.learn_to_tell(scans, known=False)
        parts = (*pair.segmenter.parameters(), *pair.discriminator.parameters())
        found.append([p.grad for p in parts if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_command_trains_resumes_and_reports(
    quick: Plan, balls: Path, split: NineWaySplit, tmp_path: Path
) -> None:
    plan, cut = quick.save(tmp_path / "plan.json"), split.save(tmp_path / "split.json")
    run = tmp_path / "run"
    call = ["adversarial", str(balls), "--out", str(run)]
    done = CliRunner().invoke(app, [*call, "--split", str(cut), "--plan", str(plan)])
    assert done.exit_code == 0, done.output
    assert "stage segmenter alone: training VOE" in done.output
    assert (run / "report.html").is_file()
    assert (run / "validation" / "metrics.json").is_file()
    done = CliRunner().invoke(app, [*call, "--resume"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, [*call, "--resume", "--plan", str(plan)])
    assert done.exit_code != 0
    assert "own plan" in str(done.exception) + done.output


KILLED = """
import os, signal, sys
from effseg.training import train_adversarially

run, dataset, stage, step = sys.argv[1:5]

def die(state):
    if (state.stage, state.step) == (stage, int(step)):
        os.kill(os.getpid(), signal.SIGKILL)

plan, split = sys.argv[5:] or (None, None)
train_adversarially(plan, dataset, split=split, out=run, resume=plan is None, progress=die)
"""


def train_and_die(run: Path, dataset: Path, stage: str, step: int, *new: Path) -> None:
    """Train in another process, which kills itself after a step."""
    done = train_elsewhere(run, dataset, stage, step, *new)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def train_elsewhere(
    run: Path, dataset: Path, stage: str, step: int, *new: Path
) -> subprocess.CompletedProcess[bytes]:
    call = [sys.executable, "-c", KILLED, run, dataset, stage, step, *new]
    return subprocess.run([str(part) for part in call], capture_output=True, check=False)


def test_a_run_whose_time_is_over_keeps_what_it_has_and_goes_on_with_more(
    quick: Plan, balls: Path, split: NineWaySplit, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_adversarially(quick, balls, split=split, out=run, minutes=1e-9)
    record = RunRecord.load(run / RECORD)
    assert record.stopped_by == "minutes"
    assert (record.steps, record.epochs) == (0, 1)
    assert not any("discriminator tells" in note for note in record.notes)
    assert load_file(run / "model.safetensors")
    train_adversarially(None, balls, split=None, out=run, minutes=9, resume=True)
    record = RunRecord.load(run / RECORD)
    assert record.stopped_by == "stages"
    assert sum("the other network is unchanged" in note for note in record.notes) == 3


@pytest.mark.slow
def test_a_run_that_was_killed_in_each_stage_ends_at_the_same_weights(
    whole: Path, balls: Path, tmp_path: Path
) -> None:
    run, new = tmp_path / "run", (whole / "plan.json", whole / "split.json")
    for stage, step in (
        ("segmenter alone", 1),  # before anything was saved
        ("segmenter alone", 3),
        ("discriminator 1", 3),
        ("segmenter 1", 6),  # its last
    ):
        train_and_die(run, balls, stage, step, *new)
        new = ()
        assert (run / "cache").exists()  # killed, not stopped
    train_adversarially(None, balls, split=None, out=run, resume=True)
    assert_same(whole, run)
    assert not (run / "cache").exists()


@pytest.mark.slow
def test_real_scans_with_a_tenth_of_the_labels(shared, tmp_path: Path) -> None:
    dataset = read_dataset(shared("msd-hippocampus"))
    dataset = replace(dataset, cases=dataset.cases[::3])  # they are prepared four times
    cut = split_nine_ways(*share_annotated(dataset, 0.1), dataset=dataset.name)
    seen = {*cut.segmenter.train, *cut.segmenter.validation}
    known = replace(dataset, cases=tuple(case for case in dataset.cases if case.name in seen))
    config = AdversarialConfig(
        voe=0.6,
        tighten=0.95,
        accuracy=0.6,
        chance=0.0,
        turns=1,
        segmenter_steps=150,
        discriminator_steps=40,
        check_every=10,
        check_patches=8,
        save_every=25,
        learning_rate=1e-3,
        warmup_steps=10,
    )
    planned = make_plan(known, memory="1GiB", device="cpu", size="b0")
    training = planned.training.model_copy(update={"validation_patches": 8})
    network = planned.network.model_copy(
        update={
            "stem_channels": 8,
            "growth_rate": 8,
            "encoder_layers": (2, 2, 2),
            "decoder_layers": (1, 1),
            "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
            "kernels": ((3, 3, 3),) * 3,
        }
    )
    plan = planned.model_copy(
        update={
            "patch_size": (32, 32, 32),
            "batch_size": 2,
            "precision": "float32",
            "network": network,
            "policies": {},
            "adversarial": config,
            "training": training,
        }
    )
    run, new = tmp_path / "run", (tmp_path / "plan.json", tmp_path / "split.json")
    plan.save(new[0])
    cut.save(new[1])
    for stage in ("segmenter alone", "discriminator 1", "segmenter 1"):
        train_and_die(run, dataset.root, stage, 7, *new)
        new = ()
    done = train_elsewhere(run, dataset.root, "none", 0)
    assert done.returncode == 0, done.stderr.decode()
    record = RunRecord.load(run / RECORD)
    assert record.stopped_by == "stages"
    alone = next(note for note in record.notes if note.startswith("stage segmenter alone"))
    assert "as wanted" in alone
    assert record.best_score is not None
    assert record.best_score > 0.3
    assert record.memory is not None
    assert record.memory.measured_peak_bytes is not None
    assert record.memory.measured_peak_bytes <= record.memory.predicted_peak_bytes
