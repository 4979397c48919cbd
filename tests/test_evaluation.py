"""Scores against published numbers, MONAI, surface-distance, and phantoms worked by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import hypothesis.extra.numpy as arrays
import monai.metrics
import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from effseg.errors import DataError, GeometryError
from effseg.evaluation import (
    CaseScore,
    LabelScore,
    Lesion,
    LesionScore,
    Scores,
    evaluate,
    evaluate_case,
)
from effseg.io import read_volume, write_volume
from effseg.volume import AxisOrder, Grid, Volume

SPACING = (2.5, 0.7, 0.8)
METRICS = ("dice", "iou", "voe", "surface_dice", "hd_mm", "hd95_mm", "assd_mm")


def volume(array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    return Volume(array=array, grid=Grid(shape=array.shape, spacing=spacing))


def empty(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


def only(score: CaseScore) -> LabelScore:
    (label,) = score.labels
    return label


def blobs(seed: int, *, shape: tuple[int, int, int] = (16, 28, 30), n: int = 2) -> np.ndarray:
    """Smooth random regions, n labels, two voxels away from every face of the volume."""
    rng = np.random.default_rng(seed)
    inner = tuple(side - 4 for side in shape)
    field = ndimage.gaussian_filter(rng.standard_normal((n, *inner)), (0, 2, 3, 3))
    labels = np.where(field.max(0) > 0.02, field.argmax(0) + 1, 0)
    return np.pad(labels, 2).astype(np.uint8)


# --- known answers -------------------------------------------------------------------------------


def test_chaos_liver_has_its_published_scores(shared: Callable[[str], Path]) -> None:
    folder = shared("chaos-liver")
    score = evaluate_case(
        read_volume(folder / "liver_sample_submission.nii.gz"),
        read_volume(folder / "liver_expert.nii.gz"),
        case="chaos",
    )
    liver = only(score)
    assert liver.dice == pytest.approx(0.97843, abs=5e-6)
    assert liver.relative_volume_difference is not None
    assert abs(liver.relative_volume_difference) == pytest.approx(0.0066453, abs=5e-8)
    assert liver.relative_volume_difference < 0  # the submission is the smaller one
    assert liver.assd_mm == pytest.approx(0.73413, abs=5e-6)
    assert liver.hd_mm == pytest.approx(14.0, abs=1e-9)
    assert liver.hd95_mm == pytest.approx(3.67, abs=5e-3)
    assert liver.reference_mm3 == pytest.approx(1_342_595 * 0.7265625**2 * 2, rel=1e-9)
    assert liver.prediction_mm3 == pytest.approx(1_333_673 * 0.7265625**2 * 2, rel=1e-9)


def test_two_slabs_by_hand() -> None:
    reference, prediction = empty(12, 10, 10), empty(12, 10, 10)
    reference[2:6, 3:7, 3:7] = 1  # 64 voxels
    prediction[3:7, 3:7, 3:7] = 1  # the same, one plane of 2.5 mm further
    label = only(evaluate_case(volume(prediction, SPACING), volume(reference, SPACING)))
    assert label.dice == 2 * 48 / 128
    assert label.iou == 48 / 80
    assert label.voe == 1 - 48 / 80
    assert label.relative_volume_difference == 0
    # Each surface has 56 voxels: 16 at the end that sticks out, 2.5 mm from the other; 4 amid the
    # other end, inside the other slab, 0.7 mm from its side; 36 have a twin.
    assert label.surface_dice == 40 / 56
    assert label.assd_mm == pytest.approx((16 * 2.5 + 4 * 0.7) / 56)
    assert label.hd95_mm == 2.5
    assert label.hd_mm == 2.5
    assert label.reference_mm3 == pytest.approx(64 * 2.5 * 0.7 * 0.8)
    assert evaluate_case(
        volume(prediction, SPACING), volume(reference, SPACING), tolerance_mm=2.5
    ).labels[0].surface_dice == pytest.approx(1.0)


def test_one_voxel_from_another_by_hand() -> None:
    reference, prediction = empty(5, 5, 5), empty(5, 5, 5)
    reference[2, 2, 0] = 1
    prediction[1, 2, 3] = 1
    label = only(evaluate_case(volume(prediction, SPACING), volume(reference, SPACING)))
    distance = math.sqrt(2.5**2 + 2.4**2)
    for value in (label.hd_mm, label.hd95_mm, label.assd_mm):
        assert value == pytest.approx(distance, rel=1e-12)
    assert (label.dice, label.iou, label.voe, label.surface_dice) == (0, 0, 1, 0)


def test_a_distance_of_exactly_the_tolerance_is_within_it() -> None:
    reference, prediction = empty(3, 3, 9), empty(3, 3, 9)
    reference[1, 1, 6] = 1
    prediction[1, 1, 7] = 1  # 7 * 0.7 - 6 * 0.7 > 0.7 in floating point
    for tolerance, expected in ((0.7, 1.0), (0.69, 0.0)):
        score = evaluate_case(
            volume(prediction, (1.0, 1.0, 0.7)),
            volume(reference, (1.0, 1.0, 0.7)),
            tolerance_mm=tolerance,
        )
        assert only(score).surface_dice == expected


# --- oracles -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_monais(seed: int) -> None:
    reference, prediction = blobs(seed), blobs(seed)
    prediction = np.roll(prediction, 1, axis=2)
    prediction[blobs(seed + 50) == 2] = 2
    prediction[:2] = prediction[-2:] = prediction[:, :2] = prediction[:, -2:] = 0
    prediction[..., :2] = prediction[..., -2:] = 0
    score = evaluate_case(volume(prediction, SPACING), volume(reference, SPACING), tolerance_mm=1.5)
    one_hot = [
        torch.stack([torch.from_numpy(a == v) for v in (0, 1, 2)])[None].float()
        for a in (prediction, reference)
    ]
    no_background, spacing = {"include_background": False}, {"spacing": SPACING}
    oracle = {
        "dice": monai.metrics.compute_dice(*one_hot, **no_background),
        "iou": monai.metrics.compute_iou(*one_hot, **no_background),
        "hd_mm": monai.metrics.compute_hausdorff_distance(*one_hot, **no_background, **spacing),
        "hd95_mm": monai.metrics.compute_hausdorff_distance(
            *one_hot, **no_background, percentile=95, **spacing
        ),
        "assd_mm": monai.metrics.compute_average_surface_distance(
            *one_hot, **no_background, symmetric=True, **spacing
        ),
        "surface_dice": monai.metrics.compute_surface_dice(
            *one_hot, class_thresholds=[1.5, 1.5], **spacing
        ),
    }
    for metric, expected in oracle.items():
        for label, number in zip(score.labels, expected[0].tolist(), strict=True):
            assert getattr(label, metric) == pytest.approx(number, rel=1e-5), (metric, label.label)
    for label in score.labels:
        r, p = (reference == label.label).sum(), (prediction == label.label).sum()
        assert label.relative_volume_difference == pytest.approx((p - r) / r)
        assert label.iou is not None
        assert label.voe == pytest.approx(1 - label.iou)


@pytest.mark.filterwarnings("ignore:Please import `.*` from the `scipy.ndimage` namespace")
@pytest.mark.parametrize("seed", range(3))
def test_distances_are_near_those_of_surface_elements(seed: int) -> None:
    # DeepMind's surface runs between the voxels and weighs by area: a voxel's diagonal apart.
    reference = blobs(seed, n=1) == 1
    prediction = np.roll(reference, 2, axis=1)
    score = only(
        evaluate_case(volume(prediction, SPACING), volume(reference, SPACING), tolerance_mm=1.5)
    )
    distances = surface_distance.compute_surface_distances(reference, prediction, SPACING)
    diagonal = math.hypot(*SPACING)
    assert score.hd95_mm == pytest.approx(
        surface_distance.compute_robust_hausdorff(distances, 95), abs=diagonal
    )
    assert score.assd_mm == pytest.approx(
        np.mean(surface_distance.compute_average_surface_distance(distances)), abs=diagonal / 2
    )
    assert score.surface_dice == pytest.approx(
        surface_distance.compute_surface_dice_at_tolerance(distances, 1.5), abs=0.1
    )


def test_the_edge_of_the_volume_is_no_surface() -> None:
    # A column cut by the first plane: were the cut surface, a longer column would seem nearer.
    reference, prediction = empty(8, 9, 9), empty(8, 9, 9)
    reference[:4, 3:6, 3:6] = 1
    prediction[:5, 3:6, 3:6] = 1
    masks = prediction == 1, reference == 1
    one, other = (np.argwhere(m & ~ndimage.binary_erosion(m, border_value=1)) for m in masks)
    gaps = np.linalg.norm(one[:, None] - other[None], axis=-1)
    distances = np.concatenate([gaps.min(0), gaps.min(1)])
    label = only(evaluate_case(volume(prediction), volume(reference)))
    assert label.assd_mm == pytest.approx(distances.mean())
    assert label.surface_dice == (distances <= 1).mean()
    # The whole volume has no surface at all: undefined, not perfect.
    full = only(evaluate_case(volume(np.ones_like(reference)), volume(np.ones_like(reference))))
    assert (full.dice, full.surface_dice, full.hd95_mm, full.assd_mm) == (1, None, None, None)


# --- empty, ignored, declared --------------------------------------------------------------------


def test_empty_cases_are_undefined_or_zero() -> None:
    nothing, something = empty(4, 4, 4), empty(4, 4, 4)
    something[1:3, 1:3, 1:3] = 1
    names = {0: "background", 1: "lesion"}
    both = only(evaluate_case(volume(nothing), volume(nothing), labels=names))
    assert both.name == "lesion"
    assert [getattr(both, m) for m in METRICS] == [None] * 7
    assert both.relative_volume_difference is None
    missed = evaluate_case(volume(nothing), volume(something), labels=names)
    invented = evaluate_case(volume(something), volume(nothing), labels=names)
    for score in (missed, invented):
        assert [getattr(only(score), m) for m in METRICS] == [0, 0, 1, 0, None, None, None]
    assert only(missed).relative_volume_difference == -1
    assert only(invented).relative_volume_difference is None
    assert (missed.lesions[0].n_reference, missed.lesions[0].n_detected) == (1, 0)
    assert missed.lesions[0].lesions[0].dice == 0
    assert (invented.lesions[0].n_reference, invented.lesions[0].n_false_positives) == (0, 1)
    assert evaluate_case(volume(nothing), volume(nothing)).labels == ()


def test_ignored_voxels_count_nowhere() -> None:
    reference, prediction = empty(6, 6, 12), empty(6, 6, 12)
    reference[2:4, 2:4, 1:5] = 1
    reference[2:4, 2:4, 5:7] = 9
    prediction[2:4, 2:4, 1:7] = 1  # runs on into the unknown: no fault
    prediction[0, 0, 0] = 9  # a network cannot mean this; it claims nothing
    label = only(evaluate_case(volume(prediction), volume(reference), ignore_label=9))
    assert (label.dice, label.surface_dice, label.hd_mm) == (1, 1, 0)
    assert label.prediction_mm3 == label.reference_mm3 == 16
    without = evaluate_case(volume(prediction * (prediction < 9)), volume(reference))
    assert [score.label for score in without.labels] == [1, 9]
    assert without.labels[0].dice == 2 * 16 / (16 + 24)


def test_an_ignored_finding_is_no_false_positive() -> None:
    reference, prediction = empty(3, 3, 20), empty(3, 3, 20)
    reference[1, 1, 2:5] = 1
    reference[1, 1, 10:12] = 9
    prediction[1, 1, 2:5] = 1
    prediction[1, 1, 11:14] = 1  # overlaps the ignored finding
    prediction[1, 1, 18] = 1  # overlaps nothing
    (found,) = evaluate_case(volume(prediction), volume(reference), ignore_label=9).lesions
    assert (found.label, found.n_reference, found.n_detected) == (1, 1, 1)
    assert found.n_false_positives == 1
    assert found.lesions[0].dice == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {1: "a"}}, "case_07: prediction holds label 2; expected 0 and 1"),
        ({"ignore_label": 0}, "ignore_label 0; expected 1"),
        ({"labels": {1: "a", 2: "b"}, "ignore_label": 2}, "also a label to score"),
        ({"labels": {0: "background"}}, "expected at least one"),
        ({"tolerance_mm": -1.0}, "tolerance_mm -1.0"),
        ({"tolerance_mm": math.nan}, "tolerance_mm nan"),
    ],
)
def test_impossible_choices_are_refused(change: dict[str, object], message: str) -> None:
    prediction, reference = empty(3, 3, 3), empty(3, 3, 3)
    prediction[0, 0, 0], reference[0, 0, 0] = 2, 1
    with pytest.raises(DataError, match=message):
        evaluate_case(volume(prediction), volume(reference), case="case_07", **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.25, r"c: prediction holds 0.25 at \(z, y, x\) = \(1, 2, 0\); expected integer labels"),
        (math.nan, "prediction holds nan at"),
        (math.inf, "prediction holds inf at"),
        (-1000.0, r"prediction holds values from -1000.0 to 0.0; .* is it the image\?"),
        (70000.0, "prediction holds values from 0.0 to 70000.0"),
    ],
)
def test_what_is_no_label_map_is_refused(value: float, message: str) -> None:
    prediction = np.zeros((3, 3, 3), np.float32)
    prediction[1, 2, 0] = value
    with pytest.raises(DataError, match=message):
        evaluate_case(volume(prediction), volume(empty(3, 3, 3)), case="c")


def test_channels_and_grids_must_agree() -> None:
    many = Volume(array=np.zeros((2, 3, 3, 3), np.uint8), grid=Grid(shape=(3, 3, 3)))
    with pytest.raises(DataError, match="reference has 2 channels"):
        evaluate_case(volume(empty(3, 3, 3)), many)
    with pytest.raises(GeometryError, match=r"c: prediction and reference differ in shape, .*\(3,"):
        evaluate_case(volume(empty(3, 3, 3)), volume(empty(3, 3, 4)), case="c")
    with pytest.raises(GeometryError, match=r"differ in spacing, .*; bring the prediction over"):
        evaluate_case(volume(empty(3, 3, 3)), volume(empty(3, 3, 3), SPACING))


@pytest.mark.parametrize("dtype", [np.bool_, np.int64, np.float64, ">i2", ">f4", np.uint16])
def test_any_type_that_holds_integers_will_do(dtype: str) -> None:
    reference = blobs(1, n=1)
    prediction = np.roll(reference, 1, axis=1)
    expected = evaluate_case(volume(prediction), volume(reference))
    frozen = prediction.astype(dtype)
    frozen.flags.writeable = False  # as a memory map is
    assert evaluate_case(volume(frozen), volume(reference.astype(dtype))) == expected


# --- lesions -------------------------------------------------------------------------------------


def test_lesions_by_hand() -> None:
    reference, prediction = empty(3, 5, 30), empty(3, 5, 30)
    reference[1, 1, 2:6] = 1  # found in two pieces
    prediction[1, 1, 2] = prediction[1, 1, 4:8] = 1
    reference[1, 1, 12:14] = 1  # missed: predicted as another label
    prediction[1, 1, 12:14] = 2
    reference[1, 1, 20] = 1  # missed
    prediction[1, 3, 27:29] = 1  # invented
    grid = Grid(shape=(3, 5, 30), spacing=SPACING, origin=(10.0, 20.0, 30.0))
    score = evaluate_case(Volume(prediction, grid), Volume(reference, grid))
    voxel = 2.5 * 0.7 * 0.8
    one, two = score.lesions
    assert (one.n_reference, one.n_detected, one.n_false_positives) == (3, 1, 1)
    assert (two.n_reference, two.n_detected, two.n_false_positives) == (0, 0, 1)
    assert [lesion.detected for lesion in one.lesions] == [True, False, False]
    assert [lesion.dice for lesion in one.lesions] == [2 * 3 / (4 + 5), 0, 0]
    assert [lesion.volume_mm3 for lesion in one.lesions] == pytest.approx(
        [4 * voxel, 2 * voxel, voxel]
    )
    assert [lesion.found_mm3 for lesion in one.lesions] == pytest.approx([4 * voxel, 0, 0])
    assert one.lesions[0].centroid_mm == pytest.approx((12.5, 20.7, 30 + 3.5 * 0.8))


def test_a_bridge_between_two_lesions_costs_both_little() -> None:
    reference, prediction = empty(1, 1, 40), empty(1, 1, 40)
    reference[0, 0, 2:14] = 1
    reference[0, 0, 18:22] = 1
    prediction[0, 0, 2:22] = 1  # one component of 20 over lesions of 12 and 4
    (found,) = evaluate_case(volume(prediction), volume(reference)).lesions
    assert found.n_detected == 2
    # 20 voxels divided 12 to 4: 15 and 5. Counted whole, the small one would have 2 * 4 / 24.
    assert [lesion.dice for lesion in found.lesions] == [2 * 12 / (12 + 15), 2 * 4 / (4 + 5)]


@pytest.mark.parametrize("seed", range(3))
def test_lesion_counts_are_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, prediction = (
        rng.integers(1, 3, (9, 12, 14)) * (rng.random((9, 12, 14)) < 0.06) for _ in range(2)
    )
    prediction[::2] = reference[::2]
    score = evaluate_case(volume(prediction), volume(reference))
    for found in score.lesions:
        true, n_true = ndimage.label(reference == found.label, np.ones((3, 3, 3)))
        guess, n_guess = ndimage.label(prediction == found.label, np.ones((3, 3, 3)))
        assert found.n_reference == n_true
        assert found.n_detected == len(set(true[(true > 0) & (guess > 0)].tolist()))
        hit = set(guess[(true > 0) & (guess > 0)].tolist())
        assert found.n_false_positives == n_guess - len(hit)
        dices = []
        for number in range(1, n_true + 1):
            touching = set(guess[true == number].tolist()) - {0}
            inside = sum(((guess == g) & (true == number)).sum() for g in touching)
            claimed = sum(
                (guess == g).sum()
                * ((guess == g) & (true == number)).sum()
                / ((guess == g) & (true > 0)).sum()
                for g in touching
            )
            dices.append(2 * inside / ((true == number).sum() + claimed))
        assert sorted(lesion.dice for lesion in found.lesions) == pytest.approx(sorted(dices))


# --- properties ----------------------------------------------------------------------------------

MAPS = arrays.arrays(
    np.uint8,
    st.tuples(*[st.integers(1, 5)] * 3),
    elements=st.sampled_from([0, 0, 1, 2, 5]),
    fill=st.just(0),
)


@settings(max_examples=50, deadline=None)
@given(MAPS, st.sampled_from([None, 5]))
def test_a_map_agrees_with_itself(labels: np.ndarray, ignore_label: int | None) -> None:
    score = evaluate_case(volume(labels), volume(labels), ignore_label=ignore_label)
    assert {s.label for s in score.labels} == set(labels[labels > 0].tolist()) - {ignore_label}
    for label in score.labels:
        assert (label.dice, label.iou, label.voe) == (1, 1, 0)
        assert label.surface_dice in (1, None)
        assert label.hd_mm in (0, None)
    for found in score.lesions:
        assert found.n_detected == found.n_reference > 0
        assert found.n_false_positives == 0
        assert all(lesion.dice == 1 for lesion in found.lesions)


@st.composite
def two_maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(*[st.integers(1, 5)] * 3))
    return tuple(
        draw(
            arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 0, 1, 2]), fill=st.just(0))
        )
        for _ in range(2)
    )  # type: ignore[return-value]


@settings(max_examples=50, deadline=None)
@given(two_maps())
def test_scores_are_symmetric(maps: tuple[np.ndarray, np.ndarray]) -> None:
    one, other = (volume(array, SPACING) for array in maps)
    there, back = evaluate_case(one, other), evaluate_case(other, one)
    for a, b in zip(there.labels, back.labels, strict=True):
        for metric in METRICS:
            assert getattr(a, metric) == pytest.approx(getattr(b, metric))
        assert a.reference_mm3 == b.prediction_mm3
        assert a.hd_mm is None or a.assd_mm <= a.hd_mm * (1 + 1e-12)
        assert a.dice == pytest.approx(2 * a.iou / (1 + a.iou))


@settings(max_examples=50, deadline=None)
@given(two_maps(), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.booleans())
def test_scores_do_not_see_the_axis_order(
    maps: tuple[np.ndarray, np.ndarray],
    order: list[int],
    flips: tuple[bool, bool, bool],
    both: bool,
) -> None:
    prediction, reference = (volume(array, SPACING) for array in maps)
    axes = AxisOrder(order=tuple(order), flips=flips)  # type: ignore[arg-type]
    plain = evaluate_case(prediction, reference)
    turned = evaluate_case(
        prediction.reordered(axes), reference.reordered(axes) if both else reference
    )
    for a, b in zip(plain.labels, turned.labels, strict=True):
        assert a.model_dump() == pytest.approx(b.model_dump())
    for c, d in zip(plain.lesions, turned.lesions, strict=True):
        assert (c.n_reference, c.n_detected, c.n_false_positives) == (
            d.n_reference,
            d.n_detected,
            d.n_false_positives,
        )
        one, two = (
            sorted(
                (*(round(mm, 6) for mm in x.centroid_mm), x.volume_mm3, x.dice) for x in s.lesions
            )
            for s in (c, d)
        )
        assert np.array(one) == pytest.approx(np.array(two))


@settings(max_examples=30, deadline=None)
@given(two_maps())
def test_distances_are_those_of_brute_force(maps: tuple[np.ndarray, np.ndarray]) -> None:
    score = evaluate_case(volume(maps[0], SPACING), volume(maps[1], SPACING))
    for label in score.labels:
        points = [
            np.argwhere(m & ~ndimage.binary_erosion(m, border_value=1)) * SPACING
            for m in (array == label.label for array in maps)
        ]
        if min(len(p) for p in points) == 0:
            assert label.hd_mm is label.hd95_mm is label.assd_mm is None
            continue
        gaps = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
        sides = gaps.min(1), gaps.min(0)
        assert label.hd_mm == pytest.approx(max(side.max() for side in sides))
        assert label.hd95_mm == pytest.approx(max(np.percentile(side, 95) for side in sides))
        assert label.assd_mm == pytest.approx(np.concatenate(sides).mean())


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three cases: perfect, one plane off, empty in both; images beside them."""
    for name in ("predictions", "references", "images"):
        (tmp_path / name).mkdir()
    one = empty(6, 7, 8)
    one[2:4, 2:5, 2:6] = 1
    cases = {"a": (one, one), "b": (np.roll(one, 1, axis=0), one), "c": (one * 0, one * 0)}
    for case, (prediction, reference) in cases.items():
        write_volume(volume(prediction, SPACING), tmp_path / "predictions" / f"{case}.nii.gz")
        write_volume(volume(reference, SPACING), tmp_path / "references" / f"{case}.mha")
        suffix = "_0000" if case == "b" else ""
        write_volume(volume(reference, SPACING), tmp_path / "images" / f"{case}{suffix}.nii.gz")
    (tmp_path / "references" / "dataset.json").write_text("{}")
    return tmp_path


def test_folders_are_scored_and_saved(folders: Path) -> None:
    seen: list[tuple[int, int]] = []
    scores = evaluate(
        folders / "predictions",
        folders / "references",
        out=folders / "new" / "metrics.json",
        labels={1: "lesion"},
        tolerance_mm=2.5,
        images=folders / "images",
        progress=lambda done, n: seen.append((done, n)),
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [case.case for case in scores.cases] == ["a", "b", "c"]
    assert scores.cases[1].image == str(folders / "images" / "b_0000.nii.gz")
    assert scores.cases[1].prediction == str(folders / "predictions" / "b.nii.gz")
    assert scores.cases[1].reference == str(folders / "references" / "b.mha")
    assert [case.labels[0].dice for case in scores.cases] == [1, 0.5, None]
    assert [case.labels[0].surface_dice for case in scores.cases] == [1, 1, None]
    assert scores.mean_dice == scores.mean("dice", 1) == 0.75
    assert scores.n_defined("dice") == 2
    assert scores.sensitivity == 1
    assert scores.mean_lesion_dice == 0.75
    assert scores.false_positives_per_case == 0
    assert "6-neighbour erosion" in scores.conventions
    assert Scores.load(folders / "new" / "metrics.json") == scores
    saved = json.loads((folders / "new" / "metrics.json").read_text())
    assert saved["cases"][2]["labels"][0]["dice"] is None
    assert [p.name for p in (folders / "new").iterdir()] == ["metrics.json"]


def test_tables(folders: Path) -> None:
    scores = evaluate(folders / "predictions", folders / "references", labels={1: "x", 2: "y"})
    table = scores.table()
    assert [(row["case"], row["label"]) for row in table] == [
        (case, label) for case in "abc" for label in (1, 2)
    ]
    assert (table[2]["dice"], table[2]["n_lesions"], table[2]["n_detected"]) == (0.5, 1, 1)
    x, y, overall = scores.summary()
    assert (x["name"], x["n_cases"], x["n_defined"], x["dice"]) == ("x", 3, 2, 0.75)
    assert (y["name"], y["n_defined"], y["dice"], y["sensitivity"]) == ("y", 0, None, None)
    assert (overall["label"], overall["name"], overall["dice"]) == (None, "all", 0.75)
    assert overall["false_positives_per_case"] == 0


def label_score(label: int, dice: float | None) -> LabelScore:
    return LabelScore(
        label=label,
        name=str(label),
        dice=dice,
        iou=None,
        voe=None,
        surface_dice=None,
        hd_mm=None,
        hd95_mm=None,
        assd_mm=None,
        relative_volume_difference=None,
        reference_mm3=0,
        prediction_mm3=0,
    )


def test_means_by_hand() -> None:
    lesion = Lesion(
        label=1, volume_mm3=1, centroid_mm=(0, 0, 0), detected=True, found_mm3=2, dice=0.5
    )
    missed = lesion.model_copy(update={"detected": False, "dice": 0.0})
    lesions = (
        LesionScore(
            label=1,
            n_reference=3,
            n_detected=1,
            n_false_positives=4,
            lesions=(lesion, missed, missed),
        ),
        LesionScore(label=2, n_reference=1, n_detected=1, n_false_positives=1, lesions=(lesion,)),
    )
    scores = Scores(
        tolerance_mm=1,
        ignore_label=None,
        conventions="",
        cases=(
            CaseScore(case="a", labels=(label_score(1, 1.0), label_score(2, 0.0)), lesions=lesions),
            CaseScore(case="b", labels=(label_score(1, 0.8), label_score(2, None)), lesions=()),
        ),
    )
    assert scores.mean_dice == pytest.approx((0.5 + 0.8) / 2)  # labels first, then cases
    assert scores.mean("dice", 1) == pytest.approx(0.9)
    assert scores.mean("dice", 2) == 0
    assert scores.mean("dice", 3) is None
    assert scores.mean("assd_mm") is None
    assert scores.sensitivity == 2 / 4
    assert scores.false_positives_per_case == 5 / 2
    assert scores.mean_lesion_dice == 1.0 / 4
    assert [row["sensitivity"] for row in scores.summary()] == [1 / 3, 1, 0.5]
    nothing = scores.model_copy(update={"cases": ()})
    assert (nothing.mean_dice, nothing.sensitivity, nothing.false_positives_per_case) == (None,) * 3


def test_two_files_are_one_case(folders: Path) -> None:
    scores = evaluate(
        folders / "predictions" / "b.nii.gz",
        str(folders / "references" / "a.mha"),
        images=folders / "images" / "a.nii.gz",
    )
    assert [case.case for case in scores.cases] == ["a"]
    assert scores.mean_dice == 0.5
    assert scores.cases[0].image == str(folders / "images" / "a.nii.gz")


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def test_references_without_a_prediction_are_counted_and_left_out(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remove(folders, "predictions/b.nii.gz")
    scores = evaluate(folders / "predictions", folders / "references")
    assert "b" not in [case.case for case in scores.cases]
    assert "1 of 3 references have no prediction" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: remove(f, "references/b.mha"), "references lacks a volume named b, .*b.nii.gz"),
        (
            lambda f: [remove(f, f"references/{c}.mha") for c in "abc"],
            "references holds no volumes",
        ),
        (lambda f: (f / "references").rename(f / "x"), "references: no such file or folder"),
        (lambda f: remove(f, "images/b_0000.nii.gz"), "images lacks an image named b or b_0000"),
        (
            lambda f: write_volume(volume(empty(6, 7, 8)), f / "predictions" / "a.mha"),
            "two volumes of one case, a.mha and a.nii.gz",
        ),
        (
            lambda f: (f / "predictions" / "b.nii.gz").write_bytes(b"not a volume"),
            "b.nii.gz",
        ),
        (
            lambda f: write_volume(volume(empty(6, 7, 9), SPACING), f / "references" / "b.mha"),
            "b: prediction and reference differ in shape",
        ),
        (lambda f: (f / "out.json").mkdir(), "out.json is a folder"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    folders: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folders)
    with pytest.raises((DataError, GeometryError), match=message) as caught:
        evaluate(
            folders / "predictions",
            folders / "references",
            images=folders / "images",
            out=folders / "out.json",
        )
    assert "\n" not in str(caught.value)
    assert not (folders / "out.json").is_file()


def test_a_folder_against_a_file_is_refused(folders: Path) -> None:
    with pytest.raises(DataError, match="give two folders or two files"):
        evaluate(folders / "predictions", folders / "references" / "a.mha")


def test_broken_scores_are_refused(folders: Path) -> None:
    path = evaluate(folders / "predictions", folders / "references").save(folders / "m.json")
    text = path.read_text()
    for broken, message in (
        (text[: len(text) // 2], "not JSON"),
        (text.replace('"format": 1', '"format": 2'), "format"),
        (text.replace('"dice": 0.5', '"dice": NaN', 1), "dice"),
        ("[]", "m.json: scores: "),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=message) as caught:
            Scores.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such scores"):
        Scores.load(folders / "absent.json")


def test_saving_leaves_the_old_file_where_it_fails(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders / "m.json"
    scores = evaluate(folders / "predictions", folders / "references", out=path)
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"m.json: cannot be written \(No space left on device\)"):
        scores.save(path)
    assert path.read_text() == before
    assert not list(folders.glob(".*"))
