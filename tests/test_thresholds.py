"""Thresholds of probability and volume: how they cut, and how they are chosen."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from effseg.cli.application import app
from effseg.dataset import read_dataset
from effseg.errors import CheckpointError, DataError
from effseg.evaluation import MarginCounts, best_cuts, bins_of, labels_at, threshold_of
from effseg.evaluation.margins import EDGES, NEUTRAL
from effseg.inference import predict, write_margins
from effseg.io import read_volume
from effseg.plans import InferenceConfig, Plan, PostprocessConfig
from effseg.postprocess import remove_components
from effseg.resample import AffineHead, Maps, Slabs, label_slabs
from effseg.validation import Thresholds, choose_thresholds
from effseg.validation.smallest import CaseComponents, best_minimum
from effseg.volume import Grid


@settings(max_examples=40, deadline=None)
@given(
    n_classes=st.integers(2, 5),
    head=st.booleans(),
    cuts=st.lists(st.sampled_from([-np.inf, -2.0, 0.0, 1.5, 9.0]), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_likeliest_label_has_a_voxel_where_it_is_above_its_cut(
    n_classes, head, cuts, seed
) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid((9, 5, 4))
    features = rng.normal(size=(2 if head else n_classes, *grid.shape)).astype(np.float32)
    layer = AffineHead(
        weight=rng.normal(size=(n_classes, 2)).astype(np.float32),
        bias=rng.normal(size=n_classes).astype(np.float32),
    )

    def labelled(some_cuts) -> tuple[np.ndarray, np.ndarray]:
        parts = iter([(0, features)])
        slabs = Slabs(axis=0, shape=grid.shape, parts=parts, head=layer if head else None)
        values, maps = [3 * i for i in range(n_classes)], Maps(entropy=True, margin=True)
        (_, labels, made), *_ = label_slabs(
            slabs, grid, grid, values=values, maps=maps, cuts=some_cuts
        )
        return labels // 3, made[-1]

    logits = features.astype(np.float64)
    if head:
        logits = np.tensordot(layer.weight, logits, 1) + layer.bias[:, None, None, None]
    foreground = logits[1:].argmax(0)
    gap = logits[1:].max(0) - logits[0]
    labels, margin = labelled(cuts[: n_classes - 1])
    np.testing.assert_allclose(margin, gap, atol=1e-5)
    np.testing.assert_array_equal(
        labels, np.where(gap > np.array(cuts)[foreground], foreground + 1, 0)
    )
    np.testing.assert_array_equal(labelled([0.0] * (n_classes - 1))[0], labelled([])[0])


def test_a_threshold_of_two_labels_is_the_probability_of_the_foreground() -> None:
    (cut,) = InferenceConfig(thresholds=(0.2,)).cuts
    assert 1 / (1 + np.exp(-cut)) == pytest.approx(0.2)
    assert InferenceConfig().cuts == ()
    assert InferenceConfig(thresholds=(0.5,)).cuts == (0,)
    with pytest.raises(ValidationError):
        InferenceConfig(thresholds=(1.0,))


def test_a_plan_has_a_threshold_for_each_label_or_none(tiny_plan: Plan) -> None:
    content = tiny_plan.model_dump()
    content["inference"]["thresholds"] = [0.5]
    with pytest.raises(ValidationError, match="has 1 entries; there are 2 foreground labels"):
        Plan.model_validate(content)
    del content["inference"]["thresholds"]  # as plans of older versions
    assert Plan.model_validate(content) == tiny_plan


def test_counts_give_the_dice_of_every_cut() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(3, 6, 7, 8))
    reference = rng.integers(0, 4, (6, 7, 8)).astype(np.uint8)  # 3 is ignored
    reference[reference == 2] = 1
    codes = 256 * (logits[1:].argmax(0) + 1) + bins_of(logits[1:].max(0) - logits[0])
    counts = MarginCounts.none(3)
    for start in (0, 4):
        counts.add(codes[start : start + 4], reference[start : start + 4])
    dice = counts.dice()
    assert dice.shape == (2, len(EDGES))
    for cut in (0, 90, NEUTRAL, 200, len(EDGES) - 1):
        labels = labels_at(codes, (cut, NEUTRAL))
        hit = np.count_nonzero((labels == 1) & (reference == 1))
        guess = np.count_nonzero((labels == 1) & (reference < 3))
        expected = 2 * hit / (guess + np.count_nonzero(reference == 1))
        assert dice[0, cut] == pytest.approx(expected)
    np.testing.assert_array_equal(
        labels_at(codes, (NEUTRAL, NEUTRAL)), np.where(reference < 9, logits.argmax(0), 0)
    )


def test_the_best_cut_is_the_nearest_of_equal_ones() -> None:
    dice = np.full((2, 2, len(EDGES)), 0.5)
    dice[:, 0, 40:60] = 0.7
    dice[1] = np.nan
    assert best_cuts(dice) == (59, NEUTRAL)
    assert best_cuts(dice[1:]) == (NEUTRAL, NEUTRAL)
    assert threshold_of(NEUTRAL) == 0.5


def case_of(prediction: np.ndarray, reference: np.ndarray) -> CaseComponents:
    return CaseComponents.of(prediction, reference, n_labels=2, voxel_mm3=2.0)


def test_components_are_judged_as_they_are_removed() -> None:
    rng = np.random.default_rng(1)
    prediction = (rng.random((12, 12, 12)) < 0.08).astype(np.uint8)
    prediction[2:6, 2:6, 2:6] = 1
    reference = rng.integers(0, 3, prediction.shape).astype(np.uint8)  # 2 is ignored
    rule = PostprocessConfig(minimum_mm3=8)
    cleaned, _ = remove_components(prediction, 2.0, rule)
    counted = reference < 2
    hit = np.count_nonzero((cleaned == 1) & (reference == 1))
    total = np.count_nonzero(cleaned[counted]) + np.count_nonzero(reference == 1)
    assert case_of(prediction, reference).dice(rule)[0] == pytest.approx(2 * hit / total)


def test_the_smallest_volume_drops_what_is_wrong_and_no_more() -> None:
    reference = np.zeros((10, 10, 10), np.uint8)
    reference[:3, :3, :3] = 1
    prediction = reference.copy()
    prediction[8:, 8:, 8:] = 1  # 8 voxels of noise, 16 mm3
    cases = [case_of(prediction, reference), case_of(reference, reference)]
    assert best_minimum(cases, PostprocessConfig()) == 54
    assert best_minimum(cases, PostprocessConfig(minimum_mm3=20)) == 20
    assert best_minimum(cases[1:], PostprocessConfig()) == 0
    nothing = np.zeros_like(reference)
    assert best_minimum([case_of(nothing, nothing)], PostprocessConfig()) == 0


@pytest.fixture
def shy(tiny_run: Path, tmp_path: Path) -> Path:
    """A run that takes too much for background."""
    run = shutil.copytree(tiny_run, tmp_path / "shy")
    state = load_file(run / "model.safetensors")
    state["heads.0.conv.bias"][0] += 2.5
    save_file(state, run / "model.safetensors")
    return run


def test_predictions_are_cut_as_the_margins_say(
    shy: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    case = read_dataset(tiny_dataset).cases[0]
    codes = read_volume(write_margins(shy, case, tmp_path / "codes.nii.gz"))
    assert codes.array.dtype == np.uint16
    plan = Plan.load(shy / "plan.json")
    for cuts in ((NEUTRAL, NEUTRAL), (80, 160)):
        thresholds = tuple(map(threshold_of, cuts))
        inference = InferenceConfig(thresholds=thresholds)
        plan.model_copy(update={"inference": inference}).save(shy / "plan.json")
        np.testing.assert_array_equal(predict(shy, case).array, labels_at(codes.array, cuts))


def test_a_shy_run_is_set_right(shy: Path, tiny_dataset: Path) -> None:
    chosen = choose_thresholds(shy, memory="1GiB")
    assert (chosen.n_cases, chosen.n_groups, chosen.taken) == (2, 2, True)
    assert chosen.dice_after > chosen.dice_before + 0.05
    assert min(label.threshold for label in chosen.labels) < 0.3
    plan = Plan.load(shy / "plan.json")
    assert plan.inference.thresholds == tuple(label.threshold for label in chosen.labels)
    assert plan.inference.postprocess.minimum_mm3 == chosen.minimum_mm3
    assert "held-out cases" in plan.reasons["thresholds"]
    assert Thresholds.load(shy / "validation" / "thresholds.json") == chosen
    assert not [path for path in (shy / "validation").iterdir() if path.name.startswith(".")]


def held_out(run: Path, *names: str) -> None:
    record = json.loads((run / "run.json").read_text())
    record["validation"] = list(names)
    (run / "run.json").write_text(json.dumps(record))


def test_each_run_is_judged_by_the_others(
    shy: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(tiny_run, tmp_path / "other")
    held_out(shy, "ball_0", "ball_1")
    held_out(other, "ball_2")
    monkeypatch.setattr(
        "effseg.validation.thresholds.best_cuts", lambda dice: (10 * len(dice), NEUTRAL)
    )
    before = (other / "plan.json").read_text()
    chosen = choose_thresholds([shy, other])
    assert (chosen.n_cases, chosen.n_groups) == (3, 2)
    # from all three; cuts that were made up do not help
    assert chosen.labels[0].threshold == pytest.approx(threshold_of(30))
    assert not chosen.taken
    assert (other / "plan.json").read_text() == before
    held_out(other, "ball_1", "ball_2")  # one case in both: cases are dealt, not runs
    assert choose_thresholds([shy, other]).n_groups == 3


def test_what_cannot_be_judged_is_refused(shy: Path, tiny_run: Path, tmp_path: Path) -> None:
    held_out(shy, "ball_0")
    with pytest.raises(DataError, match="other patients"):
        choose_thresholds(shy)
    with pytest.raises(CheckpointError, match="no run"):
        choose_thresholds([])
    other = shutil.copytree(tiny_run, tmp_path / "other")
    plan = Plan.load(other / "plan.json")
    labels = (plan.labels[0], plan.labels[2], plan.labels[1])
    plan.model_copy(update={"labels": labels}).save(other / "plan.json")
    with pytest.raises(CheckpointError, match="differ in labels"):
        choose_thresholds([shy, other])


def test_the_command_line_prints_what_was_chosen(shy: Path) -> None:
    done = CliRunner().invoke(app, ["thresholds", str(shy)])
    assert done.exit_code == 0, done.output
    assert "Dice at 0.5" in done.output
    assert "written into the plans" in done.output
