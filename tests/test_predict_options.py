"""Parts of an image, a coarse run before a fine one, probabilities and entropy."""

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import entr, expit, softmax

from effseg.errors import DataError, MemoryBudgetError, PlanError
from effseg.inference import Run, load_run, predict
from effseg.inference.region import Region
from effseg.io import read_volume
from effseg.memory import Free, free
from effseg.plans import Label, Plan, PostprocessConfig
from effseg.preprocess import prepare_image
from effseg.resample import AffineHead, Maps, Slabs, label_slabs, resample_like
from effseg.volume import AxisOrder, Grid, Volume

NOTHING = PostprocessConfig(fraction_of_largest=None)
TURNED = AxisOrder(order=(2, 0, 1), flips=(True, False, True))


def run_of(plan: Plan, n_classes: int) -> Run:
    """An untrained network with this many classes, at a spacing of its own."""
    from effseg.networks import build_network

    network = plan.network.model_copy(update={"out_channels": n_classes})
    labels = tuple(Label(value=2 * i, name=f"label {i}") for i in range(n_classes))
    changes = {"network": network, "labels": labels, "spacing": (1.5, 0.9, 1.2)}
    return Run(
        folder=Path("nowhere"),
        plan=plan.model_copy(update=changes),
        network=build_network(network).eval(),
    )


def volume_of(*shape: int, order: AxisOrder = TURNED) -> Volume:
    grid = Grid(shape=shape, spacing=(1.0, 1.1, 1.3), origin=(4.0, -2.0, 9.0))
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Volume(array=array, grid=grid).reordered(order)


def test_auto_is_the_memory_that_is_free(
    tiny_plan: Plan, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, volume = run_of(tiny_plan, 3), volume_of(20, 12, 14)
    with caplog.at_level(logging.INFO, logger="effseg"):
        got = predict(run, volume, memory="auto")
    assert "free of this" in caplog.text
    np.testing.assert_array_equal(got.array, predict(run, volume).array)
    monkeypatch.setattr(free, "free_bytes", lambda device: Free(2**20, "little"))
    with pytest.raises(MemoryBudgetError, match=r"the budget is 1 MiB; --memory \d+MiB would do"):
        predict(run, volume, memory="auto")
    with pytest.raises(PlanError, match=r"memory 'lots'.*\"auto\""):
        predict(run, volume, memory="lots")


@pytest.mark.parametrize("n_classes", [3, 40])
@pytest.mark.parametrize("is_mask", [False, True])
def test_in_a_region_labels_are_those_of_the_whole_and_outside_there_are_none(
    tiny_plan: Plan, n_classes, is_mask, caplog, tmp_path: Path
) -> None:
    run, volume = run_of(tiny_plan, n_classes), volume_of(70, 24, 26)
    whole = predict(run, volume, postprocess=NOTHING).array
    box = (slice(3, 9), slice(50, 61), slice(2, 20))
    region = box
    if is_mask:
        array = np.zeros(volume.grid.shape, np.uint8)
        array[box] = np.random.default_rng(1).integers(0, 3, array[box].shape)
        region = Volume(array=array, grid=volume.grid)
    mask = np.zeros(volume.grid.shape, bool)
    mask[box] = True if region is box else region.array[box] > 0
    with caplog.at_level(logging.INFO, logger="effseg"):
        got = predict(run, volume, postprocess=NOTHING, region=region)
    np.testing.assert_array_equal(got.array, np.where(mask, whole, 0))
    said = next(r.getMessage() for r in caplog.records if "windows were needed" in r.message)
    n_needed, _, total = said.split()[:3]
    assert 0 < int(n_needed) < int(total) / 2
    written = predict(run, volume, postprocess=NOTHING, region=region, out=tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(written.array, got.array)


def test_an_empty_region_takes_no_window(tiny_plan: Plan) -> None:
    run, volume = run_of(tiny_plan, 3), volume_of(20, 18, 19)
    seen = []
    nothing = (slice(0, 0), slice(0, 4), slice(0, 4))
    got = predict(run, volume, region=nothing, progress=lambda *at: seen.append(at))
    assert not got.array.any()
    assert not seen


def test_a_region_elsewhere_is_refused(tiny_plan: Plan) -> None:
    run, volume = run_of(tiny_plan, 3), volume_of(20, 18, 19)
    elsewhere = Volume(array=np.ones((4, 4, 4), bool), grid=Grid((4, 4, 4)))
    with pytest.raises(DataError, match="a region that does not lie on the image's grid"):
        predict(run, volume, region=elsewhere)
    with pytest.raises(DataError, match="a region with step 2"):
        predict(run, volume, region=(slice(0, 9, 2), slice(None), slice(None)))


@given(
    boxes=st.lists(st.tuples(*[st.tuples(st.integers(0, 9), st.integers(1, 5))] * 3), max_size=3),
    margin_mm=st.sampled_from([0.0, 1.0, 2.5]),
)
def test_a_box_around_what_was_found_has_its_margin_inside_the_image(boxes, margin_mm) -> None:
    grid = Grid((12, 13, 14), (1.0, 2.0, 0.5))
    found = [tuple(slice(a, min(a + n, 12)) for a, n in box) for box in boxes]
    found = [box for box in found if all(part.start < part.stop for part in box)]
    region = Region.around(found, grid, margin_mm=margin_mm)
    inside = ~region.outside(tuple(slice(0, n) for n in grid.shape))
    if not found:
        assert not inside.any()
        return
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"))
    expected = np.ones(grid.shape, bool)
    for axis, spacing in enumerate(grid.spacing):
        low = min(box[axis].start for box in found) * spacing - margin_mm
        high = max(box[axis].stop - 1 for box in found) * spacing + margin_mm
        at = index[axis] * spacing
        # as many whole voxels as hold the margin
        expected &= (at > low - spacing) & (at < high + spacing)
    np.testing.assert_array_equal(inside, expected)


def test_a_coarse_run_says_where_the_fine_one_looks(
    tiny_run: Path, tiny_dataset: Path, tmp_path: Path, caplog
) -> None:
    run = load_run(tiny_run)
    ball = read_volume(tiny_dataset / "images" / "ball_0.nii.gz")
    grid = Grid((64, 40, 40), (1.0, 1.0, 1.0))
    array = np.random.default_rng(0).normal(0, 20, grid.shape).astype(np.float32)
    small = ball.reordered(ball.grid.canonical_axes()).array
    array[30 : 30 + small.shape[0], 4 : 4 + small.shape[1], 6 : 6 + small.shape[2]] = small
    volume = Volume(array=array, grid=grid)
    rough = load_run(tiny_run)
    spacing = tuple(1.5 * s for s in run.plan.spacing)
    object.__setattr__(rough, "plan", rough.plan.model_copy(update={"spacing": spacing}))
    fine = predict(run, volume)
    found = predict(rough, volume)
    assert fine.array.any()
    assert found.array.any()
    with caplog.at_level(logging.INFO, logger="effseg"):
        got = predict(run, volume, coarse=rough, margin_mm=3.0, postprocess=NOTHING)
    hits = np.nonzero(found.array)
    box = tuple(
        slice(max(0, int(h.min()) - 3), min(n, int(h.max()) + 4))
        for h, n in zip(hits, grid.shape, strict=True)
    )
    expected = predict(run, volume, region=box, postprocess=NOTHING)
    np.testing.assert_array_equal(got.array, expected.array)
    assert "the coarse run found something in" in caplog.text
    assert "windows were needed" in caplog.text
    inner = (slice(0, 64), slice(0, 20), slice(0, 40))
    both = predict(run, volume, coarse=rough, margin_mm=3.0, region=inner, postprocess=NOTHING)
    mask = np.zeros(grid.shape, bool)
    mask[inner] = True
    np.testing.assert_array_equal(both.array, np.where(mask, got.array, 0))


@pytest.mark.parametrize("n_classes", [3, 40])
def test_probabilities_and_entropy_are_those_of_interpolated_logits(
    tiny_plan: Plan, n_classes, tmp_path: Path
) -> None:
    run, volume = run_of(tiny_plan, n_classes), volume_of(40, 18, 19)
    out = tmp_path / "case.nii.gz"
    labels = predict(run, volume, out=out, probabilities=(4, 0), entropy=True, postprocess=NOTHING)
    np.testing.assert_array_equal(labels.array, predict(run, volume, postprocess=NOTHING).array)
    from effseg.inference import Predictor

    prepared = prepare_image(volume, run.plan)
    logits = Predictor(run.network, run.plan.patch_size).logits(prepared.image)
    native = np.stack(
        [resample_like(Volume(array=p, grid=prepared.grid), volume.grid).array for p in logits]
    ).astype(np.float64)
    shares = np.exp(native - native.max(axis=0))
    shares /= shares.sum(axis=0)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.nii.gz")}
    folders = ("probability_4", "probability_0", "entropy")
    assert found == {"case.nii.gz", *(f"{folder}/case.nii.gz" for folder in folders)}
    expected = (shares[2], shares[0], -(shares * np.log(shares)).sum(axis=0))
    for folder, values in zip(folders, expected, strict=True):
        written = read_volume(tmp_path / folder / "case.nii.gz")
        assert written.array.dtype == np.float32
        assert written.grid.difference(volume.grid, tolerance=1e-5) is None
        np.testing.assert_allclose(written.array, values, atol=2e-4)


@pytest.mark.parametrize("rule", [NOTHING, PostprocessConfig(fraction_of_largest=0.5)])
def test_maps_go_on_with_the_labels(tiny_plan: Plan, tmp_path: Path, rule) -> None:
    run, volume = run_of(tiny_plan, 3), volume_of(70, 18, 19)
    options = {"probabilities": (2,), "entropy": True, "postprocess": rule}
    first, second = tmp_path / "one" / "a.nii.gz", tmp_path / "two" / "a.nii.gz"
    predict(run, volume, out=first, **options)

    def stop(done: int, total: int) -> None:
        if done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(run, volume, out=second, resume=True, progress=stop, **options)
    predict(run, volume, out=second, resume=True, **options)
    for name in ("a.nii.gz", "probability_2/a.nii.gz", "entropy/a.nii.gz"):
        expected, got = (read_volume(path.parent / name).array for path in (first, second))
        np.testing.assert_array_equal(got, expected)
    assert not [p for p in second.parent.rglob("*") if p.name.startswith(".")]


@settings(max_examples=30, deadline=None)
@given(
    n_classes=st.integers(1, 6),
    scale=st.sampled_from([0.1, 3.0, 80.0]),
    head=st.booleans(),
    one_vs_rest=st.booleans(),
    seed=st.integers(0, 99),
)
def test_maps_are_the_same_in_whatever_order_logits_come(
    n_classes, scale, head, one_vs_rest, seed
) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid((9, 5, 4))
    features = (scale * rng.normal(size=(2 if head else n_classes, *grid.shape))).astype(np.float32)
    layer = AffineHead(
        weight=rng.normal(size=(n_classes, 2)).astype(np.float32),
        bias=rng.normal(size=n_classes).astype(np.float32),
    )
    slabs = Slabs(
        axis=0, shape=grid.shape, parts=iter([(0, features)]), head=layer if head else None
    )
    wanted = Maps(
        classes=tuple(range(n_classes))[::-1],
        entropy=True,
        confidence=True,
        one_vs_rest=one_vs_rest,
    )
    (_, labels, made), *_ = label_slabs(slabs, grid, grid, maps=wanted)
    made, confidence = made[:-1], made[-1]
    logits = features.astype(np.float64)
    if head:
        logits = np.tensordot(layer.weight, logits, 1) + layer.bias[:, None, None, None]
    if one_vs_rest:
        shares = expit(logits)
        entropy = (entr(shares) + entr(expit(-logits))).sum(axis=0)
    else:
        shares = softmax(logits, axis=0)
        entropy = entr(shares).sum(axis=0)
    np.testing.assert_allclose(made[:-1][::-1], shares, atol=1e-4)
    np.testing.assert_allclose(made[-1], entropy, atol=1e-3)
    # the label is a class of the largest probability
    chosen = np.take_along_axis(made[:-1][::-1], labels[None].astype(int), axis=0)[0]
    np.testing.assert_allclose(chosen, made[:-1].max(axis=0), atol=1e-5)
    np.testing.assert_allclose(confidence, chosen, atol=1e-5)


def test_what_was_trained_one_class_against_the_rest_has_probabilities_of_its_own(
    tiny_plan: Plan, tmp_path: Path
) -> None:
    summed = {}
    for loss in ("dice_cross_entropy", "bce_jaccard"):
        content = tiny_plan.model_dump(mode="json")
        content["training"]["loss"] = loss
        run, out = run_of(Plan.model_validate(content), 3), tmp_path / loss / "a.nii.gz"
        predict(run, volume_of(20, 18, 19), out=out, probabilities=(0, 2, 4))
        parts = [out.parent / f"probability_{value}" / out.name for value in (0, 2, 4)]
        summed[loss] = sum(read_volume(part).array for part in parts)
    np.testing.assert_allclose(summed["dice_cross_entropy"], 1, atol=1e-5)
    assert np.ptp(summed["bce_jaccard"]) > 0.01


def test_maps_that_cannot_be_had_are_refused(tiny_plan: Plan, tmp_path: Path) -> None:
    run, volume = run_of(tiny_plan, 3), volume_of(20, 18, 19)
    with pytest.raises(PlanError, match="no label 3 to give probabilities of"):
        predict(run, volume, out=tmp_path / "a.nii.gz", probabilities=(3,))
    with pytest.raises(PlanError, match="written beside `out`"):
        predict(run, volume, entropy=True)
