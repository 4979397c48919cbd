"""Labels of logits that come slab by slab against resampling each class whole."""

import logging
import tracemalloc
from collections.abc import Iterator
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effseg.errors import DataError
from effseg.resample import AffineHead, Slab, Slabs, label_slabs, logits_to_labels, resample_like
from effseg.types import Array
from effseg.volume import AxisOrder, Grid, Volume

ORDERS = [
    AxisOrder(order=o, flips=f)
    for o in permutations(range(3))
    for f in product((False, True), repeat=3)
]
TIE = 1e-4
ANGLE = np.radians(20)
TURNED = (
    (1.0, 0.0, 0.0),
    (0.0, float(np.cos(ANGLE)), float(-np.sin(ANGLE))),
    (0.0, float(np.sin(ANGLE)), float(np.cos(ANGLE))),
)
LENGTHS = st.tuples(*[st.integers(1, 14)] * 3)
SPACINGS = st.tuples(*[st.floats(0.6, 2.5)] * 3)


def scores(n_classes: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_classes, *shape)).astype(np.float32)


def in_memory(logits: np.ndarray, source: Grid, target: Grid) -> tuple[Array, Array]:
    """The label map by whole volumes, and where two classes are as good as equal."""
    planes = [resample_like(Volume(array=p, grid=source), target).array for p in logits]
    whole = np.stack(planes)
    if len(whole) == 1:
        return np.zeros(target.shape, np.uint8), np.zeros(target.shape, bool)
    second, first = np.partition(whole, -2, axis=0)[-2:]
    # where the source has no field of view all are 0, and the first class is meant
    beyond = (whole == 0).all(axis=0)
    return whole.argmax(axis=0), (first - second < TIE) & ~beyond


def assert_same(got: Array, expected: tuple[Array, Array]) -> None:
    labels, ties = expected
    assert ties.sum() <= 2 + 0.005 * ties.size
    np.testing.assert_array_equal(got[~ties], labels[~ties])


def cut(values: np.ndarray, axis: int, thick: int, head: AffineHead | None = None) -> Slabs:
    def parts() -> Iterator[Slab]:
        for start in range(0, values.shape[1 + axis], thick):
            box = (slice(None),) * (1 + axis) + (slice(start, start + thick),)
            yield start, values[box]

    shape = (values.shape[1], values.shape[2], values.shape[3])
    return Slabs(axis=axis, shape=shape, parts=parts(), head=head)


@settings(max_examples=60, deadline=None)
@given(
    shape=LENGTHS,
    spacing=SPACINGS,
    coarser=SPACINGS,
    order=st.sampled_from(ORDERS),
    n_classes=st.integers(1, 5),
    axis=st.integers(0, 2),
    thick=st.integers(1, 9),
    shift=st.floats(-6, 6),
)
def test_slabs_give_the_labels_of_whole_volumes(
    shape, spacing, coarser, order, n_classes, axis, thick, shift
) -> None:
    source = Grid(shape=shape, spacing=spacing, direction=TURNED, origin=(3.0, 4.0, 5.0))
    target = source.with_spacing(coarser)
    # neither grid holds the other
    target = Grid(target.shape, target.spacing, (3.0 + shift, 4.0, 5.0 - shift), TURNED)
    target = target.reordered(order)
    logits = scores(n_classes, shape)
    got = logits_to_labels(cut(logits, axis, thick), source, target)
    assert got.grid == target
    assert_same(got.array, in_memory(logits, source, target))


@settings(max_examples=40, deadline=None)
@given(
    shape=LENGTHS,
    spacing=SPACINGS,
    order=st.sampled_from(ORDERS),
    axis=st.integers(0, 2),
    thick=st.integers(1, 9),
)
def test_a_head_after_resampling_gives_the_labels_of_resampled_logits(
    shape, spacing, order, axis, thick
) -> None:
    rng = np.random.default_rng(1)
    head = AffineHead(
        weight=rng.normal(size=(7, 3)).astype(np.float32),
        bias=rng.normal(size=7).astype(np.float32),
    )
    source = Grid(shape=shape, spacing=(1.0, 1.2, 0.9))
    target = source.with_spacing(spacing).reordered(order)
    features = scores(3, shape)
    logits = np.tensordot(head.weight, features, 1) + head.bias[:, None, None, None]
    got = logits_to_labels(cut(features, axis, thick, head), source, target)
    assert_same(got.array, in_memory(logits.astype(np.float32), source, target))


@pytest.mark.parametrize("order", ORDERS)
def test_boxes_tile_the_target_along_one_axis(order: AxisOrder) -> None:
    source = Grid((20, 6, 5))
    target = Grid((9, 8, 5), (2.2, 0.8, 1.0)).reordered(order)
    seen = np.zeros(target.shape, int)
    boxes = []
    for box, labels, _ in label_slabs(cut(scores(2, source.shape), 0, 3), source, target):
        assert seen[box].shape == labels.shape
        assert labels.flags.c_contiguous
        seen[box] += 1
        boxes.append(box)
    assert (seen == 1).all()
    axis = order.order.index(0)
    assert all(box[i] == slice(0, target.shape[i]) for box in boxes for i in {0, 1, 2} - {axis})
    starts = [box[axis].start for box in boxes]
    assert len(starts) > 3
    assert starts == sorted(starts, reverse=order.flips[axis])


def test_a_slab_is_made_as_soon_as_its_support_has_come() -> None:
    source, target = Grid((40, 4, 4)), Grid((80, 4, 4), (0.5, 1.0, 1.0), (-0.25, 0.0, 0.0))
    logits = scores(2, source.shape)
    asked = []

    def parts() -> Iterator[Slab]:
        for start in range(0, 40, 4):
            asked.append(start + 4)
            yield start, logits[:, start : start + 4]

    slabs = Slabs(axis=0, shape=source.shape, parts=parts())
    for box, _, _ in label_slabs(slabs, source, target):
        # voxel i lies at i / 2 - 1 / 4: all that lie at or before the last voxel that has come
        expected = 80 if asked[-1] == 40 else 2 * (asked[-1] - 1) + 1
        assert box[0].stop == expected


def test_values_name_the_classes_and_the_first_stands_beyond_the_field_of_view() -> None:
    source = Grid((4, 4, 4))
    target = Grid((8, 4, 4), origin=(2.0, 0.0, 0.0))
    logits = np.stack([np.zeros(source.shape), np.ones(source.shape)]).astype(np.float32)
    labels = logits_to_labels(logits, source, target, values=(5, 300))
    assert labels.array.dtype == np.uint16
    assert (labels.array[:2] == 300).all()
    assert (labels.array[2:] == 5).all()


def test_of_equal_logits_the_first_class_wins() -> None:
    grid = Grid((5, 5, 5))
    head = AffineHead(weight=np.ones((4, 2), np.float32), bias=np.zeros(4, np.float32))
    assert not logits_to_labels(np.ones((3, 5, 5, 5)), grid, grid).array.any()
    assert not logits_to_labels(cut(scores(2, grid.shape), 0, 2, head), grid, grid).array.any()


def test_grids_turned_against_each_other_wait_for_everything_and_say_so(caplog) -> None:
    source = Grid((12, 13, 14))
    target = Grid((10, 9, 11), (1.3, 1.1, 1.0), (2.0, -3.0, 1.0), TURNED)
    logits = scores(3, source.shape)
    with caplog.at_level(logging.INFO, logger="effseg"):
        boxes = list(label_slabs(cut(logits, 1, 4), source, target))
    assert "turned against each other" in caplog.text
    assert len(boxes) == 1
    assert_same(boxes[0][1], in_memory(logits, source, target))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16])
def test_arrays_of_other_people_are_taken_as_they_are(dtype) -> None:
    source = Grid((9, 8, 17))
    logits = (100 * scores(4, source.shape)).astype(dtype)
    expected = in_memory(logits.astype(np.float32), source, source.with_spacing((1.5, 0.7, 1.1)))
    got = logits_to_labels(logits, source, source.with_spacing((1.5, 0.7, 1.1)))
    assert_same(got.array, expected)


def test_what_is_no_such_logits_is_refused() -> None:
    grid = Grid((4, 4, 4))
    logits = scores(3, grid.shape)
    with pytest.raises(DataError, match=r"logits of \(4, 4, 4\) voxels on a grid of \(4, 4, 5\)"):
        logits_to_labels(logits, Grid((4, 4, 5)), grid)
    with pytest.raises(DataError, match="3 logits a voxel; expected 2"):
        logits_to_labels(logits, grid, grid, values=(0, 1))
    logits[1, 2, 3, 0] = np.nan
    with pytest.raises(DataError, match="expected finite numbers"):
        logits_to_labels(logits, grid, grid)


def test_slabs_of_logits_are_no_larger_than_their_features() -> None:
    rng = np.random.default_rng(0)
    head = AffineHead(
        weight=rng.normal(size=(12, 3)).astype(np.float32), bias=np.ones(12, np.float32)
    )
    features = scores(3, (10, 5, 6))
    got = list(cut(features, 0, 8, head))
    assert [start for start, _ in got] == [0, 2, 4, 6, 8, 9]
    assert all(part.nbytes <= features[:, :8].nbytes for _, part in got)
    expected = np.tensordot(head.weight, features, 1) + 1
    np.testing.assert_allclose(np.concatenate([p for _, p in got], axis=1), expected, atol=1e-5)


def peak_bytes(n_classes: int, length: int, *, head: bool) -> int:
    """What labelling takes while slabs are made, consumed and dropped."""
    rng = np.random.default_rng(0)
    n_channels = 8 if head else n_classes
    weights = AffineHead(
        weight=rng.normal(size=(n_classes, n_channels)).astype(np.float32),
        bias=np.zeros(n_classes, np.float32),
    )
    source = Grid((length, 80, 80))
    target = source.with_spacing((1.3, 0.8, 0.8))

    def parts() -> Iterator[Slab]:
        for start in range(0, length, 8):
            yield start, np.full((n_channels, 8, 80, 80), start, np.float32)

    slabs = Slabs(axis=0, shape=source.shape, parts=parts(), head=weights if head else None)
    tracemalloc.start()
    for _ in label_slabs(slabs, source, target):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_grows_neither_with_the_length_nor_with_the_classes_above_a_head() -> None:
    peak = peak_bytes(2, 64, head=True)
    assert peak_bytes(118, 64, head=True) <= 1.05 * peak
    for head in (False, True):
        assert peak_bytes(4, 256, head=head) <= 1.02 * peak_bytes(4, 128, head=head)
