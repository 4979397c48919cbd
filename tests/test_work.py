"""What a traced step computes and moves."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from two_stages import two_stages

from effseg.memory import trace_forward, trace_peak
from effseg.networks import build_network


def counted_by_torch(network: nn.Module, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(image).mean().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 1)),
        nn.Sequential(nn.Conv3d(2, 4, 3, 2, 1), nn.ConvTranspose3d(4, 2, 2, 2)),
        nn.Sequential(nn.Conv3d(2, 4, 3), nn.Flatten(2), nn.Linear(216, 5)),
    ],
    ids=["convolutions", "transposed", "linear"],
)
def test_flops_are_those_that_torch_counts(network: nn.Module) -> None:
    image = torch.zeros(2, 2, 8, 8, 8)
    work = trace_peak(network, image.shape, device="cpu").work
    assert work is not None
    assert work.flops == counted_by_torch(network, image)


def small(memory: str) -> nn.Module:
    return build_network(two_stages(memory, out_channels=2))


def test_forward_takes_the_same_arithmetic_however_it_is_stored() -> None:
    plain, shared = (
        trace_forward(small(memory), (1, 1, 16, 16, 16), device="cpu").work
        for memory in ("plain", "shared")
    )
    assert plain is not None
    assert shared is not None
    assert shared.flops == plain.flops
    assert shared.moved_bytes < plain.moved_bytes


def test_what_is_computed_again_is_counted_again() -> None:
    shape = (1, 1, 16, 16, 16)
    plain, again = (
        trace_peak(small(memory), shape, device="cpu").work for memory in ("plain", "checkpoint")
    )
    assert plain is not None
    assert again is not None
    assert plain.flops < again.flops < 1.5 * plain.flops


def test_an_optimizer_steps_once() -> None:
    network = nn.Linear(4096, 1, bias=False)

    def moved(optimizer) -> int:
        work = trace_peak(network, (1, 4096), optimizer=optimizer, device="cpu").work
        assert work is not None
        return work.moved_bytes

    of_step = moved(torch.optim.SGD) - moved(None)
    # the weight, its gradient, and the weight again
    assert of_step == pytest.approx(3 * 4 * 4096, rel=0.1)
