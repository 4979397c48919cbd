"""Training on phantoms: it learns, it repeats, it leaves nothing half-written."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from effseg.dataset import read_dataset
from effseg.errors import CheckpointError, DataError, PlanError
from effseg.evaluation import Scores
from effseg.planner import plan as make_plan
from effseg.plans import AugmentConfig, Plan, TrainingConfig
from effseg.record import RECORD, RunRecord
from effseg.training import TrainingState, choose_fold, train
from effseg.training.cache import cache_case
from effseg.training.choices import with_choices
from effseg.training.clock import Clock
from effseg.training.data import PatchData
from effseg.training.module import SegmentationModule
from effseg.training.patches import ValidationPatches, draw_start, read_patch
from effseg.validation import validate


def with_training(plan: Plan, **changes: object) -> Plan:
    return plan.model_copy(update={"training": plan.training.model_copy(update=changes)})


def test_a_run_holds_what_it_promises(tiny_run: Path, tiny_plan: Plan) -> None:
    names = {path.name for path in tiny_run.iterdir()}
    assert {"plan.json", "run.json", "metrics.csv", "model.safetensors", "checkpoints"} <= names
    assert "cache" not in names
    assert Plan.load(tiny_run / "plan.json").patch_size == tiny_plan.patch_size
    record = json.loads((tiny_run / "run.json").read_text())
    assert record["stopped_by"] == "epochs"
    assert (record["epochs"], record["steps"]) == (6, 36)
    assert record["memory"]["measured_peak_bytes"] > 0
    assert set(record["train"]).isdisjoint(record["validation"])
    with (tiny_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert set(rows[0]) >= {"minutes", "learning_rate", "validation_dice_label_1", "peak_bytes"}


def test_it_learns_the_balls(tiny_run: Path) -> None:
    scores = Scores.load(tiny_run / "validation" / "metrics.json")
    assert scores.mean_dice is not None
    assert scores.mean_dice > 0.5
    assert all(Path(str(case.prediction)).is_file() for case in scores.cases)


def test_the_same_seed_gives_the_same_weights(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    runs = [
        train(tiny_plan, tiny_dataset, out=tmp_path / name, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_workers_change_nothing(tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path) -> None:
    runs = [
        train(with_training(tiny_plan, workers=n), tiny_dataset, out=tmp_path / str(n))
        for n in (0, 2)
    ]
    none, two = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(none[name], two[name]) for name in none)


def test_a_policy_named_in_a_call_takes_the_place_of_the_plans(tiny_plan: Plan) -> None:
    mine = AugmentConfig(flip_axes=("z",), gamma=0.7, final_probability=0.2, ignore_outside=True)
    plan = with_training(tiny_plan, augment=mine)
    length = {"minutes": None, "epochs": 3, "device": None, "seed": None}
    assert with_choices(plan, **length).training.augment == mine
    strong = with_choices(plan, **length, augment="strong").training.augment
    assert strong == AugmentConfig(
        policy="strong", flip_axes=("z",), final_probability=0.2, ignore_outside=True
    )


def test_augmentation_goes_by_the_share_of_the_run_that_is_over(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Four epochs from all to nothing, the last one off; workers change no patch."""
    augment = AugmentConfig(policy="off", flip=1.0, final_probability=0.0, off_for_last=0.25)
    flipped = {}
    for workers in (0, 2):
        plan = with_training(
            tiny_plan, augment=augment, epochs=4, steps_per_epoch=8, workers=workers
        )
        case = read_dataset(tiny_dataset).cases[:1]
        data = PatchData(plan, case, case, tmp_path / str(workers))
        plain = replace(data.augmentation, config=AugmentConfig(policy="off"))
        clock, changed = Clock(plan.training), []
        for epoch in range(4):
            data.trainer = SimpleNamespace(
                world_size=1,
                current_epoch=epoch,
                global_step=8 * epoch,
                lightning_module=SimpleNamespace(clock=clock),
            )
            loader = data.train_dataloader()
            batches = [image for image, _ in loader]
            loader.dataset.augmentation = plain
            changed.append(
                [
                    not torch.equal(image, loader.dataset[i][0])
                    for i, image in enumerate(torch.cat(batches))
                ]
            )
        flipped[workers] = changed
    assert flipped[0] == flipped[2]
    shares = [sum(epoch) / 16 for epoch in flipped[0]]
    assert shares[0] == 1
    assert 0 < shares[2] < 1  # chances 2/3 and 1/3 between
    assert shares[3] == 0


def test_metrics_say_how_much_was_augmented(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    augment = AugmentConfig(final_probability=0.0, off_for_last=0.25)
    plan = with_training(tiny_plan, augment=augment, epochs=4, steps_per_epoch=1)
    run = train(plan, tiny_dataset, out=tmp_path / "run")
    with (run / "metrics.csv").open() as file:
        found = [float(row["augment_probability"]) for row in csv.DictReader(file)]
    assert found == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-4)


def test_voxels_from_outside_are_ignored_where_the_plan_says_so(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    shrink = {"affine": 1.0, "rotate_degrees": 0.0, "scale": (0.5, 0.5)}
    case = read_dataset(tiny_dataset).cases[:1]
    found = {}
    for ignored in (False, True):
        augment = AugmentConfig(policy="off", ignore_outside=ignored, **shrink)
        plan = with_training(tiny_plan, augment=augment)
        data = PatchData(plan, case, case, tmp_path / str(ignored))
        image, label = next(iter(data.train_dataloader()))
        module = SegmentationModule(plan)
        with torch.no_grad():
            loss = module.loss(module.network(image), label)
        assert loss.isfinite()
        found[ignored] = (label == len(plan.labels), float(loss))
    assert not found[False][0].any()
    assert found[True][0].float().mean() == 1 - 0.5**3
    assert found[True][1] != found[False][1]
    still = AugmentConfig(policy="off", ignore_outside=True)
    assert not with_training(tiny_plan, augment=still).ignores_voxels


@pytest.mark.slow
def test_two_processes_train_one_network(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = train(tiny_plan, tiny_dataset, out=tmp_path / "ddp", devices=2)
    record = json.loads((run / "run.json").read_text())
    assert record["n_devices"] == 2
    assert record["steps"] == 12
    with (run / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert validate(run).mean_dice is not None


def test_minutes_end_a_run(tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path) -> None:
    run = train(tiny_plan, tiny_dataset, out=tmp_path / "run", minutes=0.03)
    record = json.loads((run / "run.json").read_text())
    assert record["stopped_by"] == "minutes"
    assert 0.03 <= record["minutes"] < 0.5


def test_progress_is_told(tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path) -> None:
    states, prepared = [], []
    train(
        tiny_plan,
        tiny_dataset,
        out=tmp_path / "run",
        progress=states.append,
        preparing=lambda done, total: prepared.append((done, total)),
    )
    assert [state.step for state in states] == list(range(1, 13))
    assert states[-1].fraction == 1
    assert states[-1].dice is not None
    assert prepared[-1] == (6, 6)


def test_an_interrupt_stays_one_and_what_was_learnt_is_kept(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    def stop(state: TrainingState) -> None:
        if state.epoch == 1:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_plan, tiny_dataset, out=tmp_path / "run", progress=stop)
    assert signal.getsignal(signal.SIGINT) is handler
    record = RunRecord.load(tmp_path / "run" / RECORD)
    assert (record.stopped_by, record.epochs, record.steps) == ("interrupt", 1, 7)
    assert not (tmp_path / "run" / "cache").exists()
    assert validate(tmp_path / "run").mean_dice is not None


@pytest.mark.parametrize("exception", [SystemExit, DataError])
def test_other_ends_stay_what_they_are(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path, exception
) -> None:
    def stop(state: TrainingState) -> None:
        if state.epoch == 1:
            raise exception("enough")

    with pytest.raises(exception, match="enough"):
        train(tiny_plan, tiny_dataset, out=tmp_path / "run", progress=stop)
    assert RunRecord.load(tmp_path / "run" / RECORD).stopped_by == "error"


def test_a_folder_that_is_taken_is_left_alone(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match="not empty"):
        train(tiny_plan, tiny_dataset, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_no_folder(tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path) -> None:
    labels = (tiny_plan.labels[0], tiny_plan.labels[1])  # the maps hold a third
    network = tiny_plan.network.model_copy(update={"out_channels": 2})
    plan = tiny_plan.model_copy(update={"labels": labels, "network": network})
    with pytest.raises(DataError, match=r"label values \[2\]; the plan knows \[0, 1\]"):
        train(plan, tiny_dataset, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("minutes", "epochs", "words"),
    [
        (1, 1, "training: .*minutes 1 and epochs 1; set one of the two"),
        (0, None, "training.minutes: .* greater than 0, got 0"),
        (None, -1, "training.epochs: .* greater than or equal to 1, got -1"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path, minutes, epochs, words
) -> None:
    with pytest.raises(PlanError, match=words):
        train(tiny_plan, tiny_dataset, out=tmp_path / "r", minutes=minutes, epochs=epochs)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"device": "abacus"}, "device: .*got 'abacus'"),
        ({"seed": -1}, "training.seed: .* greater than or equal to 0, got -1"),
        ({"epochs": 1.5}, "training.epochs: .* integer.*, got 1.5"),
        ({"device": "tpu", "seed": -1}, "device: .*; training.seed: "),
        ({"augment": "wild"}, "training.augment.policy: .*'strong'.*, got 'wild'"),
    ],
)
def test_choices_that_cannot_work_are_named_in_one_line(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path, choices, words
) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        train(tiny_plan, tiny_dataset, out=tmp_path / "r", **choices)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_how_long_must_be_said(tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="how long"):
        train(with_training(tiny_plan, epochs=None), tiny_dataset, out=tmp_path / "r")


def test_a_device_that_is_not_here_is_refused(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PlanError, match="CUDA devices here"):
        train(tiny_plan, tiny_dataset, out=tmp_path / "r", device="cuda")
    assert not (tmp_path / "r").exists()


def test_folds_that_are_not_there_are_refused(tiny_dataset: Path) -> None:
    dataset = read_dataset(tiny_dataset)
    with pytest.raises(PlanError, match="there are 5"):
        choose_fold(dataset, 5)


def test_a_run_whose_data_moved_is_refused_by_name(tiny_run: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    record = json.loads((run / "run.json").read_text())
    record["validation"] = ["gone"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="case gone is no longer in"):
        validate(run)


def test_clocks_count_steps_or_seconds() -> None:
    by_steps = Clock(TrainingConfig(epochs=2, steps_per_epoch=10))
    assert [by_steps.fraction(n) for n in (0, 5, 40)] == [0, 0.25, 1]
    assert Clock(TrainingConfig(minutes=1e-9)).fraction(0) == 1
    with pytest.raises(PlanError, match="exactly one"):
        Clock(TrainingConfig())


@pytest.fixture(scope="module")
def cached(tiny_plan: Plan, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    case = read_dataset(tiny_dataset).cases[0]
    return cache_case(case, tiny_plan, tmp_path_factory.mktemp("cache"))


def test_patches_hold_the_class_that_was_drawn(cached) -> None:
    always = TrainingConfig(foreground=1.0, small_components=1.0)
    for seed in range(20):
        start = draw_start(cached, (8, 8, 8), np.random.default_rng(seed), always)
        _, label = read_patch(cached, start, (8, 8, 8))
        assert label.any()


def test_patches_reach_beyond_small_cases(cached) -> None:
    start = draw_start(cached, (32, 32, 32), np.random.default_rng(0), TrainingConfig())
    image, label = read_patch(cached, start, (32, 32, 32))
    assert image.shape == (1, 32, 32, 32)
    assert np.isclose(image, cached.fill[0]).sum() >= 32**3 - 20 * 22 * 24
    assert label.sum() == np.fromfile(cached.label.path, np.uint8).sum()  # all of the case is in


def test_validation_patches_stay_the_same(cached) -> None:
    one, two = (ValidationPatches([cached], (8, 8, 8), n_patches=3) for _ in range(2))
    assert len(one) == 3
    for i in range(3):
        assert torch.equal(one[i][0], two[i][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openkbp-headneck", "totalsegmentator"])
def test_real_multi_class_ct_trains_as_planned(shared, tmp_path: Path, name) -> None:
    dataset = shared(name)
    if name == "totalsegmentator":
        listed = tmp_path / "ct.csv"
        files = (dataset / "example_ct.nii.gz", dataset / "example_ct_seg61.nii.gz")
        listed.write_text("image,label\n" + ",".join(map(str, files)) + "\n")
        dataset = listed
    planned = make_plan(dataset, memory="2GiB", device="cpu")
    run = train(with_training(planned, steps_per_epoch=2), dataset, out=tmp_path / "r", epochs=1)
    record = json.loads((run / "run.json").read_text())
    assert record["memory"]["measured_peak_bytes"] <= planned.memory.budget_bytes
