"""Predictions that are finished slab by slab against blending whole volumes of logits."""

import gc
import logging
import tracemalloc
from collections.abc import Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from effseg.errors import PlanError
from effseg.inference import Predictor, Run, forecast, mirrored_axes, predict
from effseg.inference.headless import find_headless
from effseg.memory import measure_peak
from effseg.networks import NormActConv, build_network
from effseg.plans import Label, NetworkConfig, Plan, PostprocessConfig
from effseg.preprocess import prepare_image
from effseg.resample import resample_like
from effseg.tiling import gaussian_weights, padding, windows
from effseg.volume import AxisOrder, Grid, Volume

TIE = 1e-4
AXES = (2, 3, 4)


def mirrors(tensor_axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of axes of (N, C, z, y, x)."""
    found = chain.from_iterable(combinations(tensor_axes, n) for n in range(len(tensor_axes) + 1))
    return list(found)


class Body(nn.Module):
    """Features whose norm takes each window's own statistics."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, n_features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x - x.mean((2, 3, 4), keepdim=True)).relu()


def network_of(n_features: int, n_classes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Body(n_features), nn.Conv3d(n_features, n_classes, 1))


def image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)


@torch.inference_mode()
def in_memory(
    networks: Sequence[nn.Module],
    x: np.ndarray,
    patch: tuple[int, int, int],
    overlap: float,
    tta: bool | Sequence[int],
) -> np.ndarray:
    """Logits of all classes over the whole padded volume, summed up in float64."""
    pads = padding(x.shape[1:], patch)
    padded = np.pad(x, ((0, 0), *pads), constant_values=x.min())
    weights = gaussian_weights(patch).astype(np.float64)
    total, share = 0.0, np.zeros(padded.shape[1:])
    for box in windows(padded.shape[1:], patch, overlap=overlap):
        window = torch.from_numpy(padded[(slice(None), *box)])[None]
        passed = [
            network(window.flip(axes)).flip(axes)
            for network in networks
            for axes in mirrors(AXES if tta is True else tta or ())
        ]
        mean = torch.stack(passed).double().mean(0)[0].numpy()
        if not isinstance(total, np.ndarray):
            total = np.zeros((len(mean), *padded.shape[1:]))
        total[(slice(None), *box)] += mean * weights
        share[box] += weights
    inner = tuple(
        slice(before, before + n) for (before, _), n in zip(pads, x.shape[1:], strict=True)
    )
    return (total / share)[(slice(None), *inner)]


def assert_same_labels(got: np.ndarray, logits: np.ndarray) -> None:
    second, first = np.partition(logits, -2, axis=0)[-2:]
    ties = first - second < TIE
    assert ties.sum() <= 2 + 0.01 * ties.size
    np.testing.assert_array_equal(got[~ties], logits.argmax(axis=0)[~ties])


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    patch=st.tuples(*[st.integers(3, 7)] * 3),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.6]),
    tta=st.booleans(),
    n_networks=st.integers(1, 2),
    features=st.sampled_from([2, 3, 8]),
    window_batch=st.integers(1, 3),
)
def test_slabs_are_the_logits_of_whole_volumes(
    shape, patch, overlap, tta, n_networks, features, window_batch
) -> None:
    networks = [network_of(features, 5, seed) for seed in range(n_networks)]
    x = image(*shape)
    predictor = Predictor(networks, patch, overlap=overlap, tta=tta, window_batch=window_batch)
    expected = in_memory(networks, x, patch, overlap, tta)
    slabs = predictor.slabs(x)
    assert (slabs.head is not None) == (features * n_networks < 5)
    at = 0
    for start, logits in slabs:
        assert start == at
        part = (slice(None),) * (1 + slabs.axis) + (
            slice(start, start + logits.shape[1 + slabs.axis]),
        )
        np.testing.assert_allclose(logits, expected[part], atol=1e-5)
        at += logits.shape[1 + slabs.axis]
    assert at == shape[slabs.axis]
    assert_same_labels(predictor.predict(x).array, expected)


def test_the_order_of_axes_does_not_matter() -> None:
    patch, x = (4, 5, 6), image(23, 9, 8)
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU(), nn.Conv3d(2, 4, 1))
    expected = Predictor(network, patch).logits(x)
    for order in ((1, 2, 0), (2, 0, 1), (0, 2, 1)):
        turned = Predictor(network, tuple(patch[axis] for axis in order))
        slabs = turned.slabs(x.transpose(0, *(1 + axis for axis in order)))
        assert slabs.axis == order.index(0)
        got = np.concatenate([part for _, part in slabs], axis=1 + slabs.axis)
        back = got.transpose(0, *(1 + order.index(axis) for axis in range(3)))
        np.testing.assert_allclose(back, expected, atol=1e-5)


def test_what_is_finished_is_handed_on_before_the_next_layer_is_passed() -> None:
    done = []
    slabs = Predictor(network_of(2, 3), (8, 8, 8)).slabs(
        image(24, 8, 8), progress=lambda n, _: done.append(n)
    )
    seen = [(start, len(done)) for start, _ in slabs.parts]
    assert seen == [(0, 1), (4, 2), (8, 3), (12, 4), (16, 5)]


def config(**changes: object) -> NetworkConfig:
    given = {
        "in_channels": 1,
        "out_channels": 60,
        "stem_channels": 8,
        "growth_rate": 4,
        "encoder_layers": (1, 1),
        "decoder_layers": (1,),
        "strides": ((1, 1, 1), (2, 2, 2)),
        "kernels": ((3, 3, 3), (3, 3, 3)),
    }
    return NetworkConfig.model_validate(given | changes)


@pytest.mark.parametrize("memory", ["shared", "checkpoint", "plain"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_flagship_is_blended_below_its_head(memory, norm) -> None:
    network = build_network(config(memory=memory, norm=norm)).eval()
    found = find_headless(network, (1, 1, 8, 8, 8))
    assert found is not None
    assert found.path == "heads.0.conv"
    x = image(20, 9, 8)
    predictor = Predictor(network, (8, 8, 8), tta=True)
    expected = in_memory([network], x, (8, 8, 8), 0.5, True)
    np.testing.assert_allclose(predictor.logits(x), expected, atol=1e-4)
    assert_same_labels(predictor.predict(x).array, expected)
    assert all(m.memory == memory for m in network.modules() if isinstance(m, NormActConv))
    y = torch.from_numpy(x[None, :, :8, :8])
    assert network(y).shape[1] == 60


class After(nn.Module):
    """A last 1x1x1 convolution, and something after it."""

    def __init__(self, after) -> None:
        super().__init__()
        self.body, self.head, self.after = Body(2), nn.Conv3d(2, 5, 1), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(self.body(x)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(2), nn.Conv3d(2, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) if self.head(x).ndim == 4 else self.head(2 * x)


class Looking(nn.Module):
    """One that asks for values, which a trace does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network_of(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x / 2 if x.max().item() > 1e6 else x)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (After(nn.Softmax(dim=1)), "does not end in a 1x1x1 convolution"),
        (After(lambda x: x.sigmoid_()), "does not end in a 1x1x1 convolution"),
        (After(lambda x: x * 2), "does not end in a 1x1x1 convolution"),
        (Twice(), "does not end in a 1x1x1 convolution"),
        (network_of(5, 5), "no 1x1x1 convolution makes more channels than it reads"),
        (nn.Conv3d(1, 4, 3, padding=1), "no 1x1x1 convolution makes more"),
        (nn.Conv3d(1, 4, 1, padding=1), "no 1x1x1 convolution makes more"),
        (Looking(), "where the network ends cannot be traced"),
    ],
)
def test_other_networks_are_blended_as_logits_and_it_is_said(network, words, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="effseg"):
        assert find_headless(network, (1, 1, 6, 6, 6)) is None
    assert words in caplog.text


def test_what_is_blended_is_said(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="effseg"):
        found = find_headless(network_of(3, 9), (1, 1, 6, 6, 6))
    assert found is not None
    assert "blending the 3 features below 1 in place of 9 logits" in caplog.text
    alone = find_headless(nn.Conv3d(1, 4, 1), (1, 1, 6, 6, 6))
    assert alone is not None
    x = torch.ones(1, 1, 2, 2, 2)
    assert torch.equal(alone(x), x)
    assert alone.conv(x).shape[1] == 4


def test_networks_with_and_without_a_head_to_spare_are_averaged() -> None:
    networks = [network_of(2, 5), After(lambda x: x * 2).eval()]
    x = image(9, 8, 7)
    expected = in_memory(networks, x, (6, 6, 6), 0.5, False)
    predictor = Predictor(networks, (6, 6, 6))
    assert predictor.slabs(x).head is None
    np.testing.assert_allclose(predictor.logits(x), expected, atol=1e-5)
    with pytest.raises(PlanError, match="no network"):
        Predictor([], (6, 6, 6))


@pytest.mark.parametrize("window_batch", [1, 2])
def test_constant_windows_are_skipped_exactly_and_counted(window_batch, caplog) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.n_windows = network_of(2, 5), 0

        def forward(self, x: Tensor) -> Tensor:
            self.n_windows += len(x)
            return self.body(x)

    x = image(32, 8, 8)
    x[:, :20] = -3
    network = Counted().eval()
    every = Predictor(network, (8, 8, 8), window_batch=window_batch).logits(x)
    assert network.n_windows == 7
    network.n_windows = 0
    predictor = Predictor(network, (8, 8, 8), window_batch=window_batch, skip_constant=True)
    with caplog.at_level(logging.INFO, logger="effseg"):
        got = predictor.logits(x)
    # windows start at 0, 4, 8, 12, ... and the first four are of one value
    assert network.n_windows == 4
    assert "3 of 7 windows were constant" in caplog.text
    np.testing.assert_allclose(got, every, atol=1e-6)


def living_bytes() -> int:
    """Of all tensors that are alive."""
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) is Tensor]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


@pytest.mark.parametrize(("n_classes", "channels"), [(3, 3), (118, 16)])
def test_memory_does_not_grow_with_the_length(n_classes, channels) -> None:
    network = network_of(16, n_classes)
    peaks = []
    for length in (48, 96):
        predictor = Predictor(network, (16, 16, 16))
        x = image(length, 24, 24)
        before = living_bytes()
        seen = []
        for _, part in predictor.slabs(x).parts:
            seen.append(living_bytes() + part.nbytes)
            del part
        peaks.append(max(seen) - before)
    assert peaks[0] > 4 * channels * 16 * 24 * 24
    assert peaks[1] <= 1.02 * peaks[0]


def peak_bytes(n_classes: int) -> int:
    """Tensor bytes while slabs are made, consumed and dropped; the image is made before."""
    predictor = Predictor(network_of(16, n_classes), (16, 16, 16))
    x = image(64, 32, 32)
    predictor.slabs(x)  # the head is found before

    def run() -> None:
        for _, part in predictor.slabs(x).parts:
            del part

    return measure_peak(run).peak_bytes


def test_memory_does_not_grow_with_the_classes_above_the_features() -> None:
    few, many = peak_bytes(17), peak_bytes(118)
    assert many <= 1.05 * few
    # beside two classes, for which logits are blended: no more than the features' own sums and slab
    frontier = 4 * 16 * 32 * 32
    assert many - peak_bytes(2) <= 1.05 * 14 * (frontier + frontier // 2 + 4 * 16**3)


def run_of(plan: Plan, n_classes: int) -> Run:
    """A run of an untrained network with this many classes."""
    torch.manual_seed(0)
    network = plan.network.model_copy(update={"out_channels": n_classes})
    labels = tuple(Label(value=2 * i, name=f"label {i}") for i in range(n_classes))
    plan = plan.model_copy(
        update={"network": network, "labels": labels, "spacing": (1.5, 0.9, 1.2)}
    )
    return Run(folder=Path("nowhere"), plan=plan, network=build_network(network).eval())


def trained_with(plan: Plan, **augment: Any) -> Plan:
    content = plan.model_dump(mode="json")
    content["training"]["augment"] |= augment
    return Plan.model_validate(content)


def test_mirrors_are_those_that_every_run_was_trained_on(tiny_plan: Plan) -> None:
    def axes(*trained: dict[str, Any]) -> tuple[int, ...]:
        plans = [trained_with(tiny_plan, **augment) for augment in trained]
        return mirrored_axes([run_of(plan, 3) for plan in plans])

    assert axes({"flip_axes": ["z", "x"]}) == (0, 2)
    assert axes({"flip_axes": ["z", "x"]}, {"flip_axes": ["x"]}) == (2,)
    assert axes({"flip_axes": ["z"], "flip": 0.0}) == ()
    assert axes({"flip_axes": ["z"], "probability": 0.0}) == ()


def test_an_axis_that_is_none_is_refused() -> None:
    with pytest.raises(PlanError, match=r"tta \(3,\)"):
        Predictor(nn.Identity(), (8, 8, 8), tta=(3,))


@pytest.mark.parametrize("n_classes", [3, 40])
@pytest.mark.parametrize(
    ("order", "flips", "tta"),
    [
        ((0, 1, 2), (False, False, False), "x"),
        ((2, 0, 1), (True, False, True), "zy"),
        ((1, 2, 0), (False, True, False), ""),
    ],
)
def test_predictions_are_the_labels_of_whole_volumes(
    tiny_plan: Plan, n_classes, order, flips, tta
) -> None:
    # mirrors are shown along the axes that training flipped alone
    run = run_of(trained_with(tiny_plan, flip_axes=tuple(tta)), n_classes)
    assert (run.headless is not None) == (n_classes == 40)
    grid = Grid(shape=(30, 19, 23), spacing=(1.0, 1.1, 1.3), origin=(4.0, -2.0, 9.0))
    axes = AxisOrder(order=order, flips=flips)
    volume = Volume(array=image(*grid.shape)[0], grid=grid).reordered(axes)
    prepared = prepare_image(volume, run.plan)
    flipped = [2 + "zyx".index(axis) for axis in tta]
    logits = in_memory([run.network], prepared.image, run.plan.patch_size, 0.5, flipped)
    target = prepared.native.reordered(prepared.native.canonical_axes())
    planes = [
        resample_like(Volume(array=plane.astype(np.float32), grid=prepared.grid), target)
        for plane in logits
    ]
    canonical = np.stack([plane.array for plane in planes])
    expected = prepared.native.canonical_axes().inverse().apply(canonical)
    rule = PostprocessConfig(fraction_of_largest=None)
    got = predict(run, volume, tta=bool(tta), postprocess=rule)
    assert got.grid == volume.grid
    assert set(np.unique(got.array)) <= set(range(0, 2 * n_classes, 2))
    assert_same_labels(got.array // 2, expected)


@pytest.mark.parametrize("n_classes", [3, 40])
def test_a_forecast_holds_what_a_prediction_takes(tiny_plan: Plan, n_classes) -> None:
    run = run_of(tiny_plan, n_classes)
    volume = Volume(array=image(90, 40, 40)[0], grid=Grid(shape=(90, 40, 40)))
    expected = forecast(run, volume.grid)  # traces, which is not meant

    def run_it() -> None:
        predict(run, volume)

    tracemalloc.start()
    tensors = measure_peak(run_it).peak_bytes
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensors + arrays <= expected.peak_bytes


def test_a_forecast_grows_with_the_volume_only_by_its_labels_where_these_are_kept(
    tiny_plan: Plan,
) -> None:
    run = run_of(tiny_plan, 40)
    short, long = (Grid(shape=(n, 40, 40), spacing=run.plan.spacing) for n in (100, 200))
    kept = [forecast(run, grid).peak_bytes for grid in (short, long)]
    assert kept[1] - kept[0] == short.n_voxels
    written = [forecast(run, grid, writes=True).peak_bytes for grid in (short, long)]
    assert written[0] == written[1]


def test_a_forecast_does_not_grow_with_the_classes_above_the_features(tiny_plan: Plan) -> None:
    grid = Grid(shape=(60, 60, 60))
    few, many = (forecast(run_of(tiny_plan, n), grid).host_bytes for n in (40, 118))
    assert many <= 1.05 * few


@pytest.mark.gpu
@pytest.mark.parametrize("sums", ["device", "host", "disk"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_cuda_device_sums_up_anywhere(sums, backwards) -> None:
    x = image(30, 12, 11)
    given_as = np.flip(x, 1).copy() if backwards else x
    expected = Predictor(network_of(2, 5), (8, 8, 8)).logits(x)
    predictor = Predictor(network_of(2, 5), (8, 8, 8), device="cuda", window_batch=3)
    parts = predictor.slabs(given_as, axis=0, backwards=backwards, sums=sums)
    got = np.concatenate([part for _, part in parts], axis=1)
    np.testing.assert_allclose(got, np.flip(expected, 1) if backwards else expected, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [2, 8])
def test_a_cuda_device_blends_the_same(features) -> None:
    x = image(30, 12, 11)
    expected = Predictor(network_of(features, 5), (8, 8, 8), tta=True).logits(x)
    predictor = Predictor(network_of(features, 5), (8, 8, 8), tta=True, device="cuda")
    np.testing.assert_allclose(predictor.logits(x), expected, atol=1e-3)
