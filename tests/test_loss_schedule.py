"""Which loss when: by epoch or by a score that stalls; what is kept and written of it."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loss_of import loss_of
from pydantic import ValidationError

from effseg.losses import DeepSupervisionLoss, ScheduledLoss
from effseg.planner.step import trace_plan
from effseg.plans import LossChange, LossConfig, Plan, TrainingConfig
from effseg.record import METRICS, RECORD, RunRecord
from effseg.report import write_report
from effseg.training import train
from effseg.training.loss_schedule import LossSchedule
from effseg.training.module import SegmentationModule

FOCAL = LossConfig(dice_weight=0.0, focal_gamma=2.0)
TVERSKY = LossConfig(dice_weight=0.0, tversky_weight=1.0, cross_entropy_weight=0.0)


def scheduled(plan: Plan, *changes: LossChange) -> Plan:
    training = plan.training.model_copy(update={"loss_schedule": changes})
    return Plan.model_validate(plan.model_copy(update={"training": training}).model_dump())


def run_epochs(changes: tuple[LossChange, ...], scores: list[float]) -> list[int]:
    """Which loss each epoch had, where validation gives these scores."""
    schedule = LossSchedule(changes)
    loss = ScheduledLoss([loss_of() for _ in range(len(changes) + 1)])
    notes: list[str] = []
    module, stages = SimpleNamespace(loss=loss, note=notes.append), []
    for epoch, score in enumerate(scores):
        trainer = SimpleNamespace(
            current_epoch=epoch,
            global_step=10 * epoch,
            is_global_zero=True,
            callback_metrics={"validation_dice": torch.tensor(score)},
        )
        schedule.on_train_epoch_start(trainer, module)
        stages.append(loss.stage)
        schedule.on_validation_end(trainer, module)
    assert len(notes) == stages[-1]
    assert all(" from here on, " in note for note in notes)
    return stages


def test_changes_from_an_epoch_on() -> None:
    changes = (LossChange(loss=FOCAL, from_epoch=2), LossChange(loss=TVERSKY, from_epoch=3))
    assert run_epochs(changes, [0.1] * 5) == [0, 0, 1, 2, 2]


def test_changes_when_the_score_stalls_and_counts_anew_then() -> None:
    changes = tuple(LossChange(loss=loss, stalled_epochs=2) for loss in (FOCAL, TVERSKY))
    scores = [0.1, 0.3, 0.2, 0.3, 0.1, 0.2, 0.2, 0.1, 0.5]
    #          best at 1, two without: 4; then from 0.1 on: best at 5, two without: 8
    assert run_epochs(changes, scores) == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_whichever_comes_first() -> None:
    change = LossChange(loss=FOCAL, from_epoch=5, stalled_epochs=2)
    assert run_epochs((change,), [0.3, 0.2, 0.2, 0.2]) == [0, 0, 0, 1]
    assert run_epochs((change,), [0.1 * i for i in range(7)]) == [0] * 5 + [1] * 2


def test_a_checkpoint_keeps_where_the_schedule_is() -> None:
    loss, again = (ScheduledLoss([loss_of(), loss_of(balanced=True, n_channels=2)]) for _ in "ab")
    loss.stage = 1
    loss(torch.randn(1, 2, 5), torch.ones(1, 5, dtype=torch.int64))
    again.load_state_dict(loss.state_dict())
    assert again.stage == 1
    assert torch.equal(again.now.balance.shares, loss.now.balance.shares)
    schedule, later = (LossSchedule([LossChange(loss=FOCAL, stalled_epochs=1)]) for _ in "ab")
    schedule.best_score, schedule.best_epoch = 0.5, 3
    later.load_state_dict(schedule.state_dict())
    assert (later.best_score, later.best_epoch) == (0.5, 3)


def test_is_the_loss_of_its_stage() -> None:
    logits, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 4, 4, 4))
    stages = [loss_of(), loss_of(focal_gamma=2.0)]
    loss = ScheduledLoss(stages)
    outputs = [logits, logits[..., ::2, ::2, ::2]]
    for stage, now in enumerate(stages):
        loss.stage = stage
        assert torch.equal(loss(logits, labels), now(logits, labels))
        deep = DeepSupervisionLoss(loss)(outputs, labels)
        assert torch.equal(deep, DeepSupervisionLoss(now)(outputs, labels))


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValidationError, match="needs from_epoch, stalled_epochs or both"):
        LossChange(loss=FOCAL)
    with pytest.raises(ValidationError, match=r"epochs \[3, 3\]; expected rising"):
        TrainingConfig(loss_schedule=(LossChange(loss=FOCAL, from_epoch=3),) * 2)


def test_the_step_that_takes_most_counts(tiny_plan: Plan) -> None:
    heavy = LossConfig(edge_weight=1.0)
    plain, first = trace_plan(tiny_plan), scheduled(tiny_plan, LossChange(loss=heavy, from_epoch=1))
    alone = tiny_plan.training.model_copy(update={"loss": heavy})
    assert (
        trace_plan(first).peak_bytes
        == trace_plan(tiny_plan.model_copy(update={"training": alone})).peak_bytes
        >= plain.peak_bytes
    )


def test_a_run_says_when_its_loss_changed(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    balanced = LossConfig(balanced=True, focal_gamma=2.0)
    plan = scheduled(tiny_plan, LossChange(loss=balanced, from_epoch=1))
    training = plan.training.model_copy(update={"steps_per_epoch": 1, "validation_patches": 1})
    run = train(
        plan.model_copy(update={"training": training}), tiny_dataset, out=tmp_path / "run", epochs=2
    )
    (change,) = RunRecord.load(run / RECORD).changes
    assert (change.epoch, change.step) == (1, 1)
    assert change.what == (
        "the loss is 1 dice + 1 cross entropy (focal_gamma 2.0, balanced) from here on, as planned "
        "from epoch 1"
    )
    with (run / METRICS).open(encoding="utf-8") as file:
        assert [row["loss_stage"] for row in csv.DictReader(file)] == ["0", "1"]
    page = write_report(run).read_text(encoding="utf-8")
    assert change.what in page
    assert page.count(">loss 2<") == 2  # in both charts
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    module = SegmentationModule(plan)
    module.load_state_dict(checkpoint["state_dict"])
    assert module.loss.stage == 1
    assert module.loss.now.balance.seen == pytest.approx(0.1)  # of the one step it had
