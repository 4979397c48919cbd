"""The learning-rate range test: what it tries, what it suggests, and that it leaves no trace."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import effseg
from effseg.errors import DataError, PlanError
from effseg.losses import CompoundLoss
from effseg.plans import Plan
from effseg.report import write_report
from effseg.training import LearningRates, find_learning_rate, fit, train

RATES = tuple(10 ** (-6 + i / 10) for i in range(61))


def test_the_suggestion_is_the_middle_of_the_steepest_decade() -> None:
    """Level at 2 up to 1e-4, down by 1 over the decade to 1e-3, level, and up from 1e-1."""
    decades = [math.log10(rate) for rate in RATES]
    losses = tuple(2 - min(max(d + 4, 0), 1) + 10 * max(d + 1, 0) for d in decades)
    found = LearningRates.of(RATES, losses)
    assert found.suggestion == pytest.approx(10**-3.5)
    assert found.smoothed[0] == losses[0]
    assert found.smoothed[1] == pytest.approx((0.9 * losses[0] + losses[1]) / 1.9)


def test_noise_moves_it_by_less_than_half_a_decade() -> None:
    decades = torch.tensor(RATES).log10()
    losses = 2 - torch.sigmoid(4 * (decades + 3)) + 0.05 * torch.randn(len(RATES))
    found = LearningRates.of(RATES, tuple(losses.tolist()))
    assert abs(math.log10(found.suggestion) + 3) < 0.5


@pytest.mark.parametrize("losses", [(1.0,) * 61, tuple(1 + i / 61 for i in range(61)), (1.0, 0.5)])
def test_a_loss_that_does_not_fall_has_no_suggestion(losses) -> None:
    with pytest.raises(DataError, match="the loss fell at no learning rate between 1e-06 and"):
        LearningRates.of(RATES[: len(losses)], losses)


def test_rates_rise_on_real_batches_and_nothing_stays(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    length = tiny_plan.training.model_copy(update={"epochs": None})  # needs none
    plan = tiny_plan.model_copy(update={"training": length})
    one, other = (
        effseg.find_learning_rate(
            plan, tiny_dataset, steps=24, progress=lambda *done: told.append(done)
        )
        for _ in range(2)
    )
    assert one == other
    ratios = [b / a for a, b in zip(one.rates, one.rates[1:], strict=False)]
    assert ratios == pytest.approx([10 ** (6 / 23)] * len(ratios))
    assert one.rates[0] == pytest.approx(1e-6)
    assert one.losses[-1] > 0
    assert 1e-5 < one.suggestion < 0.3
    assert told[: len(one.rates)] == [(i + 1, 24) for i in range(len(one.rates))]
    with one.save(tmp_path / "rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == list(one.losses)


def test_it_stops_where_the_loss_has_diverged(
    tiny_plan: Plan, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is ten times itself from step 24 on, and no number from step 28 on."""
    n_steps = [0]
    forward = CompoundLoss.forward

    def diverging(self, logits, labels):
        n_steps[0] += 1
        factor = 1.0 if n_steps[0] < 24 else 10.0 if n_steps[0] < 28 else math.nan
        return forward(self, logits, labels) * factor

    monkeypatch.setattr(CompoundLoss, "forward", diverging)
    found = find_learning_rate(tiny_plan, tiny_dataset, steps=50)
    assert 24 <= len(found.rates) < 28


def test_too_few_steps_are_refused(tiny_plan: Plan, tiny_dataset: Path) -> None:
    with pytest.raises(PlanError, match="5 steps of a learning-rate test; expected 20 at least"):
        find_learning_rate(tiny_plan, tiny_dataset, steps=5)


@pytest.mark.slow
def test_a_run_takes_the_rate_and_learns_what_it_would_with_that_rate(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "RANGE_TEST_STEPS", 20)
    found = train(tiny_plan, tiny_dataset, out=tmp_path / "found", find_lr=True)
    plan = Plan.load(found / "plan.json")
    rate = plan.training.optimizer.learning_rate
    with (found / "learning_rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    tried, losses = (tuple(float(row[name]) for row in rows) for name in ("learning_rate", "loss"))
    assert rate == pytest.approx(LearningRates.of(tried, losses).suggestion, rel=0.05)
    assert plan.reasons["learning_rate"].startswith(
        "the middle of the decade over which the loss falls most, of 20 steps at rates from 1e-06"
    )
    assert "Loss by learning rate" in write_report(found).read_text()
    optimizer = tiny_plan.training.optimizer.model_copy(update={"learning_rate": rate})
    given = tiny_plan.training.model_copy(update={"optimizer": optimizer})
    told = train(
        tiny_plan.model_copy(update={"training": given}), tiny_dataset, out=tmp_path / "told"
    )
    one, other = (load_file(run / "model.safetensors") for run in (found, told))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((found / "run.json").read_text())["steps"] == 12
