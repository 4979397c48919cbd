"""Samples one after the other, as a plan may have them: what is traced is what training takes."""

from functools import partial

import pytest
import torch
from two_stages import two_stages

from effseg.losses import CompoundLoss, build_loss
from effseg.memory import measure_peak
from effseg.networks import build_network
from effseg.planner.step import PlannedTraining
from effseg.plans import LossConfig
from effseg.training.step import SampleBySample, WholeBatch

PATCH, BATCH = (32, 32, 32), 3


config = partial(two_stages, out_channels=3)


def subject(loss: LossConfig) -> PlannedTraining:
    return PlannedTraining(
        build_config=lambda patch, mode: config(mode),
        loss=loss,
        ignored=False,
        precision="float32",
        device="cpu",
    )


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig(dice_over_batch=False),
        LossConfig(balanced=True, squared_dice_weight=1.0, edge_weight=1.0),
    ],
    ids=["usual", "by sample", "balanced, squared and weighed"],
)
@pytest.mark.parametrize("mode", ["plain", "shared"])
def test_the_trace_of_split_steps_is_what_they_take(mode, loss) -> None:
    planned = subject(loss)
    traced = planned.trace(planned.network(PATCH, mode), PATCH, BATCH, split=True)
    network = build_network(config(mode))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    step = SampleBySample(network, build_loss(loss, ignore_label=None, n_classes=3))
    image = torch.randn(BATCH, 1, *PATCH)
    label = torch.randint(0, 3, (BATCH, *PATCH), dtype=torch.uint8)

    def train() -> None:
        step.backward(step.loss(image, label))
        optimizer.step()
        optimizer.zero_grad()

    train()  # the optimizer's state is there from the second step on
    assert measure_peak(train).peak_bytes == pytest.approx(traced.peak_bytes, rel=0.02)


@pytest.mark.parametrize("mode", ["plain", "shared"])
def test_split_steps_take_little_more_than_one_sample(mode) -> None:
    planned = subject(LossConfig())
    trace = partial(planned.trace, planned.network(PATCH, mode), PATCH)
    one, whole, split = trace(1), trace(BATCH), trace(BATCH, split=True)
    assert one.peak_bytes <= split.peak_bytes < 1.1 * one.peak_bytes + 5 * BATCH * 32**3
    assert split.peak_bytes < 0.6 * whole.peak_bytes
    assert split.work is not None
    assert whole.work is not None
    assert 1.2 * whole.work.flops < split.work.flops < 1.5 * whole.work.flops


def test_split_and_whole_steps_make_the_same_gradients() -> None:
    torch.manual_seed(0)
    network = build_network(config("shared")).double()
    space = (16, 24, 16)
    image = torch.randn(BATCH, 1, *space, dtype=torch.float64)
    label = torch.randint(0, 3, (BATCH, *space), dtype=torch.uint8)
    gradients = []
    for kind in (WholeBatch, SampleBySample):
        network.zero_grad()
        step = kind(network, CompoundLoss())
        step.backward(step.loss(image, label))
        gradients.append([p.grad.clone() for p in network.parameters()])
    for whole, split in zip(*gradients, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-12)
