"""Any network in a budget: what the search finds, and what it takes."""

import math
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import effseg
from effseg.errors import MemoryBudgetError, PlanError
from effseg.losses import CompoundLoss
from effseg.memory import trace_peak
from effseg.networks import build_network
from effseg.planner import rates
from effseg.planner.rates import Rates, machine_rates
from effseg.planner.tuning import network_stride
from effseg.plans import NetworkConfig, parse_bytes


class Stage(nn.Sequential):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(
            nn.Conv3d(n_in, n_out, 3, padding=1, bias=False), nn.GroupNorm(2, n_out), nn.SiLU()
        )


class UserNetwork(nn.Module):
    """Two scales, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stage(1, 8), Stage(8, 8)
        self.down = nn.Conv3d(8, 16, 2, 2)
        self.coarse = Stage(16, 16)
        self.up = nn.ConvTranspose3d(16, 8, 2, 2)
        self.last = Stage(16, 8)
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        skip = self.second(self.first(image))
        up = self.up(self.coarse(self.down(skip)))
        return self.head(self.last(torch.cat((skip, up), 1)))


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_cache", lambda: tmp_path / "effseg")


tune = partial(effseg.tune, UserNetwork, (1, 256, 256, 256), precision="float32", device="cpu")


def dense(memory: str) -> nn.Module:
    return build_network(
        NetworkConfig(
            in_channels=1,
            out_channels=2,
            stem_channels=8,
            growth_rate=8,
            encoder_layers=(3, 3),
            decoder_layers=(3,),
            strides=((1, 1, 1), (2, 2, 2)),
            kernels=((3, 3, 3),) * 2,
            memory=memory,
        )
    )


@pytest.mark.parametrize(
    ("build", "way"),
    [
        (UserNetwork, "4 stages recomputed"),
        (partial(dense, "plain"), "6 stages recomputed"),
        (partial(dense, "shared"), "nothing computed twice"),  # to recompute would take more
    ],
)
def test_the_next_larger_patch_is_told_in_the_way_that_takes_least(build, way) -> None:
    found = partial(effseg.tune, build, (1, 96, 96, 96), precision="float32", device="cpu")
    tuning = found(memory="64MiB")
    next_larger = tuning.alternatives[1]
    assert "; the budget is 64 MiB" in next_larger.why
    assert next_larger.choice.endswith(way)
    needed = math.ceil(1.03 * next_larger.peak_bytes)  # 3 % are kept free
    assert math.prod(found(memory=needed).patch) > math.prod(tuning.patch)


@pytest.mark.parametrize("memory", ["64MiB", "200MiB", "500MiB"])
def test_a_budget_is_used_and_not_exceeded(memory: str) -> None:
    tuning = tune(memory=memory)
    assert 0.92 * parse_bytes(memory) <= tuning.peak_bytes <= parse_bytes(memory)
    assert tuning.batch >= 2
    assert tuning.heap == "mapped"
    assert tuning.alternatives[0].peak_bytes == tuning.peak_bytes


def test_what_was_tuned_takes_what_was_said() -> None:
    tuning = tune(memory="200MiB")
    network = UserNetwork()
    tuning.prepare(network)
    again = trace_peak(
        network,
        (tuning.batch, 1, *tuning.patch),
        loss=CompoundLoss(),
        label_shape=(tuning.batch, *tuning.patch),
        label_dtype=torch.uint8,
        optimizer=torch.optim.AdamW,
        device="cpu",
    )
    assert again == tuning.report
    assert again.device_bytes == tuning.peak_bytes


class Tied(nn.Module):
    """Two convolutions of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(1, 8, 1), nn.Conv3d(8, 2, 3, padding=1)
        self.inner, self.again = (nn.Conv3d(8, 8, 3, padding=1) for _ in range(2))
        self.again.weight = self.inner.weight

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.again(self.inner(self.first(image))))


def test_weights_are_made_once_and_not_kept_while_steps_are_weighed() -> None:
    made: list[weakref.ref[Tensor]] = []

    def build() -> nn.Module:
        assert all(weight() is None for weight in made)
        network = Tied()
        made.extend(weakref.ref(weight) for weight in network.parameters())
        return network

    tuned = effseg.tune(build, (1, 64, 64, 64), memory="96MiB", precision="float32", device="cpu")
    assert len(made) == len(list(Tied().parameters()))  # one network's
    assert all(weight() is None for weight in made)
    again = trace_peak(
        Tied(),
        (tuned.batch, 1, *tuned.patch),
        loss=CompoundLoss(),
        label_shape=(tuned.batch, *tuned.patch),
        label_dtype=torch.uint8,
        optimizer=torch.optim.AdamW,
        device="cpu",
    )
    assert not tuned.policies
    assert tuned.report.peak_bytes == again.peak_bytes  # weights in two places are counted once


def test_more_than_there_is_to_see_is_not_taken() -> None:
    tuning = effseg.tune(
        UserNetwork, (1, 33, 20, 20), memory="4GiB", precision="float32", device="cpu"
    )
    assert tuning.patch == (34, 20, 20)
    assert (tuning.batch, tuning.policies, tuning.heap) == (4, {}, "kept")


def test_a_card_that_is_not_here_may_take_what_is_offloaded() -> None:
    tuning = effseg.tune(UserNetwork, (1, 256, 256, 256), memory="2GiB", device="cuda")
    assert tuning.precision == "bfloat16"
    assert 0.92 * 2**31 <= tuning.peak_bytes <= 2**31


def test_too_little_is_refused_with_what_would_do() -> None:
    with pytest.raises(MemoryBudgetError, match=r"--memory \d+MiB would do"):
        tune(memory="1MiB")


@pytest.mark.parametrize("memory", ["0", "lots", "-1"])
def test_what_is_no_budget_is_refused(memory: str) -> None:
    with pytest.raises(PlanError, match="expected a size"):
        tune(memory=memory)


def test_a_shape_needs_its_channels() -> None:
    with pytest.raises(PlanError, match=r"expected \(channels, z, y, x\)"):
        effseg.tune(UserNetwork, (256, 256, 256), memory="1GiB")


def test_the_stride_is_found_by_trying() -> None:
    assert network_stride(UserNetwork(), 1) == 2
    assert network_stride(Stage(1, 2), 1) == 1
    with pytest.raises(PlanError, match="takes no patch of 3 channels"):
        network_stride(UserNetwork(), 3)


def measured(flops: float, n_bytes: float) -> Rates:
    return Rates(flops=flops, bytes=n_bytes, operators=1.0, why="made up")


def test_a_machine_is_remembered_at_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([measured(3.0, 4.0), measured(5.0, 2.0)])
    monkeypatch.setattr(rates, "_measured", lambda *_: next(found))
    for expected in (measured(3.0, 4.0), measured(5.0, 4.0)):
        rates._best_ever.cache_clear()
        assert machine_rates("cpu", "float32") == expected
    assert machine_rates("cpu", "float32") == measured(5.0, 4.0)  # asked once a process
    rates._best_ever.cache_clear()


def test_a_broken_memory_of_a_machine_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "effseg").mkdir()
    (tmp_path / "effseg" / "rates.json").write_text("[1, 2")
    monkeypatch.setattr(rates, "_measured", lambda *_: measured(1.0, 1.0))
    rates._best_ever.cache_clear()
    assert machine_rates("cpu", "float32") == measured(1.0, 1.0)
    rates._best_ever.cache_clear()


TRAIN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import effseg
from effseg.losses import CompoundLoss
from effseg.memory import PeakResident
from test_tune import UserNetwork

torch.set_num_threads(2)
tuning = effseg.tune(
    UserNetwork, (1, 256, 256, 256), memory="400MiB", precision="float32", device="cpu"
)

def train(network, patch, n_steps):
    optimizer, loss = torch.optim.AdamW(network.parameters()), CompoundLoss()
    for _ in range(n_steps):
        image = torch.randn(tuning.batch, 1, *patch)
        label = torch.randint(0, 2, (tuning.batch, *patch), dtype=torch.uint8)
        optimizer.zero_grad()
        value = loss(network(image), label)
        value.backward()
        optimizer.step()
        del value, image, label

with tuning.running():
    train(UserNetwork(), (8, 8, 8), 1)  # loads what a first step loads
    resident = PeakResident().start()
    network = UserNetwork()
    tuning.prepare(network)
    train(network, tuning.patch, 3)
    print(tuning.peak_bytes, resident.stop())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc and glibc are Linux's")
def test_a_tuned_training_holds_what_was_said() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TRAIN, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    expected, held = map(int, ended.stdout.split())
    assert held == pytest.approx(expected, rel=0.05)
    assert held <= 400 * 2**20
