"""Grids and volumes: worked examples, and what must hold for every grid."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from effseg.errors import GeometryError
from effseg.volume import AxisOrder, Grid, Volume

ORDERS = [
    AxisOrder(order=order, flips=flips)
    for order in permutations(range(3))
    for flips in product((False, True), repeat=3)
]

SHEARED = ((1.0, 0.1, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def as_matrix(array):
    return tuple(tuple(float(v) for v in row) for row in array)


@st.composite
def grids(draw):
    numbers = st.floats(-1, 1)
    quaternion = draw(st.tuples(numbers, numbers, numbers, st.floats(0.1, 1)))
    return Grid(
        shape=draw(st.tuples(*[st.integers(1, 6)] * 3)),
        spacing=draw(st.tuples(*[st.floats(0.1, 10)] * 3)),
        origin=draw(st.tuples(*[st.floats(-500, 500)] * 3)),
        direction=as_matrix(Rotation.from_quat(quaternion).as_matrix()),
    ).reordered(draw(st.sampled_from(ORDERS)))


def indices(grid):
    return np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)


# --- Grid


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("shape", (0, 4, 5), "at least one voxel"),
        ("shape", (4, 5), "three lengths"),
        ("spacing", (1.0, 0.0, 1.0), "positive"),
        ("spacing", (1.0, -1.0, 1.0), "positive"),
        ("spacing", (1.0, float("nan"), 1.0), "finite"),
        ("origin", (0.0, float("inf"), 0.0), "finite"),
        ("direction", SHEARED, "orthonormal"),
        ("direction", ((2.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), "orthonormal"),
        ("direction", ((float("nan"), 0, 0), (0, 1, 0), (0, 0, 1)), "orthonormal"),
    ],
)
def test_an_impossible_grid_is_refused(field, value, said):
    with pytest.raises(GeometryError, match=said):
        Grid(**({"shape": (3, 4, 5)} | {field: value}))


def test_the_world_of_a_voxel_by_hand():
    quarter = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0))  # y runs along +x, x along -y
    grid = Grid(shape=(2, 3, 4), spacing=(5, 2, 1), origin=(10, 20, 30), direction=quarter)
    assert grid.index_to_world(np.array([1, 2, 3])).tolist() == [15, 17, 34]
    assert grid.world_to_index(np.array([15, 17, 34])).tolist() == [1, 2, 3]
    assert grid.voxel_mm3 == 10
    assert grid.n_voxels == 24


@given(grids())
def test_index_and_world_undo_each_other(grid):
    inside = indices(grid)
    assert np.allclose(grid.world_to_index(grid.index_to_world(inside)), inside, atol=1e-7)


@given(grids())
def test_a_grid_is_its_affine(grid):
    again = Grid.from_affine(grid.shape, grid.affine)
    assert np.allclose(again.affine, grid.affine, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("column", [np.zeros(3), np.array([np.nan, 0, 0])])
def test_an_affine_without_extent_is_refused(column):
    affine = np.eye(4)
    affine[:3, 1] = column
    with pytest.raises(GeometryError, match="column lengths"):
        Grid.from_affine((1, 1, 1), affine)


@given(grids(), st.tuples(*[st.floats(0.1, 10)] * 3))
def test_with_spacing_keeps_the_centre_and_the_field_of_view(grid, spacing):
    new = grid.with_spacing(spacing)
    assert new.spacing == spacing
    centre, new_centre = (g.index_to_world((np.array(g.shape) - 1) / 2) for g in (grid, new))
    assert np.allclose(new_centre, centre, atol=1e-9)
    extent = np.array(grid.shape) * grid.spacing
    new_extent = np.array(new.shape) * new.spacing
    off_by_half = np.abs(new_extent - extent) <= np.array(spacing) / 2 + 1e-9
    assert (off_by_half | (np.array(new.shape) == 1)).all()


def test_with_spacing_by_hand():
    new = Grid(shape=(4, 4, 4), spacing=(2, 1, 1)).with_spacing((1.0, 1.0, 4.0))
    assert new.shape == (8, 4, 1)
    assert new.origin == (-0.5, 0.0, 1.5)  # the outer faces stay at -1 and 7, the centre at 1.5


@given(grids(), st.data())
def test_a_crop_holds_the_same_places(grid, data):
    starts = [data.draw(st.integers(0, n - 1)) for n in grid.shape]
    box = tuple(
        slice(start, data.draw(st.integers(start + 1, n)))
        for start, n in zip(starts, grid.shape, strict=True)
    )
    crop = grid.crop(box)
    expected = grid.index_to_world(indices(grid))[box]
    assert np.allclose(crop.index_to_world(indices(crop)), expected, atol=1e-9)


def test_a_crop_with_a_step_or_without_voxels_is_refused():
    grid = Grid(shape=(4, 4, 4))
    with pytest.raises(GeometryError, match="step 2"):
        grid.crop((slice(None, None, 2), slice(None), slice(None)))
    with pytest.raises(GeometryError, match="at least one voxel"):
        grid.crop((slice(2, 2), slice(None), slice(None)))


# --- AxisOrder


@pytest.mark.parametrize("axes", ORDERS)
def test_reordering_moves_the_array_and_the_grid_alike(axes):
    turn = Rotation.from_euler("zyx", (20, -10, 5), degrees=True).as_matrix()
    grid = Grid((2, 3, 4), (3.0, 2.0, 1.0), (7.0, -8.0, 9.0), as_matrix(turn))
    places = np.moveaxis(grid.index_to_world(indices(grid)), -1, 0)  # (3, z, y, x): channels first
    moved = Volume(array=places, grid=grid).reordered(axes)
    found = np.moveaxis(moved.grid.index_to_world(indices(moved.grid)), -1, 0)
    assert np.allclose(found, moved.array, atol=1e-9)
    assert np.shares_memory(moved.array, places)
    back = moved.reordered(axes.inverse())
    assert np.array_equal(back.array, places)
    assert np.allclose(back.grid.affine, grid.affine, atol=1e-12)


@pytest.mark.parametrize("axes", ORDERS)
def test_canonical_axes_undo_any_order(axes):
    turn = Rotation.from_euler("zyx", (20, -10, 5), degrees=True).as_matrix()
    grid = Grid((2, 3, 4), (3.0, 2.0, 1.0), (7.0, -8.0, 9.0), as_matrix(turn))
    stored = grid.reordered(axes)
    assert stored.canonical_axes() == axes.inverse()
    canonical = stored.reordered(stored.canonical_axes())
    assert canonical.shape == grid.shape
    assert np.allclose(canonical.affine, grid.affine, atol=1e-12)


def test_48_orders_are_told_apart():
    array = np.arange(24).reshape(2, 3, 4)
    assert len({(axes.apply(array).shape, axes.apply(array).tobytes()) for axes in ORDERS}) == 48


# --- difference


def test_equal_grids_do_not_differ():
    grid = Grid((3, 4, 5), (3.0, 2.0, 1.0))
    assert grid.difference(grid) is None
    near = Grid((3, 4, 5), (3.0, 2.0, 1.0), (0.0, 0.0, 0.0009))
    assert grid.difference(near) is None
    assert grid.difference(near, tolerance=1e-4) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (3, 4, 6)}, "shape, (3, 4, 5) vs (3, 4, 6) voxels"),
        ({"spacing": (3.0, 2.0, 1.5)}, "spacing, (3, 2, 1) vs (3, 2, 1.5) mm"),
        ({"origin": (0.0, 0.5, 0.0)}, "origin, (0, 0, 0) vs (0, 0.5, 0) mm"),
        (
            {"direction": as_matrix(Rotation.from_euler("x", 30, degrees=True).as_matrix())},
            "direction, by up to 30.00 degrees",
        ),
    ],
)
def test_a_difference_is_named(change, words):
    fields = {"shape": (3, 4, 5), "spacing": (3.0, 2.0, 1.0)}
    assert Grid(**fields).difference(Grid(**(fields | change))) == words


# --- Volume


def test_a_volume_has_the_shape_of_its_grid():
    grid = Grid((3, 4, 5))
    assert Volume(np.zeros((3, 4, 5)), grid).n_channels == 1
    assert Volume(np.zeros((2, 3, 4, 5)), grid).n_channels == 2
    for shape in ((5, 4, 3), (4, 5), (1, 2, 3, 4, 5)):
        with pytest.raises(GeometryError, match="expected the grid's shape"):
            Volume(np.zeros(shape), grid)


def test_cropping_a_volume_is_a_view():
    volume = Volume(np.arange(120).reshape(2, 3, 4, 5), Grid((3, 4, 5), (3.0, 2.0, 1.0)))
    crop = volume.crop((slice(1, 3), slice(0, 4), slice(2, 4)))
    assert np.array_equal(crop.array, volume.array[:, 1:3, :, 2:4])
    assert np.shares_memory(crop.array, volume.array)
    assert crop.grid.origin == (3.0, 0.0, 2.0)
