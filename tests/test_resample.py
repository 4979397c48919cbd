"""Resampling: phantoms with worked answers, geometry to a hundredth of a millimetre, memory."""

import tracemalloc
from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from effseg.errors import DataError, GeometryError
from effseg.resample import (
    AxisWeights,
    ObliqueMapping,
    Passage,
    SeparableMapping,
    resample_like,
    resample_to_spacing,
)
from effseg.volume import AxisOrder, Grid, Volume

ORDERS = [
    AxisOrder(order=order, flips=flips)
    for order in permutations(range(3))
    for flips in product((False, True), repeat=3)
]
TILT = tuple(map(tuple, Rotation.from_euler("zyx", (20, -15, 30), degrees=True).as_matrix()))

spacings = st.tuples(*[st.floats(0.6, 2.5)] * 3)


def world(grid):
    """World positions (z, y, x, 3) of the grid's voxel centres."""
    return grid.index_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))


def noise(grid, seed=0):
    values = np.random.default_rng(seed).standard_normal(grid.shape, dtype=np.float32)
    return Volume(array=values, grid=grid)


def ramp(grid):
    """A brightness that rises evenly with z, y and x."""
    return (world(grid) @ np.array([0.7, -1.3, 2.1]) + 5).astype(np.float64)


def blob(grid, centre, *, sigma_mm):
    distance2 = ((world(grid) - centre) ** 2).sum(axis=-1)
    return Volume(array=np.exp(-distance2 / (2 * sigma_mm**2)).astype(np.float32), grid=grid)


def centroid(volume):
    weights = volume.array.astype(np.float64)[..., None]
    return (world(volume.grid) * weights).sum(axis=(0, 1, 2)) / weights.sum()


def interior(volume, source, *, margin_mm):
    """The voxels at least `margin_mm` inside the source's outermost voxel centres."""
    index = source.world_to_index(world(volume.grid))
    margin = margin_mm / np.asarray(source.spacing)
    return ((index >= margin) & (index <= np.asarray(source.shape) - 1 - margin)).all(axis=-1)


# --- worked answers -----------------------------------------------------------------------------


def test_between_two_voxels_lies_their_mean():
    row = Volume(array=np.float32([[[0, 10]]]), grid=Grid((1, 1, 2)))
    # four voxels of half the width, centred on -0.25, 0.25, 0.75 and 1.25 of the two
    finer = resample_to_spacing(row, (1, 1, 0.5))
    assert finer.grid.shape == (1, 1, 4)
    np.testing.assert_allclose(finer.array.ravel(), [0, 2.5, 7.5, 10], rtol=1e-6)


def test_weights_of_a_voxel_twice_as_wide():
    # |x|^3 differences worked by hand at s^2 = 3, x = 1/2 and 3/2; then 5/2: the whole sums to 1
    weights = AxisWeights.build(20, 10, start=0.5, step=2.0, smoothing=np.sqrt(3))
    row = weights.matrix((4, 5), weights.source_range(4, 5))[0]
    s = np.sqrt(3)

    def cubic(x):
        return sum(
            a * b * abs(x + i + j) ** 3
            for i, a in ((-1, 1), (0, -2), (1, 1))
            for j, b in ((-s, 1), (0, -2), (s, 1))
        ) / (12 * s**2)

    assert weights.source_range(4, 5) == (6, 12)
    expected = [cubic(2.5), cubic(1.5), cubic(0.5)]
    np.testing.assert_allclose(row, expected + expected[::-1], atol=1e-6)
    assert 2 * sum(expected) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("spacing", [(0.4, 0.9, 1.1), (1.7, 2.3, 5.0), (0.3, 1.0, 3.3)])
@pytest.mark.parametrize("direction", [Grid((1, 1, 1)).direction, TILT])
def test_constants_stay_constant(spacing, direction):
    grid = Grid((13, 11, 17), spacing=(1.0, 0.8, 1.3), direction=direction)
    result = resample_to_spacing(Volume(np.full(grid.shape, -1000.0), grid), spacing)
    np.testing.assert_allclose(result.array, -1000, rtol=1e-6)


@pytest.mark.parametrize("spacing", [(0.4, 0.9, 1.1), (1.7, 2.3, 3.1), (1.0, 1.05, 0.6)])
@pytest.mark.parametrize("direction", [Grid((1, 1, 1)).direction, TILT])
def test_ramps_stay_straight(spacing, direction):
    grid = Grid((30, 24, 28), spacing=(1.0, 0.8, 1.3), origin=(5, -7, 2))
    target = Grid(grid.shape, origin=(5, -7, 2), direction=direction).with_spacing(spacing)
    result = resample_like(Volume(ramp(grid), grid), target)
    inner = interior(result, grid, margin_mm=6)
    assert inner.sum() > 20
    np.testing.assert_allclose(result.array[inner], ramp(target)[inner], atol=3e-5)


def test_the_border_is_repeated_for_half_a_voxel_then_filled():
    source = Volume(np.float32([[[3, 4]]]), Grid((1, 1, 2)))
    target = Grid((1, 1, 8), spacing=(1, 1, 0.5), origin=(0, 0, -1.25))
    result = resample_like(source, target, fill=-7).array.ravel()
    # at -1.25, -0.75 | -0.25, 0.25, 0.75, 1.25 | 1.75, 2.25
    np.testing.assert_allclose(result, [-7, -7, 3, 3.25, 3.75, 4, -7, -7], rtol=1e-6)


def test_the_field_of_view_of_a_tilted_grid():
    source = Volume(np.ones((9, 9, 9), np.float32), Grid((9, 9, 9)))
    target = Grid((25, 25, 25), origin=(-8.0, -8.0, -8.0), direction=TILT)
    result = resample_like(source, target, fill=-1)
    index = source.grid.world_to_index(world(target))
    seen = ((index >= -0.5001) & (index <= 8.5001)).all(axis=-1)
    assert 0 < seen.sum() < seen.size
    np.testing.assert_allclose(result.array, np.where(seen, 1, -1), atol=1e-6)


def test_far_away_there_is_only_fill():
    source = noise(Grid((5, 5, 5)))
    for direction in (source.grid.direction, TILT):
        far = Grid((4, 3, 2), origin=(100, 0, 0), direction=direction)
        assert (resample_like(source, far, fill=2).array == 2).all()


# --- geometry -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.float64])
def test_the_same_grid_is_the_identity_bitwise(dtype):
    volume = Volume(
        (noise(Grid((7, 8, 9), (1, 0.7, 0.3))).array * 999).astype(dtype),
        Grid((7, 8, 9), (1, 0.7, 0.3), direction=TILT),
    )
    for label in (False, dtype == np.int16):
        same = resample_like(volume, volume.grid, label=label)
        assert same.array.dtype == dtype
        assert same.array.tobytes() == volume.array.tobytes()
        assert same.grid == volume.grid


def test_a_crop_and_a_pad_copy_voxels_bitwise():
    volume = noise(Grid((7, 8, 9), (1.1, 0.7, 0.3), origin=(3, 2, 1), direction=TILT))
    box = (slice(2, 5), slice(0, 8), slice(3, 4))
    crop = resample_like(volume, volume.grid.crop(box))
    np.testing.assert_array_equal(crop.array, volume.array[box])
    back = resample_like(crop, volume.grid, fill=9)
    expected = np.full(volume.grid.shape, 9, np.float32)
    expected[box] = volume.array[box]
    np.testing.assert_array_equal(back.array, expected)


@settings(max_examples=40, deadline=None)
@given(spacings, spacings, st.integers(0, 2**31), st.booleans(), st.integers(0, 47))
def test_a_blob_stays_where_it_is(old, new, seed, oblique, order):
    rng = np.random.default_rng(seed)
    shape = tuple(int(np.ceil(60 / s)) for s in old)
    source = Grid(
        shape,
        old,
        origin=tuple(rng.uniform(-300, 300, 3)),
        direction=tuple(map(tuple, Rotation.random(random_state=seed).as_matrix())),
    ).reordered(ORDERS[order])
    middle = source.index_to_world((np.asarray(source.shape) - 1) / 2)
    volume = blob(source, middle + rng.uniform(-1, 1, 3), sigma_mm=5.5)
    if oblique:
        turn = np.asarray(source.direction) @ Rotation.random(random_state=seed + 1).as_matrix()
        direction = tuple(map(tuple, turn))
        half = turn @ (np.asarray(new) * (np.ceil(60 / np.asarray(new)) - 1) / 2)
        target = Grid(
            tuple(int(np.ceil(60 / s)) for s in new), new, tuple(middle - half), direction
        )
    else:
        target = source.with_spacing(new)
    result = resample_like(volume, target)
    error_mm = np.linalg.norm(centroid(result) - centroid(volume))
    assert error_mm <= 0.01


@pytest.mark.parametrize("target_tilt", [False, True])
@pytest.mark.parametrize("label", [False, True])
def test_the_48_axis_orders_give_the_same_bits(target_tilt, label):
    volume = noise(Grid((9, 11, 8), (1.0, 0.7, 1.9), origin=(4, -3, 8)))
    if label:
        volume = Volume((volume.array > 0.4).astype(np.uint8) * 3, volume.grid)
    target = Grid((12, 9, 7), (0.8, 1.3, 1.4), origin=(4.2, -2, 7.5))
    if target_tilt:
        target = Grid(target.shape, target.spacing, target.origin, TILT)
    expected = resample_like(volume, target, label=label)
    for axes in ORDERS:
        got = resample_like(volume.reordered(axes), target, label=label)
        np.testing.assert_array_equal(got.array, expected.array)
        got = resample_like(volume, target.reordered(axes), label=label)
        np.testing.assert_array_equal(got.array, axes.apply(expected.array))
        assert got.array.flags.c_contiguous


def test_a_tilt_too_small_to_matter_is_not_oblique():
    grid = Grid((40, 40, 40))
    for angle, kind in ((1e-5, SeparableMapping), (1e-2, ObliqueMapping)):
        turn = tuple(map(tuple, Rotation.from_euler("z", angle).as_matrix()))
        tilted = Grid(grid.shape, (0.9, 0.9, 0.9), direction=turn)
        assert isinstance(Passage.between(grid, tilted).mapping, kind)


@pytest.mark.parametrize("ratio", [1.3, 2.1, 3.2])
@pytest.mark.parametrize("direction", [Grid((1, 1, 1)).direction, TILT])
def test_shrinking_widens_a_blob_by_the_new_voxel_and_no_more(ratio, direction):
    # variances add: the blob's, and ratio^2 / 6 of a triangle of half-width `ratio`
    volume = blob(Grid((64, 64, 64)), (31.3, 32.1, 31.8), sigma_mm=5.0)
    middle = Grid((1, 1, 1), origin=(31.3, 32.1, 31.8), direction=direction)
    n = int(60 / ratio)
    target = Grid((n, n, n), (ratio,) * 3, direction=direction)
    offset = middle.index_to_world(np.zeros(3)) - target.index_to_world(np.full(3, (n - 1) / 2))
    result = resample_like(volume, Grid(target.shape, target.spacing, tuple(offset), direction))
    distance2 = ((world(result.grid) - centroid(result)) ** 2).sum(axis=-1)
    variance = (distance2 * result.array).sum(dtype=np.float64) / result.array.sum() / 3
    assert variance == pytest.approx(25 + ratio**2 / 6, abs=0.06)


@pytest.mark.parametrize("shape", [(1, 9, 9), (9, 1, 1), (1, 1, 1)])
def test_axes_of_one_voxel(shape):
    grid = Grid(shape, (2.0, 1.0, 1.0))
    for spacing in ((1.0, 1.0, 1.0), (8.0, 8.0, 8.0), (0.5, 0.3, 0.9)):
        result = resample_to_spacing(Volume(np.full(shape, 4, np.int16), grid), spacing)
        np.testing.assert_allclose(result.array, 4, rtol=1e-6)
    turned = Grid((2, 2, 2), direction=TILT)
    assert resample_like(Volume(np.full(shape, 4.0), grid), turned).array[0, 0, 0] == 4


# --- quality ------------------------------------------------------------------------------------


def test_there_and_back_on_a_smooth_volume():
    grid = Grid((32, 36, 40), (1.0, 0.9, 0.8))
    smooth = ndimage.gaussian_filter(noise(grid).array, 4, mode="nearest")
    volume = Volume(smooth / np.ptp(smooth), grid)
    finer = resample_to_spacing(volume, (0.6, 0.5, 0.7))
    back = resample_like(finer, grid)
    assert np.sqrt(np.mean((back.array - volume.array) ** 2)) <= 0.01


@pytest.mark.parametrize("ratio", [2.0, 2.6, 4.0])
def test_shrinking_lets_little_noise_alias(ratio):
    # A wave too fast for the new grid must vanish, not come back as a slow one.
    grid = Grid((1, 1, 400))
    source = np.arange(400)
    aliased, sampled = [], []
    for frequency in np.linspace(0.75 / ratio, 0.5, 25):
        wave = np.cos(2 * np.pi * frequency * source + 0.3).astype(np.float32)[None, None]
        result = resample_to_spacing(Volume(wave, grid), (1, 1, ratio))
        at = grid.world_to_index(world(result.grid))[0, 0, :, 2]
        inner = slice(8, -8)
        aliased.append(np.mean(result.array[0, 0, inner] ** 2))
        sampled.append(np.mean(np.interp(at, source, wave[0, 0])[inner] ** 2))
    assert np.mean(aliased) < 0.1 * np.mean(sampled)


def test_shrinking_keeps_what_the_new_grid_can_hold():
    grid = Grid((1, 1, 400))
    wave = np.cos(2 * np.pi * 0.02 * np.arange(400)).astype(np.float32)[None, None]
    result = resample_to_spacing(Volume(wave, grid), (1, 1, 3.0))
    assert np.abs(result.array[..., 10:-10]).max() > 0.9


@pytest.mark.parametrize("tilt", [False, True])
def test_simpleitk_agrees_where_nothing_shrinks(tilt):
    source = Grid((21, 23, 19), (2.0, 0.9, 1.2), origin=(-30.0, 12.0, 7.5))
    target = Grid((30, 24, 20), (1.1, 0.8, 0.9), origin=(-26.0, 15.0, 10.0))
    if tilt:
        target = Grid((20, 20, 20), (0.7, 0.7, 0.8), (-20.0, 17.0, 12.0), TILT)
    volume = noise(source)
    image = SimpleITK.GetImageFromArray(volume.array)
    image.SetSpacing(source.spacing[::-1])
    image.SetOrigin(source.origin[::-1])
    resampler = SimpleITK.ResampleImageFilter()
    resampler.SetSize(target.shape[::-1])
    resampler.SetOutputSpacing(target.spacing[::-1])
    resampler.SetOutputOrigin(target.origin[::-1])
    resampler.SetOutputDirection(np.asarray(target.direction)[::-1, ::-1].ravel().tolist())
    resampler.SetInterpolator(SimpleITK.sitkLinear)
    expected = SimpleITK.GetArrayFromImage(resampler.Execute(image))
    result = resample_like(volume, target)
    inner = interior(result, source, margin_mm=1e-3)
    assert inner.sum() > 1000
    np.testing.assert_allclose(result.array[inner], expected[inner], atol=2e-5)


# --- labels -------------------------------------------------------------------------------------


def largest_share(volume, target, *, tie=1e-5):
    """Labels the plain way: every label's share in full, the largest wins, ties to the last."""
    labels = np.unique(volume.array)
    shares = np.stack(
        [
            resample_like(Volume((volume.array == v).astype(np.float32), volume.grid), target).array
            for v in labels
        ]
    )
    wins = shares >= shares.max(axis=0) - tie
    return labels[len(labels) - 1 - wins[::-1].argmax(axis=0)]


def blocks(grid, labels, seed=0):
    """A label map of smooth regions."""
    field = ndimage.gaussian_filter(noise(grid, seed).array, 1.2)
    edges = np.quantile(field, np.linspace(0, 1, len(labels) + 1)[1:-1])
    return Volume(np.asarray(labels)[np.searchsorted(edges, field)], grid)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 1], np.uint8),
        np.array([False, True]),
        np.array([3, 7, 9, 200], np.uint8),
        np.array([-5, 0, 6], np.int16),
        np.array([0, 14175, 1_000_000], np.int32),
        np.array([2, 2**40], np.uint64),
        np.array([0, 1, 300], ">u2"),
    ],
)
@pytest.mark.parametrize("tilt", [False, True])
def test_labels_are_the_largest_share(labels, tilt):
    volume = blocks(Grid((12, 14, 13), (1.5, 1.0, 1.0)), labels)
    target = volume.grid.with_spacing((0.9, 0.7, 2.1))
    if tilt:
        target = Grid((11, 10, 9), (1.2, 1.4, 0.9), (3.0, 2.0, 3.0), TILT)
    result = resample_like(volume, target, label=True, fill=int(labels[0]))
    seen = resample_like(Volume(np.ones(volume.grid.shape), volume.grid), target).array > 0.5
    expected = largest_share(volume, target)
    np.testing.assert_array_equal(result.array[seen], expected[seen])
    assert (result.array[~seen] == labels[0]).all()
    assert result.array.dtype == labels.dtype.newbyteorder("=")


@settings(max_examples=25, deadline=None)
@given(spacings, st.integers(0, 1000))
def test_no_label_arises(spacing, seed):
    rng = np.random.default_rng(seed)
    array = rng.choice(np.uint8([0, 2, 5, 9]), size=(9, 8, 7))
    result = resample_to_spacing(Volume(array, Grid((9, 8, 7))), spacing, label=True)
    assert set(np.unique(result.array)) <= set(np.unique(array))


def test_label_border_lies_between_voxels():
    array = np.zeros((4, 4, 10), np.int16)
    array[..., 5:] = 4
    result = resample_to_spacing(Volume(array, Grid((4, 4, 10))), (1, 1, 0.25), label=True)
    np.testing.assert_array_equal(result.array[2, 2], [0] * 20 + [4] * 20)


def test_a_tie_goes_to_the_larger_label():
    array = np.uint8([[[0, 6]]])
    target = Grid((1, 1, 1), origin=(0, 0, 0.5))
    assert resample_like(Volume(array, Grid((1, 1, 2))), target, label=True).array == 6
    assert resample_like(Volume(array[..., ::-1], Grid((1, 1, 2))), target, label=True).array == 6


def test_thin_structures_survive():
    array = np.zeros((20, 20, 20), np.uint8)
    array[:, :, 9] = 1  # a sheet
    array[5, 5, :] = 2  # a thread through it
    volume = Volume(array, Grid((20, 20, 20)))
    finer = resample_to_spacing(volume, (0.5, 0.5, 0.5), label=True)
    assert (finer.array[0, 0] == 1).sum() == 2
    assert (finer.array[:, :, 30] == 2).sum() == 4
    back = resample_like(finer, volume.grid, label=True)
    np.testing.assert_array_equal(back.array, array)


def test_channels_are_resampled_one_by_one():
    grid = Grid((8, 9, 10))
    channels = [noise(grid, seed).array for seed in range(3)]
    for target in (grid.with_spacing((0.7, 1.4, 1.0)), Grid((8, 8, 8), direction=TILT)):
        result = resample_like(Volume(np.stack(channels), grid), target)
        assert result.array.shape == (3, *target.shape)
        for got, channel in zip(result.array, channels, strict=True):
            np.testing.assert_array_equal(got, resample_like(Volume(channel, grid), target).array)


# --- memory and slabs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spacing", "label"),
    [((150, 150, 150), 0.6, False), ((200, 200, 200), 1.25, False), ((190, 190, 190), 0.6, True)],
)
def test_memory_is_the_result_and_little_more(shape, spacing, label):
    array = np.zeros(shape, np.uint8)
    array[20:-20, 30:-30, 10:-10] = 1
    array[40:60, 40:60, 40:60] = 2
    volume = Volume(array, Grid(shape))
    tracemalloc.start()
    try:
        result = resample_to_spacing(volume, (spacing,) * 3, label=label)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= 1.2 * result.array.nbytes


@pytest.mark.parametrize("tilt", [False, True])
def test_a_memory_map_is_read_a_box_at_a_time(tmp_path, tilt):
    shape = (300, 128, 128)
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.int16, shape)[150:] = 100
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    target = Grid((100, 42, 42), (3.0, 3.0, 3.0), (1.0, 1.0, 1.0))
    if tilt:
        target = Grid(target.shape, target.spacing, target.origin, TILT)
    tracemalloc.start()
    try:
        result = resample_like(Volume(mapped, Grid(shape)), target)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < mapped.nbytes / 2
    assert result.array.max() == pytest.approx(100)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(-9, 30),
    st.floats(0.15, 6),
    st.one_of(st.just(0.0), st.floats(0.02, 6)),
    st.integers(1, 9),
)
def test_slabs_need_what_they_say(n_source, n_target, start, step, smoothing, n_slab):
    weights = AxisWeights.build(n_source, n_target, start=start, step=step, smoothing=smoothing)
    array = np.random.default_rng(0).standard_normal((2, n_source, 3), dtype=np.float32)
    inside = weights.inside
    whole = weights.apply(array, 1, rows=inside, columns=(0, n_source))
    for first in range(inside[0], inside[1], n_slab):
        rows = (first, min(first + n_slab, inside[1]))
        columns = weights.source_range(*rows)
        assert 0 <= columns[0] < columns[1] <= n_source
        part = weights.apply(array[:, slice(*columns)], 1, rows=rows, columns=columns)
        expected = whole[:, rows[0] - inside[0] : rows[1] - inside[0]]
        np.testing.assert_allclose(part, expected, atol=1e-6)
        assert weights.matrix(rows, columns).sum(axis=1) == pytest.approx(1, abs=1e-6)
    for voxel in range(n_source):  # target_range and the matrix name the same rows
        rows = weights.target_range(voxel, voxel + 1)
        touched = np.flatnonzero(weights.matrix(inside, (voxel, voxel + 1))[:, 0]) + inside[0]
        assert all(rows[0] <= row < rows[1] for row in touched)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(0, 1, 1), (-1, 1, 1), (np.nan, 1, 1), (1, 1, np.inf), (1, 1)])
def test_spacings_must_be_positive(spacing):
    with pytest.raises(GeometryError, match="three positive lengths"):
        resample_to_spacing(noise(Grid((3, 3, 3))), spacing)


def test_a_resample_bomb_is_refused_before_it_is_allocated():
    volume = noise(Grid((24, 20, 16), (1e5, 1e5, 1e5)))
    with pytest.raises(GeometryError, match="voxels; expected at most 2,147,483,648"):
        resample_to_spacing(volume, (1, 1, 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("direction", [Grid((1, 1, 1)).direction, TILT])
def test_images_must_be_finite(bad, direction):
    volume = noise(Grid((5, 5, 5)))
    volume.array[2, 2, 2] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        resample_like(volume, Grid((5, 5, 5), (0.9, 0.9, 0.9), direction=direction))


def test_types_and_fill_are_checked():
    grid = Grid((3, 3, 3))
    with pytest.raises(DataError, match="complex64; expected real"):
        resample_to_spacing(Volume(np.zeros((3, 3, 3), np.complex64), grid), (2, 2, 2))
    with pytest.raises(DataError, match="float64; expected integers"):
        resample_to_spacing(Volume(np.zeros((3, 3, 3)), grid), (2, 2, 2), label=True)
    labels = Volume(np.zeros((3, 3, 3), np.uint8), grid)
    for fill in (0.5, -1, 256, np.nan):
        with pytest.raises(DataError, match="expected a label"):
            resample_like(labels, grid.with_spacing((2, 2, 2)), label=True, fill=fill)
