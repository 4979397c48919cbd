"""Predictions from files, chunks and maps to files, none of them whole in memory."""

import logging
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from effseg.errors import DataError, MemoryBudgetError, PlanError
from effseg.inference import Predictor, forecast, load_run, predict
from effseg.inference.budget import choose, forecasts
from effseg.io import SlabReader, StoredVolume, read_volume, write_volume
from effseg.plans import Channel, Normalisation, Plan, PostprocessConfig
from effseg.postprocess import remove_components
from effseg.preprocess import Frame, Moments, PreparedSlabs, normalise, prepare_image
from effseg.resample import resample_like, resample_slabs
from effseg.sources import ArraySource, ImageFiles, SideBySide
from effseg.volume import AxisOrder, Grid, Volume

ORDERS = [
    AxisOrder(order=o, flips=f)
    for o in permutations(range(3))
    for f in product((False, True), repeat=3)
]
NOTHING = PostprocessConfig(fraction_of_largest=None)


class Counting(nn.Module):
    """Three logits of a neighbourhood; counts its windows, and stops at one if told to."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, 3, 3, padding=1)
        self.n_windows = 0
        self.stop = stop

    def forward(self, x: Tensor) -> Tensor:
        self.n_windows += len(x)
        if self.stop is not None and self.n_windows >= self.stop:
            raise KeyboardInterrupt
        return self.conv(x)


def image(*shape: int, dtype=np.float32, seed: int = 0) -> np.ndarray:
    return (100 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


class Chunked:
    """What Zarr and HDF5 give: boxes, on request; remembers how much at once."""

    def __init__(self, array: np.ndarray, chunks: tuple[int, ...]) -> None:
        self._array = array
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, chunks
        self.largest = 0

    def __getitem__(self, box):
        part = self._array[box]
        self.largest = max(self.largest, part.size)
        return part


@pytest.mark.parametrize("shape", [(40, 9, 11), (9, 40, 11), (9, 11, 40), (5, 30, 6)])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_what_is_written_is_what_would_be_returned(shape, suffix, tmp_path: Path) -> None:
    volume = Volume(array=image(*shape), grid=Grid(shape=shape, spacing=(2, 1, 1)))
    expected = Predictor(Counting(), (8, 8, 8)).predict(volume)
    got = Predictor(Counting(), (8, 8, 8)).predict(volume, tmp_path / f"out{suffix}")
    assert isinstance(got, StoredVolume)
    assert got.grid.difference(volume.grid, tolerance=1e-6) is None
    np.testing.assert_array_equal(got.array, expected.array)
    assert got.array.dtype == expected.array.dtype == np.uint8
    assert [path.name for path in tmp_path.iterdir()] == [f"out{suffix}"]


def test_a_written_volume_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    path = write_volume(Volume(array=image(4, 4, 4), grid=Grid((4, 4, 4))), tmp_path / "a.nii")
    stored = StoredVolume(path)
    assert "array" not in vars(stored)
    assert repr(stored) == f"StoredVolume('{path}')"
    assert stored.n_channels == 1
    assert stored.array is stored.array
    np.testing.assert_array_equal(
        stored.crop((slice(1, 3),) * 3).array, image(4, 4, 4)[1:3, 1:3, 1:3]
    )


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40, 9, 11), (9, 11, 40), (20, 5, 6), (6, 5, 4)])
def test_images_that_lie_elsewhere_give_the_labels_of_those_in_memory(
    dtype, shape, tmp_path: Path
) -> None:
    x = image(*shape, dtype=dtype)
    expected = Predictor(Counting(), (8, 8, 8)).predict(x.astype(np.float32)).array
    mapped = np.memmap(tmp_path / "x.raw", dtype=dtype, mode="w+", shape=shape)
    mapped[...] = x
    chunked = Chunked(x, (16, 4, 3))
    files = [
        write_volume(Volume(array=x, grid=Grid(shape)), tmp_path / f"x{suffix}")
        for suffix in (".nii.gz", ".nrrd", ".mha")
    ]
    for given_as in (x, mapped, chunked, Volume(array=mapped, grid=Grid(shape)), *files):
        got = Predictor(Counting(), (8, 8, 8)).predict(given_as, tmp_path / "out.nii.gz")
        np.testing.assert_array_equal(got.array, expected)
    if shape[0] == 40:
        assert chunked.largest == 16 * 9 * 11


def test_only_a_stretch_of_a_chunked_image_is_in_memory() -> None:
    import tracemalloc

    peaks = []
    for length in (64, 256):
        x = image(length, 64, 64, dtype=np.int16)
        predictor = Predictor(Counting(), (16, 32, 32))
        slabs = predictor.slabs(Chunked(x, (8, 8, 8)))
        tracemalloc.start()
        for _, part in slabs.parts:
            del part
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.02 * peaks[0]
    assert peaks[1] < x.nbytes


def test_arrays_of_no_image_are_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(4, 4\); expected \(z, y, x\)"):
        Predictor(Counting(), (4, 4, 4)).predict(np.zeros((4, 4)))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    patch=st.tuples(*[st.integers(3, 7)] * 3),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.6]),
    axis=st.integers(0, 2),
    start=st.floats(0, 1),
    tta=st.booleans(),
    sums=st.sampled_from(["device", "disk"]),
)
def test_any_axis_from_either_end_and_from_anywhere_gives_the_same_logits(
    shape, patch, overlap, axis, start, tta, sums
) -> None:
    x = image(*shape)[None] / 100
    predictor = Predictor(Counting(), patch, overlap=overlap, tta=tta)
    expected = predictor.logits(x)
    given_back = np.flip(x, 1 + axis)
    first = int(start * (shape[axis] - 1))
    for backwards, given_as in ((False, x), (True, Chunked(given_back, (1, 3, 3, 3)))):
        slabs = predictor.slabs(given_as, axis=axis, backwards=backwards, start=first, sums=sums)
        parts = list(slabs)
        assert parts[0][0] == first
        got = np.concatenate([part for _, part in parts], axis=1 + axis)
        wanted = np.flip(expected, 1 + axis) if backwards else expected
        behind = (slice(None),) * (1 + axis) + (slice(first, None),)
        np.testing.assert_allclose(got, wanted[behind], atol=1e-5)


class Greedy(nn.Module):
    """A device that holds a window or two, and remembers what it was asked for."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.inner, self.most, self.asked = Counting(), most, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(x)


def test_out_of_memory_only_the_failed_batch_is_redone_with_less(caplog) -> None:
    x = image(30, 16, 16)[None]
    expected = Predictor(Counting(), (8, 8, 8)).logits(x)
    network = Greedy(most=2)
    got = Predictor(network, (8, 8, 8), window_batch=9).logits(x)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    # 9, 4: too many; then 2 at a time, those that failed among them
    assert network.asked[:2] == [9, 4]
    assert set(network.asked[2:]) <= {1, 2}
    assert network.inner.n_windows == 7 * 9
    assert "no memory for 9 windows at once; 4 from here on" in caplog.text
    with pytest.raises(MemoryBudgetError, match="no memory for one window"):
        Predictor(Greedy(most=0), (8, 8, 8)).logits(x)


def stopped(network: Counting, x: np.ndarray, out: Path, **options) -> None:
    with pytest.raises(KeyboardInterrupt):
        Predictor(network, (8, 8, 8)).predict(x, out, **options)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("rule", [NOTHING, PostprocessConfig(fraction_of_largest=0.5)])
def test_a_file_that_cannot_be_written_is_refused_before_any_window(
    tiny_run: Path, tmp_path: Path, rule, resume
) -> None:
    seen = []
    volume = Volume(array=image(20, 20, 20), grid=Grid((20, 20, 20)))
    with pytest.raises(DataError, match="no format by this name"):
        predict(
            tiny_run,
            volume,
            out=tmp_path / "out.txt",
            postprocess=rule,
            resume=resume,
            progress=lambda *at: seen.append(at),
        )
    assert not seen
    assert not list(tmp_path.iterdir())


def test_a_stopped_prediction_leaves_nothing_and_what_was_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.nii.gz"
    out.write_bytes(b"before")
    stopped(Counting(stop=30), image(64, 12, 12), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.nii.gz"]
    assert out.read_bytes() == b"before"


@pytest.mark.parametrize("shape", [(64, 12, 12), (12, 12, 64)])
def test_a_stopped_prediction_goes_on_where_it_was(shape, tmp_path: Path, caplog) -> None:
    x, out = image(*shape), tmp_path / "out.nii.gz"
    whole = Counting()
    expected = Predictor(whole, (8, 8, 8)).predict(x).array
    stopped(Counting(stop=40), x, out, resume=True)
    assert not out.exists()
    again = Counting()
    with caplog.at_level(logging.INFO, logger="effseg"):
        got = Predictor(again, (8, 8, 8)).predict(x, out, resume=True)
    np.testing.assert_array_equal(got.array, expected)
    assert "planes were there; going on" in caplog.text
    # 4 windows a layer; of the layers before, one is redone
    assert again.n_windows < whole.n_windows - 40 + 2 * 4 + 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.nii.gz"]


def test_what_was_left_of_another_image_or_network_is_refused(tmp_path: Path) -> None:
    x, out = image(64, 12, 12), tmp_path / "out.nii.gz"
    stopped(Counting(stop=40), x, out, resume=True)
    with pytest.raises(DataError, match="begun with another fingerprint"):
        Predictor(Counting(), (8, 8, 8)).predict(x + 1, out, resume=True)
    other = Counting()
    other.conv.bias.data += 1
    with pytest.raises(DataError, match="begun with another fingerprint"):
        Predictor(other, (8, 8, 8)).predict(x, out, resume=True)


def whole_labels(run, volume: Volume, rule: PostprocessConfig) -> np.ndarray:
    labels = predict(run, volume, postprocess=NOTHING)
    return remove_components(labels.array, labels.grid.voxel_mm3, rule)[0]


@pytest.mark.parametrize("rule", [NOTHING, PostprocessConfig(fraction_of_largest=0.5)])
@pytest.mark.parametrize("order", ORDERS[:: len(ORDERS) // 6])
def test_a_run_writes_what_it_returns_components_removed(
    tiny_run: Path, tiny_dataset: Path, tmp_path: Path, rule, order
) -> None:
    run = load_run(tiny_run)
    balls = read_volume(tiny_dataset / "images" / "ball_1.nii.gz")
    # noise, so that there are many components
    noisy = balls.array + image(*balls.grid.shape) / 2
    volume = Volume(array=noisy.astype(np.float32), grid=balls.grid).reordered(order)
    path = write_volume(volume, tmp_path / "in" / "image.nii.gz")
    expected = whole_labels(run, volume, rule)
    returned = predict(run, volume, postprocess=rule)
    np.testing.assert_array_equal(returned.array, expected)
    out = tmp_path / "out" / "labels.nii.gz"
    for given_as, resume in ((volume, False), (path, False), (path, True)):
        got = predict(run, given_as, out=out, postprocess=rule, resume=resume)
        assert got.grid.difference(volume.grid, tolerance=1e-6) is None
        assert np.count_nonzero(got.array != expected) <= 1  # ties of another order of sums
        assert [found.name for found in out.parent.iterdir()] == ["labels.nii.gz"]
        out.unlink()
    assert expected.any()


@pytest.mark.parametrize("rule", [NOTHING, PostprocessConfig(fraction_of_largest=0.5)])
def test_a_killed_run_goes_on_when_asked_to(
    tiny_run: Path, tiny_dataset: Path, tmp_path: Path, rule
) -> None:
    run = load_run(tiny_run)
    plan = run.plan.model_copy(update={"spacing": (0.45, 0.9, 0.9)})
    object.__setattr__(run, "plan", plan)
    path = tiny_dataset / "images" / "ball_1.nii.gz"
    expected = predict(run, path, postprocess=rule).array
    out = tmp_path / "labels.nii.gz"
    counts = []

    def stop(done: int, _: int) -> None:
        if done >= 22:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(run, path, out=out, postprocess=rule, resume=True, progress=stop)
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 2  # what is finished, and its journal
    if rule != NOTHING:
        with pytest.raises(DataError, match="begun with another run, image or option"):
            predict(run, path, out=out, postprocess=rule, resume=True, tta=True)
    got = predict(
        run,
        path,
        out=out,
        postprocess=rule,
        resume=True,
        progress=lambda done, total: counts.append((done, total)),
    )
    np.testing.assert_array_equal(got.array, expected)
    assert [found.name for found in tmp_path.iterdir()] == ["labels.nii.gz"]
    full = []
    predict(run, path, postprocess=rule, progress=lambda done, total: full.append(total))
    assert counts[-1][0] == counts[-1][1] < full[0]


def test_several_runs_are_averaged_if_they_belong_together(
    tiny_run: Path, tiny_dataset: Path
) -> None:
    one, other = load_run(tiny_run), load_run(tiny_run)
    for parameter in other.network.parameters():
        parameter.data *= 1.5
    path = tiny_dataset / "images" / "ball_1.nii.gz"
    prepared = prepare_image(read_volume(path), one.plan)
    predictor = Predictor([one.network, other.network], one.plan.patch_size)
    from effseg.preprocess import restore_labels

    expected = restore_labels(predictor.slabs(prepared.image), prepared, one.plan).array
    got = predict([one, other], path, postprocess=NOTHING)
    assert np.count_nonzero(got.array != expected) <= 1
    strange = one.plan.model_copy(update={"spacing": (3.0, 3.0, 3.0)})
    object.__setattr__(other, "plan", strange)
    from effseg.errors import CheckpointError

    with pytest.raises(CheckpointError, match="differ in spacing"):
        predict([one, other], path)
    with pytest.raises(CheckpointError, match="no run"):
        predict([], path)


CT = Normalisation(kind="ct", low=-150, high=120, mean=10, std=50)
ZSCORE = Normalisation(kind="zscore")


def plan_of(plan: Plan, *kinds: Normalisation, spacing=(1.4, 0.8, 1.1)) -> Plan:
    channels = tuple(Channel(name=str(i), normalisation=k) for i, k in enumerate(kinds))
    network = plan.network.model_copy(update={"in_channels": len(kinds)})
    return plan.model_copy(update={"channels": channels, "spacing": spacing, "network": network})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spacing", [(1.4, 0.8, 1.1), (1.0, 0.9, 1.2)])
def test_an_image_is_prepared_slab_by_slab_as_it_is_whole(tiny_plan: Plan, order, spacing) -> None:
    plan = plan_of(tiny_plan, CT, ZSCORE, spacing=spacing)
    grid = Grid(shape=(19, 12, 9), spacing=(1.0, 0.9, 1.2), origin=(4, -2, 9))
    array = image(2, *grid.shape, dtype=np.int16)
    array[1] = abs(array[1]) + 10
    array[1, :4] = 0  # the surroundings, and a slab without a body
    volume = Volume(array=array, grid=grid).reordered(order)
    prepared = prepare_image(volume, plan)
    for axis in range(3):
        frame = Frame.of(volume.grid, plan, axis=axis)
        flip = 1 + axis if frame.backwards else ()
        expected = np.flip(prepared.image, flip)
        for first in (0, 7):
            slabs = PreparedSlabs(ArraySource(volume.array), frame, plan).slabs(axis, start=first)
            parts = list(slabs)
            assert parts[0][0] == first
            got = np.concatenate([part for _, part in parts], axis=1 + axis)
            behind = (slice(None),) * (1 + axis) + (slice(first, None),)
            np.testing.assert_allclose(got, expected[behind], atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 15)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 3)] * 3),
    axis=st.integers(0, 2),
    thick=st.integers(1, 9),
    start=st.floats(0, 1),
)
def test_images_are_resampled_slab_by_slab_as_they_are_whole(
    shape, spacing, axis, thick, start
) -> None:
    volume = Volume(array=image(2, *shape), grid=Grid(shape))
    target = volume.grid.with_spacing(spacing)
    expected = resample_like(volume, target).array
    first = int(start * (target.shape[axis] - 1))
    lead = (slice(None),) * (1 + axis)
    parts = (
        (at, volume.array[(*lead, slice(at, at + thick))]) for at in range(0, shape[axis], thick)
    )
    found = list(resample_slabs(parts, volume.grid, target, axis=axis, start=first))
    got = np.concatenate([part for _, part in found], axis=1 + axis)
    assert found[0][0] == first
    np.testing.assert_allclose(got, expected[(*lead, slice(first, None))], atol=2e-3)


@given(
    parts=st.lists(
        st.lists(st.sampled_from([-3.0, -1.0, 0.0, 2.5, 7.0]), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_moments_of_parts_are_those_of_the_whole(parts) -> None:
    moments = Moments()
    for part in parts:
        moments = moments.joined(np.asarray(part, np.float32))
    whole = np.concatenate([np.asarray(part, np.float32) for part in parts])
    channel = Channel(name="MR", normalisation=ZSCORE)
    got = normalise(whole, channel, moments=moments)
    np.testing.assert_allclose(got, normalise(whole, channel), atol=1e-5)


def test_channels_in_several_files_are_streamed_side_by_side(tmp_path: Path) -> None:
    array = image(2, 20, 5, 6, dtype=np.int16)
    paths = [
        write_volume(Volume(array=plane, grid=Grid((20, 5, 6))), tmp_path / f"{i}.nii.gz")
        for i, plane in enumerate(array)
    ]
    both = write_volume(Volume(array=array, grid=Grid((20, 5, 6))), tmp_path / "both.nii.gz")
    for files in (paths, [both]):
        judged = ImageFiles.judged(files, name="case")
        assert (judged.n_channels, judged.voxel_bytes) == (2, 2)
        for whole in (False, True):
            source = judged.opened(whole=whole)
            for first in (0, 11):
                got = np.concatenate([p for _, p in source.slabs(0, start=first)], axis=1)
                np.testing.assert_array_equal(got, array[:, first:])
    assert isinstance(ImageFiles.judged(paths, name="case").opened(whole=True), SideBySide)
    with pytest.raises(DataError, match="2 channels in one of 2 image files of case"):
        ImageFiles.judged([both, paths[0]], name="case")


def test_a_budget_is_kept_by_smaller_passes_and_sums_on_the_disk(tmp_path: Path, caplog) -> None:
    x = image(40, 24, 24)
    expected = Predictor(Counting(), (16, 16, 16), window_batch=4).predict(x).array
    plenty = Predictor(Counting(), (16, 16, 16), window_batch=4, memory="1GiB")
    with caplog.at_level(logging.INFO, logger="effseg"):
        np.testing.assert_array_equal(plenty.predict(x).array, expected)
    assert "up to 4 windows a pass, sums on the host" in caplog.text
    with pytest.raises(MemoryBudgetError, match=r"--memory \d+MiB would do"):
        Predictor(Counting(), (16, 16, 16), window_batch=4, memory="1MiB").predict(x)


def test_ways_are_tried_from_the_fastest_to_the_least(tiny_plan: Plan) -> None:
    from effseg.inference.budget import Demand

    grid = Grid((60, 200, 200))
    demand = Demand(
        frame=lambda axis: Frame.of(grid, tiny_plan, axis=axis),
        is_file=True,
        lies_ready=False,
        voxel_bytes=2,
        n_channels=1,
        n_blended=8,
        patch_size=(32, 32, 32),
        overlap=0.5,
        window_batch=4,
        mirrored=False,
        label_bytes=1,
        keeps_labels=False,
        n_maps=0,
        files_bytes=0,
        has_rule=False,
        kind="cpu",
        pass_bytes=lambda n: n << 20,
        weight_bytes=1 << 20,
    )
    ways = list(forecasts(demand))
    assert [way.sums for way in ways] == ["host"] * 6 + ["disk"] * 6
    assert [way.window_batch for way in ways[:6]] == [4, 4, 2, 2, 1, 1]
    # a flat image is swept sideways, for which its file has to be read whole
    assert [way.reading for way in ways[:2]] == ["whole", "streamed"]
    assert [way.frame.native_axis for way in ways[:2]] == [1, 0]
    least = min(way.peak_bytes for way in ways)
    assert choose(ways, budget_bytes=None, free_bytes=None) is ways[0]
    assert choose(ways, budget_bytes=least, free_bytes=None).peak_bytes == least
    with pytest.raises(MemoryBudgetError, match=f"{-(-least // 2**20)}MiB would do"):
        choose(ways, budget_bytes=least - 1, free_bytes=None)
    long = replace(demand, frame=lambda axis: Frame.of(Grid((200, 32, 40)), tiny_plan, axis=axis))
    assert next(forecasts(long)).window_batch == 2  # no more lie side by side
    cuda = list(forecasts(replace(demand, kind="cuda")))
    assert [way.sums for way in cuda[::6]] == ["device", "host", "disk"]
    assert all(way.device_bytes > 0 for way in cuda)
    with pytest.raises(MemoryBudgetError, match="of the device"):
        choose(cuda, budget_bytes=None, free_bytes=1)


def test_networks_that_cannot_be_traced_cannot_promise_to_fit() -> None:
    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((x, -x), dim=1) * (2 if x.max().item() > 0 else 1)

    x = image(10, 8, 8)
    assert Predictor(Looking(), (8, 8, 8)).predict(x).array.any()
    with pytest.raises(PlanError):
        Predictor(Looking(), (8, 8, 8), memory="1GiB").predict(x)


def test_a_forecast_for_a_file_counts_it_where_it_is_read_whole(tiny_run: Path) -> None:
    grid = Grid((20, 300, 300))
    whole = forecast(tiny_run, grid, writes=True, file_voxel_bytes=4)
    given_as = forecast(tiny_run, grid, writes=True)
    assert whole.reading == "whole"
    assert whole.peak_bytes - given_as.peak_bytes == 4 * grid.n_voxels


def test_a_file_found_faulty_in_the_end_leaves_nothing(tmp_path: Path) -> None:
    path = write_volume(
        Volume(array=image(64, 12, 12), grid=Grid((64, 12, 12))), tmp_path / "x.nii.gz"
    )
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x\.nii\.gz"):
        Predictor(Counting(), (8, 8, 8)).predict(path, tmp_path / "out.nii.gz")
    assert [found.name for found in tmp_path.iterdir()] == ["x.nii.gz"]
    assert SlabReader(path).grid.shape == (64, 12, 12)
