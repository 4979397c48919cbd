"""When a run ends before its time: the arithmetic by hand, and runs that end so."""

import csv
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy.stats import linregress

from effseg.errors import PlanError
from effseg.plans import OptimizerConfig, Plan, ScheduleConfig, StoppingConfig, TrainingConfig
from effseg.record import METRICS, RECORD, WEIGHTS, RunRecord
from effseg.training import TrainingState, train
from effseg.training.clock import Clock, learning_rate_factor
from effseg.training.stopping import ExponentialMean, Patience, Trend, is_falling, least_squares


def with_training(plan: Plan, **changes: object) -> Plan:
    """The plan with other values in `training`; a dictionary changes a part of it."""
    content = plan.model_dump()
    for name, change in changes.items():
        old = content["training"][name]
        content["training"][name] = old | change if isinstance(change, dict) else change
    return Plan.model_validate(content)


def test_a_line_by_hand() -> None:
    # through (0, 3), (1, 1), (2, 2): slope (-1 * 1 + 1 * 0) / 2, residuals 0.5, -1, 0.5
    slope, error = least_squares([3, 1, 2])
    assert slope == pytest.approx(-0.5)
    assert error == pytest.approx(math.sqrt(1.5 / 1 / 2))


def test_a_line_agrees_with_scipys() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 8, 30):
        for fall in (0.0, 0.02, 0.2):
            values = rng.normal(0, 0.1, n) - fall * np.arange(n)
            known = linregress(np.arange(n), values, alternative="less")
            assert least_squares(values) == pytest.approx((known.slope, known.stderr))
            for confidence in (0.6, 0.95):
                assert is_falling(values, confidence=confidence) == (known.pvalue < 1 - confidence)


def test_a_fall_has_to_be_worth_it() -> None:
    values = [0.5, 0.4, 0.3, 0.2]
    assert is_falling(values, confidence=0.95, gain=0.29)
    assert not is_falling(values, confidence=0.95, gain=0.31)
    assert not is_falling([0.3] * 4, confidence=0.95)
    assert not is_falling([0.2, 0.3, 0.4, 0.5], confidence=0.6)


def test_means_forget_by_halves() -> None:
    mean = ExponentialMean(0.5)
    assert [mean.add(value) for value in (4.0, 1.0, 0.0)] == pytest.approx([4, 2, 6 / 7])
    same = ExponentialMean(0.0)
    assert [same.add(value) for value in (0.3, 0.1)] == [0.3, 0.1]


def test_patience_counts_what_is_not_better() -> None:
    judge = Patience(2)
    scores = (0.5, 0.5, 0.6, 0.6, 0.59)
    assert [judge.add(score=s, voe=0.0) for s in scores] == [False, False, False, False, True]


def test_a_trend_waits_for_its_window_and_its_patience() -> None:
    judge = Trend(StoppingConfig(kind="trend", window=3, patience=2))
    falling, flat = (0.9, 0.8, 0.7), (0.7, 0.7, 0.7)
    said = [judge.add(score=0.0, voe=voe) for voe in (*falling, *flat)]
    # 0.8 0.7 0.7 does not fall surely, nor does 0.7 0.7 0.7
    assert said == [False, False, False, False, True, True]


def factors(schedule: ScheduleConfig, *fractions: float) -> list[float]:
    config = OptimizerConfig(warmup=0.1, schedule=schedule)
    return [learning_rate_factor(fraction, config) for fraction in fractions]


def test_schedules_by_hand() -> None:
    poly = ScheduleConfig(kind="poly", power=2)
    assert factors(poly, 0, 0.05, 0.1, 0.55, 1) == pytest.approx([1e-3, 0.5, 1, 0.25, 0])
    step = ScheduleConfig(kind="step", at=(0.5, 0.8), factor=0.1)
    assert factors(step, 0.1, 0.49, 0.5, 0.8, 1) == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    constant = ScheduleConfig(kind="constant_then_decay", until=0.6)
    assert factors(constant, 0.05, 0.6, 0.8, 1) == pytest.approx([0.5, 1, 0.5, 0])
    assert factors(ScheduleConfig(), 0.1, 0.55, 1) == pytest.approx([1, 0.5, 0])


def test_steps_of_a_schedule_rise() -> None:
    with pytest.raises(ValueError, match="must be larger than the one before"):
        ScheduleConfig(kind="step", at=(0.5, 0.5))


def test_a_run_cut_short_cools_down() -> None:
    clock = Clock(TrainingConfig(epochs=10, steps_per_epoch=10))
    config = OptimizerConfig(
        warmup=0, schedule=ScheduleConfig(kind="constant_then_decay", until=1.0)
    )
    assert clock.end_early(40, cool_down=0.25)
    assert [clock.fraction(n) for n in (40, 45, 50)] == pytest.approx([0.8, 0.9, 1])
    assert [clock.rate_factor(n, config) for n in (40, 45, 50)] == pytest.approx([1, 0.5, 0])
    assert not clock.end_early(45, cool_down=0.0)  # it is ending already


def test_a_clock_goes_on_without_the_time_between() -> None:
    config = TrainingConfig(minutes=1)
    clock = Clock(config)
    clock.started -= 24
    assert clock.end_early(0, cool_down=0.5)
    state = clock.state()
    other = Clock(config)
    other.restore(state)
    other.start()
    assert other.elapsed_seconds == pytest.approx(24, abs=1)
    assert other.is_ending_early
    assert other.fraction(0) == pytest.approx(24 / 36, abs=0.03)
    clock.started -= 100
    assert clock.fraction(0) == 1


def test_a_run_near_its_end_is_not_cut_short() -> None:
    clock = Clock(TrainingConfig(epochs=10, steps_per_epoch=10))
    assert not clock.end_early(90, cool_down=0.2)
    assert not clock.is_ending_early
    assert clock.end_early(90, cool_down=0.0)
    assert clock.fraction(90) == 1


@pytest.mark.parametrize("patience", [None, 4])
def test_patience_of_an_old_plan_still_loads(tiny_plan: Plan, tmp_path: Path, patience) -> None:
    import json

    content = json.loads(tiny_plan.model_dump_json())
    del content["training"]["stopping"]
    for key in ("kind", "momentum", "lookahead", "schedule", "accumulate"):
        del content["training"]["optimizer"][key]
    content["training"]["patience"] = patience
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    stopping = Plan.load(path).training.stopping
    if patience is None:
        assert Plan.load(path) == tiny_plan
    else:
        assert (stopping.kind, stopping.patience, stopping.cool_down) == ("patience", 4, 0)
    content["training"]["stopping"] = {}
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"training.patience: no such key"):
        Plan.load(path)


@pytest.mark.parametrize("kind", ["patience", "trend"])
def test_a_run_that_gains_nothing_ends_early_and_cool(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path, kind
) -> None:
    stopping = {"kind": kind, "patience": 1, "window": 3, "cool_down": 0.5}
    optimizer = {"learning_rate": 1e-12, "schedule": {"kind": "constant_then_decay", "until": 1.0}}
    plan = with_training(
        tiny_plan, stopping=stopping, optimizer=optimizer, epochs=40, steps_per_epoch=2
    )
    run = train(plan, tiny_dataset, out=tmp_path / "run")
    record = RunRecord.load(run / RECORD)
    assert record.stopped_by == kind
    # warm once epoch 1 is over; then one without gain, or two that fill the window; half as much
    # again, and the step that finds the time to be over
    assert record.steps == {"patience": 10, "trend": 13}[kind]
    (change,) = record.changes
    assert "the learning rate goes to zero, then training ends" in change.what
    assert (change.epoch, change.step) == ((2, 6) if kind == "patience" else (3, 8))
    with (run / METRICS).open() as file:
        rows = list(csv.DictReader(file))
    rates = [1e12 * float(row["learning_rate"]) for row in rows]
    assert rates[change.epoch] == pytest.approx(1)
    assert rates[change.epoch] > rates[change.epoch + 1] > rates[-1] == 0
    for row in rows:
        dice, jaccard = float(row["validation_dice"]), 1 - float(row["validation_voe"])
        assert jaccard - 1e-6 <= dice <= 2 * jaccard + 1e-6


def test_best_weights_may_follow_the_smoothed_score(tmp_path: Path) -> None:
    from types import SimpleNamespace

    import torch

    from effseg.training.callbacks import BestWeights

    best = BestWeights(tmp_path / WEIGHTS, smoothing=0.5)
    module = SimpleNamespace(averaged=SimpleNamespace(module=torch.nn.Linear(1, 1)))
    for epoch, score in enumerate((0.2, 0.9, 0.5, 0.85, 0.86)):
        with torch.no_grad():
            module.averaged.module.weight.fill_(epoch)
        metrics = {"validation_dice": torch.tensor(score)}
        best.on_validation_end(
            SimpleNamespace(callback_metrics=metrics, is_global_zero=True, current_epoch=epoch),
            module,
        )
    # means 0.2, 0.667, 0.571, 0.720, 0.792: the 0.9 of one epoch is not believed
    assert (best.best_epoch, best.best_score) == (4, pytest.approx(0.86))
    assert load_file(tmp_path / WEIGHTS)["weight"].item() == 4


def test_a_stop_file_ends_a_run_with_all_it_learnt(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    def ask(state: TrainingState) -> None:
        if state.step == 2:
            (tmp_path / "run" / "stop").touch()

    run = train(tiny_plan, tiny_dataset, out=tmp_path / "run", epochs=50, progress=ask)
    record = RunRecord.load(run / RECORD)
    assert record.stopped_by == "stop file"
    assert record.steps in (2, 3)
    assert record.best_epoch == 0
    assert (run / WEIGHTS).exists()
    assert not (run / "stop").exists()
    with (run / METRICS).open() as file:
        assert len(list(csv.DictReader(file))) == 1


def test_a_signal_ends_a_run_with_all_it_learnt(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    def send(state: TrainingState) -> None:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_plan, tiny_dataset, out=run, epochs=50, progress=send)
    assert {n: signal.getsignal(n) for n in before} == before
    record = RunRecord.load(run / RECORD)
    assert (record.stopped_by, record.best_epoch) == ("interrupt", 0)
    assert record.steps in (2, 3)
    assert (run / WEIGHTS).exists()
    assert not (run / "cache").exists()


def test_a_second_signal_ends_a_run_at_once(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    def send(state: TrainingState) -> None:
        if state.step == 8:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_plan, tiny_dataset, out=tmp_path / "run", epochs=50, progress=send)
    record = RunRecord.load(tmp_path / "run" / RECORD)
    assert (record.stopped_by, record.epochs, record.steps) == ("interrupt", 1, 8)
