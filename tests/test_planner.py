"""The fingerprint, the rules, and the search for what fits."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from effseg.errors import DataError, MemoryBudgetError, PlanError
from effseg.io import write_volume
from effseg.planner import fingerprint, plan, planning, trace_plan, wish
from effseg.planner.geometry import shrinking_patches, stages_for, target_spacing
from effseg.planner.rates import Rates
from effseg.planner.recipe import learning_rate
from effseg.planner.scaling import SIZES, scale_of
from effseg.planner.step import KEPT_USUAL
from effseg.plans import Fingerprint, Plan, parse_bytes
from effseg.volume import Grid, Volume


@pytest.fixture(scope="module")
def facts(tiny_dataset: Path) -> Fingerprint:
    return fingerprint(tiny_dataset)


def test_a_fingerprint_by_hand(facts: Fingerprint) -> None:
    assert facts.n_cases == 6
    assert set(facts.shapes) == {(20, 22, 24)}  # canonical, however the files store them
    assert set(facts.spacings) == {(1.0, 1.0, 1.0)}
    core, shell = facts.labels[1], facts.labels[0]
    assert (core.value, core.n_cases, core.n_components) == (2, 6, 6)
    assert core.component_mm3[3] == pytest.approx(4 / 3 * np.pi * 27, rel=0.1)
    assert shell.voxel_share > core.voxel_share
    assert shell.small_share == 0
    (channel,) = facts.channels
    assert not channel.is_ct
    assert channel.foreground_mean == pytest.approx(112, abs=6)


def test_ct_is_known_by_its_air_and_by_its_name(tmp_path: Path) -> None:
    air = np.full((8, 8, 8), -1000, np.int16)
    air[2:6, 2:6, 2:6] = 40
    grid = Grid(shape=(8, 8, 8))
    label = Volume(array=(air > 0).astype(np.uint8), grid=grid)
    write_volume(Volume(array=air, grid=grid), tmp_path / "images" / "a.nii.gz")
    write_volume(label, tmp_path / "labels" / "a.nii.gz")
    (channel,) = fingerprint(tmp_path).channels
    assert channel.is_ct
    assert "Hounsfield" in channel.why


def test_nothing_labelled_is_nothing_to_learn(tmp_path: Path) -> None:
    grid = Grid(shape=(8, 8, 8))
    for kind, dtype in (("images", np.float32), ("labels", np.uint8)):
        volume = Volume(array=np.zeros((8, 8, 8), dtype), grid=grid)
        write_volume(volume, tmp_path / kind / "a.nii.gz")
    with pytest.raises(DataError, match="nothing to learn from"):
        fingerprint(tmp_path)


def of_spacings(facts: Fingerprint, spacings, shapes) -> Fingerprint:
    return facts.model_copy(
        update={"spacings": tuple(spacings), "shapes": tuple(shapes), "n_cases": len(spacings)}
    )


def test_the_target_spacing_is_the_median(facts: Fingerprint) -> None:
    spacings = [(1.0, 0.5, 0.5), (2.0, 0.7, 0.7), (1.2, 0.6, 0.6)]
    spacing, _ = target_spacing(of_spacings(facts, spacings, [(100, 200, 200)] * 3))
    assert spacing == (1.2, 0.6, 0.6)


def test_a_strongly_anisotropic_axis_takes_its_tenth_percentile(facts: Fingerprint) -> None:
    spacings = [(z, 1.0, 1.0) for z in (3.0, 5.0, 5.0, 5.0, 6.0)]
    spacing, why = target_spacing(of_spacings(facts, spacings, [(20, 300, 300)] * 5))
    assert spacing == (pytest.approx(np.percentile([3, 5, 5, 5, 6], 10)), 1.0, 1.0)
    assert "10th percentile" in why


def test_stages_wait_for_the_coarse_axis() -> None:
    stages = stages_for((16, 128, 128), (4.0, 1.0, 1.0))
    assert stages.strides[1:3] == ((1, 2, 2), (1, 2, 2))
    assert stages.kernels[:2] == ((1, 3, 3), (1, 3, 3))
    assert stages.strides[3] == (2, 2, 2)
    assert stages.kernels[-1] == (3, 3, 3)


@given(
    median=st.tuples(*[st.integers(4, 300)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
)
def test_patches_shrink_and_fit_their_network(median, spacing) -> None:
    before = None
    for patch, stages in shrinking_patches(median, spacing):
        assert all(n % s == 0 for n, s in zip(patch, stages.total_stride, strict=True))
        volume = np.prod(patch)
        assert before is None or volume < before
        before = volume


@pytest.mark.parametrize("memory", ["160MiB", "400MiB", "2GiB"])
def test_a_plan_fits_its_budget_and_says_why(facts: Fingerprint, memory) -> None:
    larger = of_spacings(facts, [(1.0, 1.0, 1.0)] * 2, [(90, 100, 80)] * 2)
    made = plan(larger, memory=memory, device="cpu")
    assert made.memory.peak_bytes <= parse_bytes(memory) == made.memory.budget_bytes
    assert made.batch_size >= 2
    assert set(made.reasons) >= {"patch_size", "batch_size", "spacing", "memory", "network"}
    assert Plan.model_validate_json(made.model_dump_json()) == made


@pytest.mark.slow
def test_more_memory_sees_more(facts: Fingerprint) -> None:
    larger = of_spacings(facts, [(1.0, 1.0, 1.0)] * 2, [(90, 100, 80)] * 2)
    # for a card: on a CPU the time of a step bounds the patch before memory does
    small, large = (plan(larger, memory=m, device="cuda").patch_size for m in ("800MiB", "2GiB"))
    assert np.prod(large) > 2 * np.prod(small)


def test_a_budget_too_small_names_one_that_would_do(facts: Fingerprint) -> None:
    with pytest.raises(MemoryBudgetError, match=r"--memory (\d+)MiB would do") as caught:
        plan(facts, memory="1MiB", device="cpu")
    enough = str(caught.value).split("--memory ")[1].split(" ")[0]
    assert plan(facts, memory=enough, device="cpu").batch_size == 2


def test_a_plan_for_a_card_that_is_not_here(facts: Fingerprint) -> None:
    made = plan(facts, memory="8GiB", device="cuda")
    assert (made.device, made.precision) == ("cuda", "bfloat16")


def test_unknown_devices_are_refused(facts: Fingerprint) -> None:
    with pytest.raises(PlanError, match="expected"):
        plan(facts, memory="1GiB", device="abacus")


@pytest.mark.slow
def test_real_multi_class_ct_is_planned(shared) -> None:
    made = plan(shared("openkbp-headneck"), memory="2GiB", device="cpu")
    assert [c.normalisation.kind for c in made.channels] == ["ct"]
    assert len(made.labels) == 8
    assert made.spacing[0] < made.spacing[1]


@pytest.mark.slow
def test_lesions_are_counted_each_and_kept(facts: Fingerprint) -> None:
    labels = tuple(label.model_copy(update={"small_share": 0.05}) for label in facts.labels)
    lesions = plan(facts.model_copy(update={"labels": labels}), memory="1GiB", device="cpu")
    organs = plan(facts, memory="1GiB", device="cpu")
    assert not lesions.training.loss.dice_over_batch
    assert lesions.inference.postprocess.fraction_of_largest is None
    assert lesions.inference.postprocess.minimum_mm3 > 0
    assert organs.training.loss.dice_over_batch
    assert organs.inference.postprocess.fraction_of_largest == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("name", "flips"), [("left kidney", ()), ("Kidney_R", ()), ("liver", ("x",))]
)
def test_labels_with_a_side_are_not_flipped(facts: Fingerprint, name, flips) -> None:
    labels = (facts.labels[0].model_copy(update={"name": name}), facts.labels[1])
    made = plan(facts.model_copy(update={"labels": labels}), memory="1GiB", device="cpu")
    assert made.training.augment.flip_axes == flips


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a step may take depends on the threads there are."""
    two = Rates(flops=120e9, bytes=10e9, operators=4e5, why="2 threads, nominally")
    monkeypatch.setattr(wish, "nominal_rates", lambda device: two)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_on_a_cpu_a_step_stays_short(facts: Fingerprint) -> None:
    larger = of_spacings(facts, [(1.0, 1.0, 1.0)] * 2, [(200, 300, 300)] * 2)
    on_cpu = plan(larger, memory="4GiB", device="cpu")
    on_card = plan(larger, memory="4GiB", device="cuda")
    assert 4 * np.prod(on_cpu.patch_size) < np.prod(on_card.patch_size)
    assert (
        "on 2 threads, nominally, a step is to take 0.8 s at most" in on_cpu.reasons["patch_size"]
    )


@pytest.mark.usefixtures("two_threads")
def test_on_a_cpu_a_whole_case_may_take_half_a_step(facts: Fingerprint) -> None:
    cube = of_spacings(facts, [(1.0, 1.0, 1.0)] * 2, [(50, 50, 50)] * 2)
    made = plan(cube, memory="4GiB", device="cpu")
    assert made.patch_size == (48, 48, 48)
    assert made.batch_size == 2
    assert ", while a step takes 0.8 s at most" in made.reasons["batch_size"]


@pytest.mark.usefixtures("two_threads")
def test_a_cpu_keeps_freed_memory_before_it_computes_nothing_twice(
    facts: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Rates(flops=5e9, bytes=100e9, operators=4e5, why="arithmetic is what takes time")
    monkeypatch.setattr(planning, "machine_rates", lambda device, precision: slow)
    cube = of_spacings(facts, [(1.0, 1.0, 1.0)] * 2, [(50, 50, 50)] * 2)
    roomy = plan(cube, memory="4GiB", device="cpu", size="b0")
    assert (roomy.network.memory, roomy.memory.heap) == ("plain", "kept")
    given_back = roomy.memory.peak_bytes / KEPT_USUAL
    tight = plan(cube, memory=int(1.6 * given_back), device="cpu", size="b0")
    assert (tight.network.memory, tight.memory.heap) == ("shared", "kept")
    assert tight.patch_size == roomy.patch_size
    assert "no room to keep freed memory" in tight.reasons["recompute"]
    tighter = plan(cube, memory=int(0.8 * given_back), device="cpu", size="b0")
    assert (tighter.network.memory, tighter.memory.heap) == ("shared", "mapped")
    assert "would keep it" in tighter.reasons["memory"]


def test_a_size_grows_depth_width_and_what_it_sees() -> None:
    scales = [scale_of(size) for size in SIZES]
    for small, large in pairwise(scales):
        assert sum(large.layers((1, 2, 4, 4))) > sum(small.layers((1, 2, 4, 4)))
        assert large.channels(16) >= small.channels(16)
        assert large.side > small.side
    assert scales[0].layers((1, 2, 4)) == (1, 2, 4)
    assert (scales[0].channels(16), scales[-1].channels(16)) == (16, 32)
    with pytest.raises(PlanError, match=r"size 'b9'; expected one of b0, .*b7"):
        scale_of("b9")


@pytest.mark.slow
def test_a_size_is_taken_as_asked_with_a_patch_worth_it(facts: Fingerprint) -> None:
    larger = of_spacings(facts, [(1.0, 1.0, 1.0)] * 2, [(90, 100, 80)] * 2)
    small, large = (plan(larger, memory="6GiB", device="cuda", size=s) for s in ("b0", "b3"))
    assert sum(large.network.encoder_layers) > sum(small.network.encoder_layers)
    assert large.network.growth_rate > small.network.growth_rate
    assert np.prod(large.patch_size) >= scale_of("b3").side ** 3
    assert "size b3" in large.reasons["network"]
    with pytest.raises(MemoryBudgetError, match="would do"):
        plan(larger, memory="500MiB", device="cuda", size="b7")


@pytest.mark.slow
def test_room_that_is_left_goes_into_a_larger_network(facts: Fingerprint) -> None:
    cube = of_spacings(facts, [(1.0, 1.0, 1.0)] * 2, [(32, 32, 32)] * 2)
    small, large = (plan(cube, memory=memory, device="cuda") for memory in ("900MiB", "8GiB"))
    assert (small.patch_size, small.batch_size) == (large.patch_size, large.batch_size)
    assert sum(large.network.encoder_layers) > sum(small.network.encoder_layers)
    assert large.reasons["network"] != small.reasons["network"]


def test_the_rate_follows_the_batch() -> None:
    assert learning_rate(4) == (3e-3, "0.003, the usual one for a batch of 4")
    assert learning_rate(2)[0] == pytest.approx(3e-3 / 2**0.5, rel=0.02)
    assert learning_rate(16)[0] == 6e-3


@pytest.mark.slow
def test_a_plan_says_what_was_weighed(facts: Fingerprint) -> None:
    larger = of_spacings(facts, [(1.0, 1.0, 1.0)] * 2, [(200, 200, 200)] * 2)
    made = plan(larger, memory="1GiB", device="cuda")
    taken, next_one, *_ = made.alternatives
    assert taken.taken
    assert taken.peak_bytes == made.memory.peak_bytes
    assert f"batch {made.batch_size}" in taken.choice
    assert not next_one.taken
    assert next_one.peak_bytes > parse_bytes("1GiB")
    assert "the budget is 1.00 GiB" in next_one.why


@pytest.mark.parametrize(
    ("share", "n_labels", "axes"),
    [(0.01, 1, ("z", "y", "x")), (0.05, 1, ("x",)), (0.01, 2, ("x",))],
)
def test_a_small_target_is_flipped_along_every_axis(facts, share, n_labels, axes) -> None:
    labels = tuple(
        facts.labels[0].model_copy(update={"name": name, "value": value, "voxel_share": share})
        for value, name in enumerate(("nodule", "vessel")[:n_labels], 1)
    )
    made = plan(facts.model_copy(update={"labels": labels}), memory="1GiB", device="cpu")
    assert made.training.augment.flip_axes == axes


@pytest.mark.slow
def test_dice_is_of_each_sample_where_sizes_vary(facts: Fingerprint) -> None:
    sizes = (90.0, 100.0, 300.0, 500.0, 700.0, 900.0, 1000.0)
    varied = facts.labels[0].model_copy(update={"component_mm3": sizes, "small_share": 0.0})
    even = varied.model_copy(update={"component_mm3": (90.0, 150.0, *sizes[2:])})
    by_sample = plan(facts.model_copy(update={"labels": (varied,)}), memory="1GiB", device="cpu")
    by_batch = plan(facts.model_copy(update={"labels": (even,)}), memory="1GiB", device="cpu")
    assert not by_sample.training.loss.dice_over_batch
    assert "9 times as large" in by_sample.reasons["loss"]
    assert by_batch.training.loss.dice_over_batch


@pytest.mark.slow
def test_samples_go_one_after_the_other_where_that_shows_more(facts: Fingerprint) -> None:
    larger = of_spacings(facts, [(1.0, 1.0, 1.0)] * 2, [(300, 300, 300)] * 2)
    made = plan(larger, memory="2GiB", device="cuda")
    assert made.sample_by_sample
    whole = [one for one in made.alternatives if "one after the other" not in one.choice]
    assert all(one.seconds is not None for one in whole)
    peak = trace_plan(made.model_copy(update={"sample_by_sample": False})).device_bytes
    assert peak is not None
    assert peak > 2**31 >= made.memory.peak_bytes
    with pytest.raises(ValidationError, match="batch norm needs a batch as a whole"):
        Plan.model_validate(
            made.model_dump() | {"network": made.network.model_dump() | {"norm": "batch"}}
        )
