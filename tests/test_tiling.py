"""Windows cover, weights blend, a sweep finishes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effseg.errors import PlanError
from effseg.tiling import (
    Sweep,
    frontier,
    gaussian_weights,
    padded_shape,
    padding,
    ring_parts,
    sweep_axis,
    window_starts,
    windows,
)

LENGTH = st.integers(1, 40)
OVERLAP = st.floats(0, 0.9)
WINDOW = st.tuples(*[st.integers(1, 6)] * 3)
BEYOND = st.tuples(*[st.integers(0, 9)] * 3)


@given(length=LENGTH, window=LENGTH, overlap=OVERLAP)
def test_starts_cover_the_axis_with_at_least_the_overlap(length, window, overlap) -> None:
    if window > length:
        with pytest.raises(PlanError, match="pad the axis"):
            window_starts(length, window, overlap=overlap)
        return
    starts = window_starts(length, window, overlap=overlap)
    assert starts[0] == 0
    assert starts[-1] == length - window
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= np.ceil(max(1.0, window * (1 - overlap)))).all()


def test_windows_by_hand() -> None:
    boxes = windows((4, 6, 3), (4, 4, 3), overlap=0.5)
    assert boxes == (
        (slice(0, 4), slice(0, 4), slice(0, 3)),
        (slice(0, 4), slice(2, 6), slice(0, 3)),
    )


def test_weights_are_symmetric_and_never_vanish() -> None:
    weights = gaussian_weights((8, 5, 1))
    assert weights.dtype == np.float32
    assert weights.max() == 1
    assert weights.min() >= 1e-3
    np.testing.assert_allclose(weights, weights[::-1, ::-1])


def test_blended_constants_stay_constant() -> None:
    shape, window = (9, 11, 7), (4, 5, 6)
    total, share = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    weights = gaussian_weights(window)
    for box in windows(shape, window, overlap=0.5):
        total[box] += 3 * weights
        share[box] += weights
    np.testing.assert_allclose(total / share, 3, rtol=1e-6)


def test_padding_by_hand() -> None:
    assert padding((3, 8, 5), (4, 4, 8)) == ((0, 1), (0, 0), (1, 2))
    assert padded_shape((3, 8, 5), (4, 4, 8)) == (4, 8, 8)


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_overlap_out_of_range_is_refused(overlap) -> None:
    with pytest.raises(PlanError, match="0 <= overlap < 1"):
        window_starts(8, 4, overlap=overlap)


def sweep_of(window, beyond, overlap) -> Sweep:
    z, y, x = (w + more for w, more in zip(window, beyond, strict=True))
    return Sweep.over((z, y, x), window, overlap=overlap)


@given(window=WINDOW, beyond=BEYOND, overlap=OVERLAP)
def test_a_sweep_has_every_window_once_and_layers_that_tile_its_axis(
    window, beyond, overlap
) -> None:
    sweep = sweep_of(window, beyond, overlap)
    boxes = [box for layer in sweep.layers for box in layer.windows]
    expected = windows(sweep.shape, window, overlap=overlap)
    assert sweep.n_windows == len(boxes) == len(expected)
    assert sorted(map(str, boxes)) == sorted(map(str, expected))
    ends = [(layer.start, layer.stop) for layer in sweep.layers]
    assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]
    assert ends[-1][1] == sweep.shape[sweep.axis]
    assert all(start < stop for start, stop in ends)


@given(window=WINDOW, beyond=BEYOND, overlap=OVERLAP)
def test_no_later_window_touches_what_is_finished_and_a_ring_holds_the_rest(
    window, beyond, overlap
) -> None:
    sweep = sweep_of(window, beyond, overlap)
    touched = 0
    for i, layer in enumerate(sweep.layers):
        for box in layer.windows:
            assert box[sweep.axis].start == layer.start
            touched = max(touched, box[sweep.axis].stop)
        assert touched - layer.start <= sweep.frontier[sweep.axis] == window[sweep.axis]
        later = [box for after in sweep.layers[i + 1 :] for box in after.windows]
        assert all(box[sweep.axis].start >= layer.stop for box in later)
        assert not later or min(box[sweep.axis].start for box in later) == layer.stop


@given(window=WINDOW, beyond=BEYOND)
def test_the_axis_with_the_smallest_frontier_is_swept(window, beyond) -> None:
    sweep = sweep_of(window, beyond, 0.5)
    sizes = [math.prod(frontier(sweep.shape, window, axis)) for axis in range(3)]
    assert math.prod(sweep.frontier) == min(sizes)
    assert sweep.axis == sweep_axis(sweep.shape, window) == sizes.index(min(sizes))


def test_the_frontier_does_not_grow_with_the_length() -> None:
    short, long = (Sweep.over((n, 20, 16), (8, 8, 8), overlap=0.5) for n in (40, 80))
    assert short.axis == long.axis == 0
    assert short.frontier == long.frontier == (8, 20, 16)


@given(start=st.integers(0, 50), length=LENGTH, share=st.floats(0, 1))
def test_a_ring_holds_a_stretch_at_places_modulo_its_length(start, length, share) -> None:
    n = round(length * share)
    parts = list(ring_parts(start, start + n, length))
    assert len(parts) <= 2
    positions = [start + i for part, _ in parts for i in range(part.start, part.stop)]
    places = [i for _, part in parts for i in range(part.start, part.stop)]
    assert positions == list(range(start, start + n))
    assert places == [position % length for position in positions]


@given(window=WINDOW, beyond=BEYOND, overlap=OVERLAP)
def test_shares_of_a_sweep_are_a_partition_of_unity(window, beyond, overlap) -> None:
    sweep = sweep_of(window, beyond, overlap)
    boxes = [box for layer in sweep.layers for box in layer.windows]
    weights = gaussian_weights(window)
    total = np.zeros(sweep.shape, np.float32)
    n_windows = np.zeros(sweep.shape, np.int64)
    for box in boxes:
        total[box] += weights
        n_windows[box] += 1
    shares = np.zeros(sweep.shape, np.float64)
    for box in boxes:
        shares[box] += weights / total[box]
    # a float32 sum of n terms is off by (n - 1) roundings at most, and each quotient by one
    rounding = np.finfo(np.float32).eps / 2
    assert (np.abs(shares - 1) <= n_windows * rounding).all()
