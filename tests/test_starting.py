"""What a training starts from: weights by name and shape, parts that stand still and thaw."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from two_stages import two_stages

from effseg.errors import CheckpointError, PlanError
from effseg.losses import build_loss
from effseg.memory import apply_policy, measure_peak
from effseg.networks import DenseUNet, build_network
from effseg.networks.freezing import freeze_for_start, set_frozen
from effseg.planner import trace_plan
from effseg.planner.step import PlannedTraining
from effseg.plans import LossConfig, OptimizerConfig, Plan, StartConfig, ThawConfig
from effseg.record import RECORD, WEIGHTS, RunRecord
from effseg.training import train
from effseg.training.starting import load_weights
from effseg.training.step import WholeBatch


def starting(plan: Plan, **start: object) -> Plan:
    content = plan.model_dump()
    content["training"]["start"] |= start
    return Plan.model_validate(content)


def gradients(network: DenseUNet) -> dict[str, Tensor]:
    torch.manual_seed(1)
    image, label = torch.randn(2, 1, 8, 8, 8), torch.randint(0, 3, (2, 8, 8, 8))
    step = WholeBatch(network, build_loss(LossConfig(), ignore_label=None, n_classes=3))
    step.backward(step.loss(image, label))
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policies", [{}, {"encoder.*": "recompute", "up.0": "recompute"}])
@pytest.mark.parametrize("mode", ["plain", "checkpoint", "shared"])
@pytest.mark.parametrize("parts", [("stem", "encoder.0"), ("encoder.1", "decoder")])
def test_what_learns_gets_the_gradients_it_would_get(mode, parts, policies) -> None:
    network = build_network(two_stages(mode, out_channels=3))
    apply_policy(network, policies)
    every = gradients(network)
    network.zero_grad()
    set_frozen(network, parts, frozen=True)
    some = gradients(network)
    still = {name for name in every if any(name.startswith(f"{part}.") for part in parts)}
    assert still
    assert set(some) == set(every) - still
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, every[name])


def test_norms_that_stand_still_keep_their_statistics() -> None:
    config = two_stages("shared", out_channels=2).model_copy(update={"norm": "batch"})
    network = build_network(config)
    set_frozen(network, ["encoder"], frozen=True)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    gradients_of = network(torch.randn(2, 1, 8, 8, 8)).mean()
    gradients_of.backward()
    moved = {n for n, buffer in network.named_buffers() if not torch.equal(buffer, before[n])}
    assert moved
    assert not any(name.startswith("encoder.") for name in moved)
    set_frozen(network, ["encoder.1"], frozen=False)
    network(torch.randn(2, 1, 8, 8, 8))
    moved = {n for n, buffer in network.named_buffers() if not torch.equal(buffer, before[n])}
    assert any(name.startswith("encoder.1.") for name in moved)
    assert not any(name.startswith("encoder.0.") for name in moved)


@pytest.mark.parametrize("mode", ["plain", "shared"])
def test_the_trace_of_a_frozen_network_is_what_it_takes(mode) -> None:
    config, shape = two_stages(mode, out_channels=3), (16, 16, 16)
    planned = PlannedTraining(
        build_config=lambda *_: config,
        loss=LossConfig(),
        ignored=False,
        precision="float32",
        device="cpu",
    )
    network = planned.network(shape, mode)
    whole = planned.trace(network, shape, 2)
    set_frozen(network, ["stem", "encoder"], frozen=True)
    traced = planned.trace(network, shape, 2)
    real = build_network(config)
    set_frozen(real, ["stem", "encoder"], frozen=True)
    optimizer = torch.optim.AdamW(real.parameters(), lr=OptimizerConfig().learning_rate)
    step = WholeBatch(real, build_loss(LossConfig(), ignore_label=None, n_classes=3))
    image = torch.randn(2, 1, *shape)
    label = torch.randint(0, 3, (2, *shape), dtype=torch.uint8)

    def learn() -> None:
        step.backward(step.loss(image, label))
        optimizer.step()
        optimizer.zero_grad()

    learn()
    assert measure_peak(learn).peak_bytes == pytest.approx(traced.peak_bytes, rel=0.005)
    # shared features lie until the loss, which takes most here; plain ones are not kept at all
    assert traced.peak_bytes < {"plain": 0.8, "shared": 1.0}[mode] * whole.peak_bytes


def test_a_plan_is_traced_as_thawed_as_it_gets(tiny_plan: Plan) -> None:
    frozen = {"freeze": ["stem", "encoder"]}
    thaw = [{"at": 0.2, "parts": ["encoder"]}, {"at": 0.5, "parts": ["stem"]}]
    whole, still, thawed = (
        trace_plan(starting(tiny_plan, **start)).peak_bytes
        for start in ({}, frozen, frozen | {"thaw": thaw})
    )
    assert still < thawed == whole


def test_weights_are_taken_by_name_and_shape(tmp_path: Path) -> None:
    given = build_network(two_stages("shared", out_channels=3))
    save_file(given.state_dict() | {"tail": torch.ones(1)}, tmp_path / WEIGHTS)
    network = build_network(two_stages("plain", out_channels=5))
    heads = network.heads[0].conv.weight.detach().clone()
    loaded = load_weights(network, tmp_path)
    assert torch.equal(network.stem.weight, given.stem.weight)
    assert torch.equal(network.heads[0].conv.weight, heads)
    assert set(loaded.fresh) == {"heads.0.conv.weight", "heads.0.conv.bias"}
    assert set(loaded.unused) == {"heads.0.conv.weight", "heads.0.conv.bias", "tail"}
    n = len(network.state_dict())
    assert str(loaded).startswith(f"{n - 2} of {n} tensors start from {tmp_path / WEIGHTS}; fresh:")


def test_weights_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path) -> None:
    network = build_network(two_stages("shared", out_channels=3))
    with pytest.raises(CheckpointError, match=r"no such file; expected the folder of a run"):
        load_weights(network, tmp_path / "none")
    save_file({"tail": torch.ones(1, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"none of its 1 tensors .*tail \(1, 2\) vs stem"):
        load_weights(network, tmp_path / "other.safetensors")
    (tmp_path / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(network, tmp_path)


def test_parts_that_are_none_are_refused() -> None:
    network = build_network(two_stages("shared", out_channels=3))
    with pytest.raises(PlanError, match=r"'encodr' is no part of DenseUNet .*encoder, encoder.0"):
        freeze_for_start(network, StartConfig(freeze=("encodr",)))
    every = tuple({name.split(".")[0]: None for name, _ in network.named_parameters()})
    with pytest.raises(PlanError, match="leaves nothing to learn"):
        freeze_for_start(network, StartConfig(freeze=every))
    with pytest.raises(ValueError, match="thaw names heads, which is not in freeze"):
        StartConfig(freeze=("encoder",), thaw=(ThawConfig(at=0.5, parts=("heads",)),))
    twice = tuple(ThawConfig(at=0.5, parts=(f"encoder.{i}",)) for i in range(2))
    with pytest.raises(ValueError, match="must be larger than the one before"):
        StartConfig(freeze=("encoder",), thaw=twice)


def test_a_run_starts_from_another_and_thaws_in_stages(
    tiny_run: Path, tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = starting(
        tiny_plan,
        freeze=["stem", "encoder"],
        thaw=[{"at": 0.5, "parts": ["encoder.1"]}],
    )
    run = train(plan, tiny_dataset, out=tmp_path / "run", init_from=tiny_run)
    given, learnt = load_file(tiny_run / WEIGHTS), load_file(run / WEIGHTS)
    changed = {name for name in given if not torch.equal(given[name], learnt[name])}
    assert not any(name.startswith(("stem.", "encoder.0.")) for name in changed)
    assert any(name.startswith("decoder.") for name in changed)
    record = RunRecord.load(run / RECORD)
    loaded, thawed = record.changes
    assert loaded.what.startswith(f"{len(given)} of {len(given)} tensors start from {tiny_run}")
    assert (loaded.epoch, loaded.step) == (0, 0)
    assert (thawed.epoch, thawed.step, thawed.what) == (1, 6, "encoder.1 learns from here on")
    assert Plan.load(run / "plan.json").training.start.init_from == str(tiny_run)
    if record.best_epoch == 1:
        assert any(name.startswith("encoder.1.") for name in changed)
    # where it starts from weights that know the balls, the first epoch is as good as the last there
    assert record.best_score is not None
    assert record.best_score > 0.5


def test_parts_thaw_only_in_one_process(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = starting(tiny_plan, freeze=["stem"], thaw=[{"at": 0.5, "parts": ["stem"]}])
    with pytest.raises(PlanError, match="parts thaw only on one"):
        train(plan, tiny_dataset, out=tmp_path / "run", devices=2)
