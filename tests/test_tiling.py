"""Windows cover, weights blend."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effseg.errors import PlanError
from effseg.tiling import gaussian_weights, padding, window_starts, windows

LENGTH = st.integers(1, 40)
OVERLAP = st.floats(0, 0.9)


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


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_overlap_out_of_range_is_refused(overlap) -> None:
    with pytest.raises(PlanError, match="0 <= overlap < 1"):
        window_starts(8, 4, overlap=overlap)
