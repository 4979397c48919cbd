"""What moves the weights: numbers by hand, state that survives, bytes as they were told."""

from functools import partial

import pytest
import torch
from loss_of import loss_of
from torch import Tensor, nn
from two_stages import two_stages

from effseg.losses import build_loss
from effseg.memory import measure_peak
from effseg.networks import build_network
from effseg.optimizers import build_optimizer, numbers_kept
from effseg.planner.host import accumulating_bytes, batch_bytes, planned_loader_bytes
from effseg.planner.step import PlannedTraining
from effseg.plans import LookaheadConfig, LossConfig, OptimizerConfig, Plan
from effseg.training.module import SegmentationModule
from effseg.training.step import WholeBatch

CONFIGS = {
    "adamw": OptimizerConfig(),
    "sgd": OptimizerConfig(kind="sgd"),
    "lookahead adamw": OptimizerConfig(lookahead=LookaheadConfig(steps=2)),
    "lookahead sgd": OptimizerConfig(kind="sgd", lookahead=LookaheadConfig(steps=2)),
}


def moved(config: OptimizerConfig, n: int) -> list[float]:
    """A weight that starts at 1 with a gradient of 1, after each step."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = build_optimizer([weight], config)
    values = []
    for _ in range(n):
        weight.grad = torch.ones(1)
        optimizer.step()
        values.append(float(weight.detach()))
    return values


def test_nesterov_by_hand() -> None:
    config = OptimizerConfig(kind="sgd", learning_rate=0.1, momentum=0.5)
    # velocities 1, 1.5, 1.75; a step goes by the gradient and half the velocity
    assert moved(config, 3) == pytest.approx([0.85, 0.675, 0.4875])


def test_lookahead_by_hand() -> None:
    config = OptimizerConfig(
        kind="sgd",
        learning_rate=0.1,
        momentum=0.5,
        lookahead=LookaheadConfig(steps=2, share=0.5),
    )
    # after two steps half way back to 1; the velocity, 1.5, goes on
    assert moved(config, 3) == pytest.approx([0.85, 0.8375, 0.8375 - 0.1 * (1 + 0.5 * 1.75)])


def test_slow_weights_that_go_the_whole_way_change_nothing() -> None:
    plain = moved(OptimizerConfig(), 4)
    assert moved(OptimizerConfig(lookahead=LookaheadConfig(steps=2, share=1.0)), 4) == plain


def test_gains_and_biases_are_not_decayed() -> None:
    layer = nn.Linear(3, 2)
    groups = build_optimizer(layer.parameters(), OptimizerConfig(weight_decay=0.5)).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.5, 1), (0, 1)]


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    for i in range(n):
        network(torch.full((1, 3), i + 1.0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_state_goes_on_bit_for_bit(name) -> None:
    whole, cut = nn.Linear(3, 2), nn.Linear(3, 2)
    cut.load_state_dict(whole.state_dict())
    steps(whole, build_optimizer(whole.parameters(), CONFIGS[name]), 5)
    before = build_optimizer(cut.parameters(), CONFIGS[name])
    steps(cut, before, 1)
    after = build_optimizer(cut.parameters(), CONFIGS[name])
    after.load_state_dict(before.state_dict())
    weights = cut.weight.detach().clone()
    network = nn.Linear(3, 2)
    network.load_state_dict(cut.state_dict())
    for i in range(1, 5):
        cut(torch.full((1, 3), i + 1.0)).square().mean().backward()
        after.step()
        after.zero_grad()
    assert torch.equal(cut.weight, whole.weight)
    assert not torch.equal(cut.weight, weights)


def test_a_weight_that_stands_still_is_left_alone_until_it_moves() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(requires_grad=False)
    optimizer = build_optimizer(layer.parameters(), CONFIGS["lookahead adamw"])
    still = layer.bias.detach().clone()
    steps(layer, optimizer, 3)
    assert torch.equal(layer.bias, still)
    layer.bias.requires_grad_(requires_grad=True)
    steps(layer, optimizer, 3)
    assert not torch.equal(layer.bias, still)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_kept_of_each_weight(name) -> None:
    network = nn.Linear(300, 200)
    optimizer = build_optimizer(network.parameters(), CONFIGS[name])
    network(torch.ones(1, 300)).mean().backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    kept = sum(t.numel() for t in tensors if isinstance(t, Tensor) and t.numel() > 1)
    assert kept == numbers_kept(CONFIGS[name]) * sum(p.numel() for p in network.parameters())


PATCH, BATCH = (16, 16, 16), 2


@pytest.mark.parametrize("name", CONFIGS)
def test_the_trace_of_a_step_is_what_it_takes_with_any_optimizer(name) -> None:
    config = two_stages("shared", out_channels=3)
    planned = PlannedTraining(
        build_config=lambda *_: config,
        loss=LossConfig(),
        ignored=False,
        precision="float32",
        device="cpu",
        optimizer=CONFIGS[name],
    )
    traced = planned.trace(planned.network(PATCH, "shared"), PATCH, BATCH)
    network = build_network(config)
    optimizer = build_optimizer(network.parameters(), CONFIGS[name])
    step = WholeBatch(network, build_loss(LossConfig(), ignore_label=None, n_classes=3))
    image = torch.randn(BATCH, 1, *PATCH)
    label = torch.randint(0, 3, (BATCH, *PATCH), dtype=torch.uint8)

    def train() -> None:
        step.backward(step.loss(image, label))
        optimizer.step()
        optimizer.zero_grad()

    # the optimizer's state is there from the second step on, which moves slow weights: what no
    # operator touches, a measurement does not see
    train()
    assert measure_peak(train).peak_bytes == pytest.approx(traced.peak_bytes, rel=0.005)


def with_optimizer(plan: Plan, **changes: object) -> Plan:
    content = plan.model_dump()
    content["training"]["optimizer"] |= changes
    return Plan.model_validate(content)


def gradients(module: SegmentationModule, image: Tensor, label: Tensor) -> list[Tensor]:
    """What a step of the module comes to, clipping and optimizer left out."""

    def closure() -> None:
        module.backward(module.training_step((image, label), 0))

    module.network.zero_grad()
    module._each_part(closure)
    return [p.grad.clone() for p in module.network.parameters() if p.grad is not None]


def test_accumulated_gradients_are_the_mean_of_the_batches(tiny_plan: Plan) -> None:
    module = SegmentationModule(with_optimizer(tiny_plan, accumulate=2))
    image, label = torch.randn(4, 1, 16, 16, 16), torch.randint(0, 3, (4, 16, 16, 16))
    both = gradients(module, image, label)
    both_loss = float(module.step_loss)
    module.plan = tiny_plan
    halves, losses = [], []
    for part in (slice(2), slice(2, 4)):
        halves.append(gradients(module, image[part], label[part]))
        losses.append(float(module.step_loss))
    for together, one, other in zip(both, *halves, strict=True):
        torch.testing.assert_close(together, (one + other) / 2)
    assert both_loss == pytest.approx(sum(losses) / 2)


def test_losses_that_are_means_over_samples_accumulate_to_a_larger_batch(tiny_plan: Plan) -> None:
    image, label = torch.randn(4, 1, 16, 16, 16), torch.randint(0, 3, (4, 16, 16, 16))
    module = SegmentationModule(with_optimizer(tiny_plan, accumulate=2))
    module.rescue.step = WholeBatch(module.network, loss_of(dice_over_batch=False))
    parts = gradients(module, image, label)
    module.plan = with_optimizer(tiny_plan, accumulate=1).model_copy(update={"batch_size": 4})
    for accumulated, whole in zip(parts, gradients(module, image, label), strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-3, atol=1e-6)


def test_accumulation_takes_no_more_than_was_said(tiny_plan: Plan) -> None:
    image, label = torch.randn(6, 1, 16, 16, 16), torch.randint(0, 3, (6, 16, 16, 16)).byte()
    plans = {n: with_optimizer(tiny_plan, accumulate=n) for n in (1, 3)}
    module = SegmentationModule(plans[3])
    peaks = {}
    for n, plan in plans.items():
        module.plan = plan
        size = n * plan.batch_size
        module.part_losses = []
        batch = (image[:size].clone(), label[:size].clone())
        step = partial(gradients_dropped, module, *batch)
        step()
        peaks[n] = measure_peak(step).peak_bytes
    weights = 4 * sum(p.numel() for p in module.network.parameters())
    report = PlannedTraining(
        build_config=lambda *_: tiny_plan.network,
        loss=tiny_plan.training.loss,
        ignored=False,
        precision="float32",
        device="cpu",
    ).trace(module.network, tiny_plan.patch_size, tiny_plan.batch_size)
    said = accumulating_bytes(plans[3], report)
    waiting = 2 * batch_bytes((16, 16, 16), 1, 2, label_itemsize=1)
    assert said == waiting + weights
    # beside it a few scalars, the losses
    assert waiting <= peaks[3] - peaks[1] <= said + 3 * 4
    assert accumulating_bytes(plans[1], report) == 0
    assert planned_loader_bytes(plans[3]) > planned_loader_bytes(plans[1])


def gradients_dropped(module: SegmentationModule, image: Tensor, label: Tensor) -> None:
    def closure() -> None:
        module.backward(module.training_step((image, label), 0))

    module._each_part(closure)
    module.network.zero_grad()
