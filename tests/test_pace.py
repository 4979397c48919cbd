"""How many windows a pass takes is told by timing, and changes no label."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_stream_files import Counting, image
from torch import Tensor, nn

from effseg.inference import Predictor, budget, forecast, load_run, pace, predict
from effseg.inference.budget import most_windows
from effseg.inference.pace import MOST_WINDOWS, Pace
from effseg.networks import build_network
from effseg.plans import NetworkConfig
from effseg.volume import Grid, Volume


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A clock that only moves when it is told to."""
    moved = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: moved.seconds)
    return moved


def sizes(found: Pace, clock: SimpleNamespace, of_window: dict[int, float], n: int, most: int):
    """The windows of the next passes, each taking so many seconds a window."""
    taken = []
    for _ in range(n):
        size = found.windows(most)
        taken.append(size)

        def call(size: int = size) -> int:
            clock.seconds += size * of_window[size]
            return size

        found.run(call, size, wait=lambda: None)
    return taken


@pytest.mark.parametrize(
    ("of_window", "expected"),
    [
        ({1: 1.0, 2: 0.8, 4: 0.6, 8: 0.7}, [1] * 3 + [2] * 3 + [4] * 3 + [8] * 3 + [4] * 3),
        ({1: 1.0, 2: 0.8, 4: 0.79}, [1] * 3 + [2] * 3 + [4] * 3 + [2] * 6),
        ({1: 1.0, 2: 1.1}, [1] * 3 + [2] * 3 + [1] * 9),
        ({1: 1.0, 2: 0.97}, [1] * 3 + [2] * 3 + [1] * 9),  # not worth its memory
    ],
)
def test_windows_are_doubled_as_long_as_that_pays(clock, of_window, expected, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="effseg"):
        assert sizes(Pace("cuda"), clock, of_window, 15, 16) == expected
    best = expected[-1]
    assert f"{best} windows a pass" in caplog.messages[-1]
    assert f"{1000 * of_window[best]:.3g} ms with {best}" in caplog.messages[-1]


def test_no_more_are_tried_than_there_is_room_for(clock) -> None:
    found = Pace("cuda")
    faster = {1: 1.0, 2: 0.5, 4: 0.25}
    assert sizes(found, clock, faster, 5, 1) == [1] * 5
    assert sizes(found, clock, faster, 5, 3) == [2] * 5
    assert sizes(found, clock, faster, 4, 4) == [4] * 4
    assert sizes(found, clock, faster, 1, 2) == [2]  # what was found is kept


def test_the_first_pass_of_a_size_and_passes_of_fewer_windows_do_not_count(clock) -> None:
    found, seconds, waits = Pace("cuda"), iter([100.0, 5.0, 1.0, 1.0]), []

    def call() -> int:
        clock.seconds += next(seconds)
        return 1

    found.run(lambda: 0, 1, wait=lambda: None)  # all were constant
    for _ in range(3):
        assert found.windows(1) == 1
        found.run(call, 1, wait=lambda: waits.append(clock.seconds))
    assert found.windows(2) == 2
    assert len(waits) == 6
    found.run(call, 1, wait=lambda: waits.append(clock.seconds))
    assert len(waits) == 6  # a device is waited for only while something is found out


class Seen(nn.Module):
    """A network that notes how many windows it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.network(x)


@pytest.mark.parametrize(
    ("side", "kind", "most"), [(8, "cpu", 4), (48, "cpu", 2), (64, "cpu", 1), (96, "cuda", 16)]
)
def test_a_cpu_joins_small_windows_alone(side, kind, most) -> None:
    assert most_windows(None, (side, side, side), kind) == most
    assert most_windows(3, (side, side, side), kind) == 3


@pytest.mark.parametrize("of_window", [{1: 1.0, 2: 1.0, 4: 0.5}, {1: 1.0, 2: 1.0, 4: 2.0}])
def test_on_a_cpu_no_bit_depends_on_time(clock, of_window) -> None:
    x, patch = image(64, 20, 28), (8, 8, 8)
    expected = Predictor(Counting(), patch, window_batch=2).logits(x[None])

    class Timed(Counting):
        def forward(self, x: Tensor) -> Tensor:
            clock.seconds += len(x) * of_window[len(x)]
            return super().forward(x)

    seen = Seen(Timed())
    predictor = Predictor(seen, patch)
    np.testing.assert_array_equal(predictor.logits(x[None]), expected)
    assert seen.sizes[:6] == [2] * 3 + [4] * 3
    n_before = len(seen.sizes)
    np.testing.assert_array_equal(predictor.logits(x[None]), expected)
    assert max(seen.sizes[n_before:]) == (4 if of_window[4] < 1 else 2)


def test_a_number_in_the_plan_and_large_windows_are_left_alone(monkeypatch) -> None:
    x, patch = image(24, 20, 20), (8, 8, 8)
    monkeypatch.setattr(budget, "USUAL_VOXELS", math.prod(patch))
    for window_batch, most in ((None, 1), (3, 3)):
        seen = Seen(Counting())
        Predictor(seen, patch, window_batch=window_batch, memory="1GiB").predict(x)
        assert max(seen.sizes) == most


def test_a_run_times_its_windows_once_for_all_images(tiny_run: Path) -> None:
    run = load_run(tiny_run)
    assert run.plan.inference.window_batch is None
    volume = Volume(array=image(48, 40, 40), grid=Grid((48, 40, 40)))
    expected = predict(run, volume)
    assert forecast(run, volume.grid).window_batch == MOST_WINDOWS["cpu"]
    for _ in range(2):
        got = predict(run, volume, memory="1GiB")
        np.testing.assert_array_equal(got.array, expected.array)
    (found,) = run._paces.values()  # one for both images, in whatever manner they were passed
    assert found.windows(1) == 1
    assert found.windows(MOST_WINDOWS["cpu"]) in (2, 4)
    assert {2, 4} <= found._seconds.keys()
    assert all(len(times) == 3 for size, times in found._seconds.items() if size < 4)


@pytest.mark.parametrize("memory", ["shared", "plain"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_logits_do_not_depend_on_how_many_windows_pass_at_once(memory, norm) -> None:
    torch.manual_seed(0)
    config = NetworkConfig(
        in_channels=1,
        out_channels=4,
        stem_channels=8,
        growth_rate=4,
        encoder_layers=(2, 2),
        decoder_layers=(1,),
        strides=((1, 1, 1), (2, 2, 2)),
        kernels=((3, 3, 3), (3, 3, 3)),
        memory=memory,
        norm=norm,
    )
    network = build_network(config).eval()
    x = torch.randn(4, 1, 16, 16, 16)
    with torch.inference_mode():
        together = network(x)
        alone = torch.cat([network(one[None]) for one in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
