"""Components against scipy, the removal rules on phantoms worked by hand."""

import tracemalloc

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from effseg.errors import DataError
from effseg.plans import PostprocessConfig
from effseg.postprocess import (
    DEFAULT_FRACTION,
    Component,
    Removal,
    describe,
    foreground_box,
    label_components,
    remove_components,
)

MAPS = arrays.arrays(
    dtype=st.sampled_from([np.uint8, np.int16, np.dtype(">i2"), np.int64]),
    shape=arrays.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=7),
    elements=st.sampled_from([0, 0, 0, 1, 1, 2, 7]),
    fill=st.just(0),
)


def bars(*sizes: int, label: int = 1, dtype: type = np.uint8) -> np.ndarray:
    """Straight bars of these many voxels, two planes apart."""
    array = np.zeros((2 * len(sizes), 3, max(sizes) + 2), dtype)
    for i, size in enumerate(sizes):
        array[2 * i, 1, 1 : 1 + size] = label
    return array


def sizes_left(array: np.ndarray) -> list[int]:
    return sorted(c.n_voxels for c in label_components(array, 1.0)[1])


@settings(max_examples=60, deadline=None)
@given(MAPS)
def test_components_are_scipys(labels: np.ndarray) -> None:
    before = labels.copy()
    components, table = label_components(labels, 0.5)
    np.testing.assert_array_equal(labels, before)
    assert components.shape == labels.shape
    assert len(table) == components.max()
    assert len(table) == sum(
        ndimage.label(labels == value, np.ones((3, 3, 3)))[1] for value in (1, 2, 7)
    )
    np.testing.assert_array_equal(components > 0, labels != 0)
    for number, component in enumerate(table, start=1):
        mask = components == number
        oracle, n = ndimage.label(mask, np.ones((3, 3, 3)))
        assert n == 1
        assert set(labels[mask].tolist()) == {component.label}
        assert component.n_voxels == mask.sum()
        assert component.volume_mm3 == 0.5 * mask.sum()
        assert component.box == ndimage.find_objects(oracle)[0]
        assert component.centroid_index == pytest.approx(np.argwhere(mask).mean(axis=0))


def test_one_component_by_hand() -> None:
    labels = np.zeros((4, 5, 6), np.int32)
    labels[1, 2, 3] = labels[2, 3, 4] = 9  # joined by a corner
    labels[3, 4, 5] = 4  # touches the other by a corner, but is another label
    components, table = label_components(labels, 2.0)
    assert table == (
        Component(9, 2, 4.0, (slice(1, 3), slice(2, 4), slice(3, 5)), (1.5, 2.5, 3.5)),
        Component(4, 1, 2.0, (slice(3, 4), slice(4, 5), slice(5, 6)), (3.0, 4.0, 5.0)),
    )
    assert components[2, 3, 4] == 1
    assert components[3, 4, 5] == 2


@pytest.mark.parametrize("layout", ["C", "F", "reversed", "transposed", "frozen"])
def test_any_memory_layout_gives_the_same(layout: str) -> None:
    rng = np.random.default_rng(3)
    plain = rng.integers(0, 3, (6, 7, 8)).astype(np.uint16) * (rng.random((6, 7, 8)) < 0.4)
    view = {
        "C": plain,
        "F": np.asfortranarray(plain),
        "reversed": plain[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
        "transposed": plain.transpose(2, 0, 1).copy().transpose(1, 2, 0),
        "frozen": plain.copy(),
    }[layout]
    view.flags.writeable = layout != "frozen"
    config = PostprocessConfig(fraction_of_largest=0.5, minimum_mm3=2.0)
    cleaned, removals = remove_components(view, 1.0, config)
    expected, expected_removals = remove_components(plain, 1.0, config)
    np.testing.assert_array_equal(cleaned, expected)
    assert removals == expected_removals
    assert len(label_components(view, 1.0)[1]) == len(label_components(plain, 1.0)[1])


def test_a_row_of_bool() -> None:
    components, table = label_components(np.array([[[True, False, True]]]), 1.0)
    assert components.tolist() == [[[1, 0, 2]]]
    assert [component.label for component in table] == [1, 1]


def test_foreground_box() -> None:
    labels = np.zeros((5, 6, 7), np.int16)
    assert foreground_box(labels) is None
    labels[1, 5, 2] = labels[3, 0, 4] = -1
    assert foreground_box(labels) == (slice(1, 4), slice(0, 6), slice(2, 5))


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({}, [1, 2, 3, 4, 9]),
        ({"fraction_of_largest": DEFAULT_FRACTION}, [3, 4, 9]),  # 3 is exactly a third: kept
        ({"fraction_of_largest": 0.0}, [1, 2, 3, 4, 9]),
        ({"fraction_of_largest": 1.0}, [9]),
        ({"minimum_mm3": 8.0}, [4, 9]),  # 4 voxels of 2 mm3 are exactly 8 mm3: kept
        ({"minimum_mm3": 8.1}, [9]),
        ({"minimum_mm3": 100.0}, []),
        ({"fraction_of_largest": DEFAULT_FRACTION, "minimum_mm3": 8.0}, [4, 9]),
    ],
)
def test_what_is_smaller_goes(config: dict[str, float], left: list[int]) -> None:
    labels = bars(9, 4, 3, 2, 1)
    before = labels.copy()
    cleaned, removals = remove_components(labels, 2.0, PostprocessConfig(**config))
    assert sizes_left(cleaned) == left
    np.testing.assert_array_equal(labels, before)
    assert not np.shares_memory(cleaned, labels)
    assert cleaned.dtype == labels.dtype
    assert sum(r.n_components for r in removals) == 5 - len(left)
    assert sum(r.volume_mm3 for r in removals) == 2.0 * ((before > 0).sum() - sum(left))


def test_equality_survives_rounding() -> None:
    # 0.55 * 100 > 55 and 0.7 * 0.7 * 2.0 * 100 < 98 in floating point; both are equal on paper.
    cleaned, _ = remove_components(bars(100, 55), 1.0, PostprocessConfig(fraction_of_largest=0.55))
    assert sizes_left(cleaned) == [55, 100]
    cleaned, _ = remove_components(bars(150, 100), 0.7 * 0.7 * 2, PostprocessConfig(minimum_mm3=98))
    assert sizes_left(cleaned) == [100, 150]


def test_each_label_has_its_own_largest() -> None:
    labels = np.concatenate([bars(30, 9), bars(30, 6, 1, label=5)])
    labels[4] = 0  # the other label's largest has 6
    config = PostprocessConfig(fraction_of_largest=DEFAULT_FRACTION, minimum_mm3=2.0)
    cleaned, removals = remove_components(labels, 1.0, config)
    assert [(c.label, c.n_voxels) for c in label_components(cleaned, 1.0)[1]] == [(1, 30), (5, 6)]
    # The speck of one voxel falls under both rules and is told once.
    assert removals == (
        Removal(1, 1, 9.0, "fraction_of_largest", 10.0),
        Removal(5, 1, 1.0, "fraction_of_largest", 2.0),
    )
    told = describe(config, removals)
    assert "0.333 of the largest of their label or smaller than 2 mm3" in told
    assert "label 1: 1 below 10 mm3 (fraction_of_largest), 9 mm3 together" in told


def test_describe_says_when_nothing_happened() -> None:
    assert describe(PostprocessConfig(), ()) == "components of every size are kept"
    assert describe(PostprocessConfig(minimum_mm3=30), ()) == (
        "components smaller than 30 mm3 become background; removed: none"
    )


def test_empty_maps_come_back_as_they_are() -> None:
    config = PostprocessConfig(fraction_of_largest=DEFAULT_FRACTION, minimum_mm3=5)
    for shape in ((3, 4, 5), (0, 4, 5)):
        empty = np.zeros(shape, np.uint8)
        cleaned, removals = remove_components(empty, 1.0, config)
        np.testing.assert_array_equal(cleaned, empty)
        assert removals == ()
        components, table = label_components(empty, 1.0)
        assert components.shape == shape
        assert table == ()


@pytest.mark.parametrize("labels", [np.zeros((3, 3, 3)), np.zeros((3, 3), np.uint8)])
def test_no_label_map_is_refused(labels: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected integers"):
        label_components(labels, 1.0)
    with pytest.raises(DataError, match="expected integers"):
        remove_components(labels, 1.0, PostprocessConfig())


@settings(max_examples=40, deadline=None)
@given(MAPS, st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_removal_does_not_see_the_axis_order(
    labels: np.ndarray, order: list[int], flips: tuple[bool, bool, bool]
) -> None:
    config = PostprocessConfig(fraction_of_largest=0.5, minimum_mm3=1.5)
    turn = tuple(slice(None, None, -1 if flip else None) for flip in flips)
    turned, removals = remove_components(labels.transpose(order)[turn], 1.0, config)
    cleaned, expected = remove_components(labels, 1.0, config)
    np.testing.assert_array_equal(turned, cleaned.transpose(order)[turn])
    assert removals == expected
    again, nothing = remove_components(cleaned, 1.0, config)
    np.testing.assert_array_equal(again, cleaned)  # a second time takes nothing more
    assert nothing == ()


def test_memory_is_that_of_the_foreground_box() -> None:
    labels = np.zeros((128, 256, 256), np.uint8)  # 8 MiB
    labels[40:60, 100:140, 100:140] = 1
    labels[70, 100, 100] = 1
    tracemalloc.start()
    remove_components(labels, 1.0, PostprocessConfig(fraction_of_largest=DEFAULT_FRACTION))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The copy, and 2 bytes a voxel of a box of 0.06 MiB; scipy would take 32 MiB more.
    assert peak < labels.nbytes + 2**20
