"""Networks of others, MONAI's or a user's own: planned, trained, predicted with as ours."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from monai.networks import nets
from safetensors.torch import load_file, save_file
from torch import nn

from effseg.errors import PlanError
from effseg.inference import load_run, predict
from effseg.memory import stage_policies
from effseg.networks import DenseUNet, build_network, own_state, why_whole
from effseg.planner import check_plan, fingerprint, plan, trace_plan
from effseg.planner.candidates import Candidates
from effseg.planner.rates import Rates
from effseg.planner.search import Search
from effseg.planner.step import PlannedTraining
from effseg.plans import Fingerprint, ImportedNetwork, LossConfig, Plan
from effseg.report import write_report
from effseg.training import train
from effseg.training.module import SegmentationModule
from effseg.training.rescue import Rescue
from effseg.validation import validate

SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}

OWN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, n_in, n_out, width, norm, heads):
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(n_in, width, 3, padding=1), norm(width), nn.ReLU())
        self.down = nn.Sequential(nn.Conv3d(width, width, 2, 2), norm(width), nn.ReLU())
        self.up = nn.ConvTranspose3d(width, width, 2, 2)
        self.heads = nn.ModuleList(nn.Conv3d(width, n_out, 1) for _ in range(heads))

    def forward(self, image):
        fine = self.first(image)
        coarse = self.down(fine)
        answers = [self.heads[0](fine + self.up(coarse))]
        if self.training and len(self.heads) > 1:
            answers.append(self.heads[1](coarse))
            return answers
        return answers[0]


def build(in_channels, out_channels, width=8, norm="InstanceNorm3d", heads=1):
    return Net(in_channels, out_channels, width, getattr(nn, norm), heads)


def one_channel(in_channels, out_channels):
    return Net(in_channels, 1, 4, nn.InstanceNorm3d, 1)


def no_network(in_channels, out_channels):
    return 3
"""


@pytest.fixture(scope="module")
def facts(tiny_dataset: Path) -> Fingerprint:
    return fingerprint(tiny_dataset)


@pytest.fixture
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, found by Python."""
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)


def short(made: Plan, **changes: object) -> Plan:
    """The plan for a training of seconds."""
    training = made.training.model_copy(
        update={"steps_per_epoch": 6, "validation_patches": 2, "epochs": 4}
    )
    update = {"training": training, "patch_size": (16, 16, 16), "batch_size": 2} | changes
    return Plan.model_validate(made.model_copy(update=update).model_dump())


def test_one_of_monais_goes_the_whole_way(
    tiny_dataset: Path, facts: Fingerprint, tmp_path: Path
) -> None:
    made = plan(
        facts, memory="1GiB", device="cpu", network="monai:SegResNet", network_options=SEGRESNET
    )
    assert isinstance(made.network, ImportedNetwork)
    assert made.network.stride == 2
    assert "SegResNet" in made.reasons["network"]
    assert made.memory.peak_bytes <= 2**30
    assert made.memory.saved_bytes == trace_plan(made).saved_bytes
    made = short(made, policies={"down_layers.*": "recompute"}, precision="float32")
    assert trace_plan(made).saved_bytes < trace_plan(short(made, policies={})).saved_bytes
    module = SegmentationModule(made)
    assert set(stage_policies(module.network).values()) == {"recompute"}

    run = train(made, tiny_dataset, out=tmp_path / "run")
    state = load_file(run / "model.safetensors")
    nets.SegResNet(in_channels=1, out_channels=3, **SEGRESNET).load_state_dict(state)
    scores = validate(run)
    assert (scores.mean("dice", 1) or 0) > 0.3
    assert write_report(run).stat().st_size > 10_000
    image = tiny_dataset / "images" / "ball_0.nii.gz"
    assert set(predict(run, image, memory="1GiB").array.ravel().tolist()) >= {0, 1}


@pytest.mark.usefixtures("_own")
def test_ones_own_may_give_several_outputs_in_training(
    tiny_dataset: Path, facts: Fingerprint, tmp_path: Path
) -> None:
    options = {"heads": 2, "width": 4}
    made = plan(
        facts, memory="1GiB", device="cpu", network="own_networks:build", network_options=options
    )
    assert isinstance(made.network, ImportedNetwork)
    assert (made.network.stride, made.network.deep_supervision) == (2, True)
    made = short(Plan.load(made.save(tmp_path / "plan.json")))
    run = train(made, tiny_dataset, out=tmp_path / "run", epochs=1)
    assert load_run(run).network.first[0].out_channels == 4


@pytest.mark.usefixtures("_own")
def test_batch_norm_is_warned_of_and_never_split(
    facts: Fingerprint, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"norm": "BatchNorm3d"}
    with caplog.at_level(logging.WARNING, "effseg"):
        made = plan(
            facts,
            memory="1GiB",
            device="cpu",
            network="own_networks:build",
            network_options=options,
        )
    assert "batch norm needs it whole" in caplog.text
    assert "batch norm" in made.reasons["network"]
    assert not made.sample_by_sample
    split = made.model_copy(update={"sample_by_sample": True})
    with pytest.raises(PlanError, match=r"plan: sample_by_sample is true.* batch norm needs it"):
        check_plan(split)


@pytest.mark.usefixtures("_own")
@pytest.mark.parametrize(
    ("network", "options", "words"),
    [
        ("monai:SegResnet", {}, "no class or function SegResnet .*close are SegResNet"),
        ("SegResNet", {}, "expected module:name, such as monai:SegResNet"),
        ("nowhere_at_all:build", {}, "nowhere_at_all cannot be imported.*PYTHONPATH"),
        ("os:system", {}, "takes no in_channels"),
        ("monai:SegResNet", {"init_filter": 8}, "unexpected keyword argument 'init_filter'"),
        ("monai:SegResNet", {"in_channels": 8}, "in_channels, which the plan itself gives"),
        ("own_networks:one_channel", {}, r"gives \(2, 1, 6, 6, 6\) .* expected logits \(2, 3, 6"),
        ("own_networks:no_network", {}, "made a int; expected a torch.nn.Module"),
        (None, {"decoder": "v-net"}, "network option decoder: .*'unet' or 'linknet'"),
        (None, {"strides": []}, "network option 'strides'; expected one of decoder"),
    ],
)
def test_what_makes_no_network_is_refused(facts: Fingerprint, network, options, words) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        plan(facts, memory="1GiB", device="cpu", network=network, network_options=options)
    assert "\n" not in str(caught.value)


def test_few_stages_are_recomputed_where_samples_go_one_after_the_other() -> None:
    patch, rates = (24, 24, 24), Rates(flops=1e10, bytes=1e10, operators=1e5, why="made up")
    config = ImportedNetwork(
        kind="imported",
        build="monai:SegResNet",
        arguments=SEGRESNET,
        in_channels=1,
        out_channels=2,
        stride=2,
    )
    candidates = Candidates(
        subject=PlannedTraining(
            build_config=lambda *_: config,
            loss=LossConfig(),
            ignored=False,
            precision="float32",
            device="cpu",
            modes=("plain",),
        ),
        patches=[patch],
        batch=6,
        budget_bytes=2**40,
        device="cpu",
        rates=rates,
        beside_bytes=lambda _: 0,
    )
    stages = ("down_layers.0", "down_layers.1", "up_layers.0", "conv_final")
    kept, all_of_them = (
        candidates.step(patch, 6, "plain", policies, split=True).report.device_bytes
        for policies in ({}, dict.fromkeys(stages, "recompute"))
    )
    assert all_of_them < kept
    budget = int(1.03 * (0.7 * kept + 0.3 * all_of_them))
    step = Search(replace(candidates, budget_bytes=budget), largest_batch=6).run().step
    assert step.split
    assert 0 < len(step.policies) < len(stages)
    assert step.peak_bytes * 1.03 <= budget


def test_options_of_our_own_network_are_planned_for(facts: Fingerprint) -> None:
    options = {"decoder": "linknet", "head": "pyramid", "residual": True}
    made = plan(facts, memory="1GiB", size="b0", device="cpu", network_options=options)
    assert options.items() <= made.network.model_dump().items()
    assert "decoder linknet, as asked" in made.reasons["network"]
    assert trace_plan(made).saved_bytes == made.memory.saved_bytes


def test_plans_from_before_networks_had_kinds_load(tiny_plan: Plan, tmp_path: Path) -> None:
    path = tiny_plan.save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    for key in ("kind", "decoder", "head", "residual"):
        del content["network"][key]
    path.write_text(json.dumps(content))
    assert Plan.load(path) == tiny_plan
    content["network"]["growthrate"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"network\.growthrate: no such key, did you mean growth_r"):
        Plan.load(path)
    content["network"] = {"kind": "imported", "bild": "monai:SegResNet"}
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"network\.bild: no such key, did you mean build"):
        Plan.load(path)
    content["network"]["kind"] = "handmade"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"network\.kind: .*'dense_unet', 'imported'"):
        Plan.load(path)


def test_a_part_that_has_two_names_is_kept_under_one(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nets.DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2] * 2, filters=[4, 8, 8])

    network, again = build(), build()
    state = own_state(network)
    assert len(state) < len(network.state_dict())
    save_file(state, tmp_path / "w.safetensors")
    again.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=False)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


def test_who_needs_a_batch_whole(tiny_plan: Plan) -> None:
    assert why_whole(nn.Sequential(nn.Conv3d(1, 2, 1), nn.InstanceNorm3d(2))) is None
    assert why_whole(nn.Sequential(nn.Dropout3d(0.0))) is None
    assert "dropout" in (why_whole(nn.Sequential(nn.Dropout3d(0.1))) or "")
    assert why_whole(DenseUNet(tiny_plan.network.model_copy(update={"dropout": 0.2}))) is None


def test_a_step_that_is_refused_memory_is_done_again_with_less() -> None:
    network = nets.SegResNet(in_channels=1, out_channels=2, **SEGRESNET)
    rescue = Rescue(network, lambda output, labels: output.mean(), batch_size=2)
    tries = []

    def closure() -> None:
        tries.append(stage_policies(network))
        if len(tries) < 3:
            raise MemoryError("refused")

    rescue.run(closure, epoch=0, step=0)
    assert tries[0] == {}
    assert {"down_layers.0", "up_layers.0"} <= set(tries[1])
    assert [type(rescue.step).__name__, len(rescue.events)] == ["SampleBySample", 2]


def test_a_network_is_made_on_the_cpu_wherever_the_others_are_made() -> None:
    config = ImportedNetwork(kind="imported", build="monai:UNet", in_channels=1, out_channels=2)
    config = config.model_copy(update={"arguments": {"channels": [4, 8], "strides": [2]}})
    with torch.device("meta"):
        network = build_network(config)
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
