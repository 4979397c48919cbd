"""The way in and the way back."""

from itertools import permutations, product

import numpy as np
import pytest

from effseg.errors import DataError
from effseg.plans import Channel, Normalisation, Plan
from effseg.preprocess import normalise, prepare_image, prepare_label, restore_labels
from effseg.volume import AxisOrder, Grid, Volume

ORDERS = [
    AxisOrder(order=o, flips=f)
    for o in permutations(range(3))
    for f in product((False, True), repeat=3)
]
TILT = np.radians(10)
OBLIQUE = (
    (1.0, 0.0, 0.0),
    (0.0, float(np.cos(TILT)), float(-np.sin(TILT))),
    (0.0, float(np.sin(TILT)), float(np.cos(TILT))),
)


def test_ct_is_clipped_and_scaled_by_the_data_set() -> None:
    channel = Channel(
        name="CT", normalisation=Normalisation(kind="ct", low=-100, high=300, mean=50, std=25)
    )
    out = normalise(np.array([-1000, 50, 75, 5000], np.int16), channel)
    np.testing.assert_allclose(out, [-6, 0, 1, 10])


def test_z_scores_leave_the_surroundings_out() -> None:
    channel = Channel(name="MR", normalisation=Normalisation(kind="zscore"))
    image = np.zeros(100, np.float32)
    image[:50] = np.linspace(100, 200, 50)
    out = normalise(image, channel)
    assert out[:50].mean() == pytest.approx(0, abs=1e-5)
    assert out[:50].std() == pytest.approx(1, abs=1e-5)
    assert normalise(np.full(5, 7.0), channel).tolist() == [0] * 5


@pytest.mark.parametrize("direction", [Grid((1, 1, 1)).direction, OBLIQUE])
def test_predictions_land_where_the_image_lies_in_all_48_orders(tiny_plan: Plan, direction) -> None:
    """A pointwise network on the way in and back: every order gives the same voxels."""
    plan = tiny_plan.model_copy(update={"spacing": (1.0, 1.0, 1.0)})
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(5, 6, 7)).astype(np.float32)
    grid = Grid(shape=(5, 6, 7), spacing=(2.0, 1.0, 1.5), origin=(3, -8, 40), direction=direction)
    expected = None
    for order in ORDERS:
        image = Volume(array=coarse, grid=grid).reordered(order)
        prepared = prepare_image(image, plan)
        x = prepared.image[0]
        logits = np.stack([np.zeros_like(x), x - 0.3, -0.5 - x])
        labels = restore_labels(logits, prepared, plan)
        np.testing.assert_allclose(labels.grid.affine, image.grid.affine, atol=1e-9)
        back = labels.reordered(order.inverse()).array
        expected = back if expected is None else expected
        np.testing.assert_array_equal(back, expected)
    assert set(np.unique(expected)) == {0, 1, 2}


def test_labels_and_images_are_prepared_onto_one_grid(tiny_plan: Plan) -> None:
    plan = tiny_plan.model_copy(update={"spacing": (0.7, 1.3, 1.1)})
    grid = Grid(shape=(9, 8, 7), spacing=(1.0, 0.9, 2.0))
    image = Volume(array=np.random.default_rng(0).normal(size=grid.shape), grid=grid)
    label = Volume(array=np.ones(grid.shape, np.uint8), grid=grid)
    assert prepare_image(image, plan).grid == prepare_label(label, plan).grid


def test_another_number_of_channels_is_refused(tiny_plan: Plan) -> None:
    with pytest.raises(DataError, match="2 channels; the plan expects 1"):
        prepare_image(Volume(array=np.zeros((2, 3, 3, 3)), grid=Grid(shape=(3, 3, 3))), tiny_plan)
