import copy
import functools
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from monai.networks import nets
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from effseg.errors import MemoryBudgetError, PlanError
from effseg.memory import (
    CudaCard,
    MemoryReport,
    apply_policy,
    choose_policy,
    measure_peak,
    offload,
    remove_policy,
    trace_peak,
)
from effseg.memory.choice import lightest
from effseg.memory.trace import mean_of_outputs
from effseg.networks import DenseUNet
from effseg.plans import NetworkConfig

U = 4 * 16**3
"""Bytes of one channel of the chain below on its batch of 16 x 16 x 16 voxels."""


class Block(nn.Sequential):
    """Convolution, norm, activation; counts how often it runs."""

    def __init__(self, n_in: int, n_out: int, *, inplace: bool = False) -> None:
        conv = nn.Conv3d(n_in, n_out, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm3d(n_out), nn.ReLU(inplace=inplace))
        self.n_runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_runs += 1
        return super().forward(x)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(1, 8), Block(8, 8), Block(8, 8)])
        self.head = nn.Conv3d(8, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Swap(nn.Module):
    """Takes what is no tensor, by name, and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm3d(4, track_running_stats=True, affine=True)
        self.conv = nn.Conv3d(4, 4, 1)

    def forward(self, pair: list[Tensor], *, scale: float) -> dict[str, Tensor]:
        return {"sum": self.norm(self.conv(pair[0])) * scale + pair[1], "first": pair[0].relu()}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 1)
        self.swap = Swap()
        self.tail = nn.Sequential(nn.Dropout(0.4), nn.Conv3d(4, 4, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        both = self.swap([x, x.exp()], scale=0.5)
        shared = self.tail(both["sum"]) * self.tail(both["first"])
        # the user's own checkpoint around a stage
        return shared + checkpoint(self.tail, shared, use_reentrant=False)


def dense_unet() -> nn.Module:
    return DenseUNet(
        NetworkConfig(
            in_channels=1,
            out_channels=2,
            stem_channels=4,
            growth_rate=4,
            encoder_layers=(2, 2),
            decoder_layers=(1,),
            strides=((1, 1, 1), (2, 2, 2)),
            kernels=((3, 3, 3), (3, 3, 3)),
            norm="batch",
            dropout=0.2,
            memory="plain",
        )
    )


def dyn_unet() -> nn.Module:
    return nets.DynUNet(
        *(3, 1, 2, [3] * 4, [1, 2, 2, 2], [2] * 3),
        filters=[4, 8, 8, 8],
        dropout=0.2,
        norm_name=("batch", {"affine": True}),
        deep_supervision=True,
        deep_supr_num=2,
        res_block=True,
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "SegResNet": (
        lambda: nets.SegResNet(
            3, 8, 1, 2, dropout_prob=0.2, norm="batch", blocks_down=(1, 2), blocks_up=(1,)
        ),
        ("down_layers.*", "up_layers.0", "up_samples.*"),
    ),
    "DynUNet": (dyn_unet, ("input_block", "downsamples.*", "bottleneck", "upsamples.*")),
    "BasicUNet": (
        lambda: nets.BasicUNet(3, 1, 2, features=(4, 4, 4, 8, 8, 4), norm="batch", dropout=0.2),
        ("conv_0", "down_?", "upcat_[12]"),
    ),
    "DenseUNet": (dense_unet, ("encoder.*", "down.0", "up.*", "decoder.*", "heads.*")),
    "Nested": (Nested, ("swap", "tail")),
    "Chain": (Chain, ("blocks.*", "head")),
}

POLICIES: dict[str, Callable[[tuple[str, ...]], dict[str, Any]]] = {
    "recompute": lambda stages: dict.fromkeys(stages, "recompute"),
    "twice": lambda stages: dict.fromkeys(("", *stages), "recompute"),
    "offload": lambda stages: dict.fromkeys(stages, "offload"),
    "whole": lambda stages: dict.fromkeys(("", *stages), "offload"),
    "both": lambda stages: {"": "offload"} | dict.fromkeys(stages, "recompute"),
}


@pytest.fixture
def _far_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a device and had a host beside it, and no tensor were too small."""
    monkeypatch.setattr(offload, "_is_away", lambda tensor, *, traced: True)
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)


@pytest.fixture
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shape_of(name: str) -> tuple[int, ...]:
    n = 16 if name == "BasicUNet" else 8  # it halves four times
    return (2, 1, n, n, n)


def train(network: nn.Module, name: str) -> list[Tensor]:
    """Outputs and gradients of two steps and, in the end, all that is in the state dict."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    found = []
    for _ in range(2):
        batch = torch.randn(shape_of(name), dtype=torch.float64, generator=generator)
        batch = batch.to(next(network.parameters()).device).requires_grad_()
        network.zero_grad()
        value = mean_of_outputs(network(batch).square().tanh())
        value.backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert gradients
        found += [value.detach(), batch.grad, *(gradient.clone() for gradient in gradients)]
        torch.optim.SGD(network.parameters(), lr=0.1).step()
    return [*found, torch.rand(1), *network.state_dict().values()]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@functools.cache
def plain_run(name: str) -> list[Tensor]:
    torch.manual_seed(0)
    return train(NETWORKS[name][0]().double(), name)


def under(name: str, policy: str) -> nn.Module:
    torch.manual_seed(0)
    build, stages = NETWORKS[name]
    network = build().double()
    apply_policy(network, POLICIES[policy](stages))
    return network


CHOICES = [
    (name, policy)
    for name in NETWORKS
    for policy in POLICIES
    if policy in ("recompute", "both") or name in ("Chain", "Nested")
]


@pytest.mark.parametrize(("name", "policy"), CHOICES)
def test_numbers_are_those_without_a_policy(name, policy):
    assert_equal(train(under(name, policy), name), plain_run(name))


@pytest.mark.usefixtures("_far_host")
@pytest.mark.parametrize("policy", ["offload", "both"])
@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_survive_the_way_to_the_host_and_back(name, policy, monkeypatch):
    parked = []
    monkeypatch.setattr(
        offload, "_View", lambda *args, view=offload._View: parked.append(view(*args)) or parked[-1]
    )
    assert_equal(train(under(name, policy), name), plain_run(name))
    assert parked


@pytest.mark.usefixtures("_far_host")
@pytest.mark.parametrize("policy", POLICIES)
def test_backward_can_run_twice(policy):
    def twice(network: nn.Module) -> list[Tensor]:
        torch.manual_seed(2)
        batch = torch.ones(1, 1, 8, 8, 8, dtype=torch.float64)
        value = network(batch).square().mean()
        value.backward(retain_graph=True)
        value.backward()
        return [p.grad for p in network.parameters()]

    torch.manual_seed(0)
    expected = twice(Nested().double())
    assert_equal(twice(under("Nested", policy)), expected)


@pytest.mark.usefixtures("_far_host")
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_outlives_backward_and_the_network_needs_no_collector(policy):
    network = under("Chain", policy)
    gc.collect()
    gc.disable()
    try:
        batch = torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
        features = []
        handle = network.blocks[1][0].register_forward_hook(
            lambda module, args, output: features.append(weakref.ref(output.untyped_storage()))
        )
        network(batch).mean().backward()
        assert features
        assert all(storage() is None for storage in features)
        handle.remove()
        gone = weakref.ref(network)
        del network
        assert gone() is None
    finally:
        gc.enable()


def test_runs_again_in_training_with_gradients_and_nowhere_else():
    network, batch = Chain(), torch.randn(1, 1, 8, 8, 8)
    apply_policy(network, {"blocks.1": "recompute"})
    network(batch).mean().backward()
    assert [block.n_runs for block in network.blocks] == [1, 2, 1]
    with torch.no_grad():
        network(batch)
    network.eval()
    network(batch).mean().backward()
    assert [block.n_runs for block in network.blocks] == [3, 4, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_eval_mode_is_untouched(policy):
    network, plain = under("DynUNet", policy).eval(), NETWORKS["DynUNet"][0]().double().eval()
    plain.load_state_dict(network.state_dict())
    batch = torch.randn(1, 1, 16, 16, 16, dtype=torch.float64)
    step = [measure_peak(lambda net=net: net(batch).mean().backward()) for net in (network, plain)]
    assert step[0] == step[1]
    assert torch.equal(network(batch), plain(batch))


@pytest.mark.parametrize("norm", ["batch", "cumulative", "frozen", "instance"])
def test_running_statistics_move_once(norm):
    kinds = {
        "batch": lambda: nn.BatchNorm3d(3),
        "cumulative": lambda: nn.BatchNorm3d(3, momentum=None),
        "frozen": lambda: nn.BatchNorm3d(3).eval(),
        "instance": lambda: nn.InstanceNorm3d(3, track_running_stats=True),
    }
    plain = nn.Sequential(nn.Conv3d(1, 3, 1), kinds[norm](), nn.ReLU())
    network = copy.deepcopy(plain)
    apply_policy(network, {"": "recompute"})
    for _ in range(3):  # three samples, whose mean of equal numbers need not be the number
        batch = torch.randn(3, 1, 4, 4, 4)
        for net in (plain, network):
            net(batch).square().sum().backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert network[1].num_batches_tracked == (0 if norm in ("frozen", "instance") else 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_classes_and_state_stay_and_removal_restores(name):
    network = NETWORKS[name][0]()
    keys, classes = [*network.state_dict()], [type(part) for part in network.modules()]
    attributes = [set(vars(part)) for part in network.modules()]
    in_force = apply_policy(network, POLICIES["both"](NETWORKS[name][1]))
    assert in_force[""] == "offload"
    assert len(in_force) > len(NETWORKS[name][1]) - 2
    assert [*network.state_dict()] == keys
    assert [type(part) for part in network.modules()] == classes
    NETWORKS[name][0]().load_state_dict(network.state_dict())
    remove_policy(network)
    assert [set(vars(part)) for part in network.modules()] == attributes
    assert apply_policy(network, {}) == {}


def unpickled(network: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(network))


def loaded(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, unpickled, loaded])
@pytest.mark.parametrize("name", ["SegResNet", "DynUNet", "DenseUNet"])
def test_copies_carry_their_policies(name, make_copy):
    network = under(name, "recompute")
    in_force = apply_policy(network, {})
    twin = make_copy(network)
    assert apply_policy(twin, {}) == in_force
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()  # the copy must not run the original's
    remove_policy(network)
    del network
    assert_equal(train(twin, name), plain_run(name))


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("policy", ["recompute", "both"])
def test_distributed_training(policy):
    network = under("SegResNet", policy)
    assert_equal(
        train(DistributedDataParallel(network), "SegResNet")[:-1], plain_run("SegResNet")[:-1]
    )


def test_patterns_match_within_names_and_the_last_wins():
    network = Chain()
    assert apply_policy(network, {"blocks.*": "recompute", "blocks.1": "keep"}) == {
        "blocks.0": "recompute",
        "blocks.2": "recompute",
    }
    assert apply_policy(network, {"blocks.[12]": "offload"}) == {
        "blocks.0": "recompute",
        "blocks.1": "offload",
        "blocks.2": "offload",
    }
    assert apply_policy(network, {"*.*": "keep", "?ead": "recompute"}) == {"head": "recompute"}
    assert apply_policy(network, {"*": "recompute"}) == {"head": "recompute"}
    dynamic = dyn_unet()  # a module under two paths is one stage
    assert apply_policy(dynamic, {"skip_layers.downsample": "offload"}) == {
        "input_block": "offload"
    }


def test_a_forward_that_stood_on_the_module_runs_and_comes_back():
    network, batch = Chain(), torch.randn(1, 1, 4, 4, 4)
    own = network.head.forward = lambda x: 3 * nn.Conv3d.forward(network.head, x)
    expected = network(batch)
    apply_policy(network, {"head": "recompute"})
    apply_policy(network, {"head": "offload"})
    assert torch.equal(network(batch), expected)
    remove_policy(network)
    assert network.head.forward is own


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({"block.1": "recompute"}, "'block.1' is no module of Chain; close are 'blocks.1', "),
        ({"zzz": "recompute"}, "'zzz' is no module of Chain"),
        ({"blocks.1.0.*": "keep"}, "'blocks.1.0.*' is no module of Chain"),
        ({"blocks": "recompute"}, "'blocks' is a ModuleList, which is never called; its parts are"),
        ({"head": "checkpoint"}, "'head': policy 'checkpoint'; expected \"keep\", "),
        ({"": "recompute", "head": "offload"}, "'head': \"offload\" inside of '': \"recompute\""),
        ({"blocks.0": "recompute", "blocks.0.1": "offload"}, "recompute the inner"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(policies, words):
    network = Chain()
    apply_policy(network, {"blocks.2": "recompute"})
    with pytest.raises(PlanError, match=re.escape(words)):
        apply_policy(network, {"blocks.1": "recompute"} | policies)
    assert apply_policy(network, {}) == {"blocks.2": "recompute"}


def test_a_stage_whose_second_run_would_differ_is_refused():
    network = nn.Sequential(spectral_norm(nn.Conv3d(1, 4, 1)), nn.ReLU())
    apply_policy(network, {"": "recompute"})
    with pytest.raises(PlanError, match=r"changes its buffer 0\.parametrizations\.weight"):
        network(torch.randn(1, 1, 4, 4, 4))
    network.eval()(torch.randn(1, 1, 4, 4, 4))

    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.Sequential(nn.LeakyReLU(inplace=True)))
    apply_policy(network, {"1": "recompute"})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        network(torch.randn(1, 1, 4, 4, 4)).sum().backward()


class Spoilt(nn.Module):
    """Something that backward needs is changed in place after it was saved."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 1)
        self.stage = nn.Sequential(nn.Sigmoid(), nn.Tanh(), nn.Sigmoid())
        self.what = what
        if what == "within":
            self.stage[1].register_forward_hook(lambda module, args, output: output.add_(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.stage(x)
        if self.what == "output":
            y.add_(1)
        return y


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("what", ["within", "output"])
def test_a_change_in_place_is_noticed_in_an_offloaded_stage_as_elsewhere(what, far, request):
    if far:
        request.getfixturevalue("_far_host")
    network, batch = Spoilt(what), torch.randn(1, 1, 4, 4, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        network(batch).sum().backward()
    apply_policy(network, {"stage": "offload"})
    with pytest.raises(RuntimeError, match="changed in place"):
        network(batch).sum().backward()


def traced(policies: dict[str, Any], *, device: str = "cuda") -> MemoryReport:
    network = Chain()
    apply_policy(network, policies)
    card = CudaCard(cudnn_version=91900, cublas_bytes=0, operand_copies=0)  # tensors alone
    return trace_peak(network, (1, 1, 16, 16, 16), device=device, card=card)


def test_saved_bytes_by_hand():
    means = 2 * 512  # mean and deviation of a norm, each in the allocator's smallest unit
    block = 16 * U + means  # the norm's input, the activation's result
    assert traced({}).saved_bytes == 3 * block
    assert traced({"blocks.1": "recompute"}).saved_bytes == 3 * block - (8 * U + means)
    assert traced({"blocks.*": "recompute"}).saved_bytes == 3 * 8 * U
    assert traced({"": "recompute"}).saved_bytes == 0
    # an offloaded stage keeps small tensors and its output; what it takes in is another's output
    assert traced({"blocks.1": "offload"}).saved_bytes == 3 * block - 8 * U
    assert traced({"blocks.*": "offload"}).saved_bytes == 3 * (8 * U + means)
    assert traced({"": "offload"}).saved_bytes == 3 * means
    assert traced({"": "offload", "blocks.*": "recompute"}).saved_bytes == 0
    assert traced({"": "offload"}, device="cpu") == traced({}, device="cpu")


def test_peak_bytes_by_hand():
    means, buffers = 2 * 512, 3 * 3 * 512
    plain, recomputed = traced({}), traced({"blocks.1": "recompute"})
    # the last activation's backward: nothing has been let go, its gradients come on top
    small = plain.parameter_bytes + buffers + 3 * means
    assert 0 <= plain.peak_bytes - ((1 + 3 * 16 + 16) * U + small) <= 3 * 512  # the loss, the head
    assert plain.peak_bytes - recomputed.peak_bytes == 8 * U + means
    # the last block's forward: the batch, the block's input, the norm's input on its way to the
    # host, the norm's result and the activation's
    assert traced({"": "offload"}).peak_bytes == (1 + 4 * 8) * U + small


@pytest.mark.parametrize(("name", "policy"), CHOICES)
def test_traced_equals_measured_to_the_byte(name, policy):
    network = under(name, policy).float()
    predicted = trace_peak(network, shape_of(name), device="cpu")
    batch = torch.randn(shape_of(name))
    measured = measure_peak(lambda: mean_of_outputs(network(batch)).backward())
    assert predicted.timeline == measured.timeline
    assert replace(predicted, device_bytes=None) == measured


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["SegResNet", "DynUNet", "BasicUNet", "DenseUNet", "GroupNorm"])
def test_a_second_run_follows_cudas_rules_in_a_trace(name, autocast):
    if name == "GroupNorm":  # float32 under CUDA's autocast, not under the CPU's
        network, stages = nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)), ("",)
    else:
        network, stages = NETWORKS[name][0](), NETWORKS[name][1]
    plain = trace_peak(network, (2, 1, 16, 16, 16), autocast=autocast)
    apply_policy(network, dict.fromkeys(stages, "recompute"))
    ours = trace_peak(network, (2, 1, 16, 16, 16), autocast=autocast)
    assert ours.saved_bytes < plain.saved_bytes


STEP = functools.partial(trace_peak, input_shape=(2, 1, 16, 16, 16))


def peak_under(network: nn.Module, policies: dict[str, Any]) -> int:
    apply_policy(network, policies)
    peak = STEP(network).peak_bytes
    remove_policy(network)
    return peak


def test_a_choice_fits_and_one_stage_fewer_does_not():
    network = Chain()
    stages = ["blocks.0", "blocks.1"]  # they save the same, the first comes first
    peaks = [peak_under(network, dict.fromkeys(stages[:n], "recompute")) for n in range(3)]
    assert peaks[0] > peaks[1] > peaks[2]
    for n, peak in enumerate(peaks):
        chosen = choose_policy(network, STEP, budget_bytes=peak)
        assert chosen == dict.fromkeys(stages[:n], "recompute")


@pytest.mark.parametrize(
    ("least", "expected"),
    [(1, "c"), (4, "b"), (5, "bc"), (6, "bc"), (8, "ac"), (99, "abc")],
)
def test_just_what_is_missing_is_weighed_out(least, expected):
    assert lightest({"a": 7, "b": 4, "c": 2}, least) == list(expected)


def test_of_many_stages_the_lightest_are_left_out_of_the_weighing():
    weights = {str(n): n for n in range(1, 41)}
    assert sum(weights[name] for name in lightest(weights, 300)) == 300
    assert lightest(weights, 500) == [str(n) for n in range(40, 24, -1)]  # a dozen weighs 414


@pytest.mark.parametrize("name", ["SegResNet", "DynUNet", "BasicUNet", "DenseUNet"])
def test_a_choice_fits_in_any_network_and_leaves_it_as_it_was(name):
    network, stages = NETWORKS[name][0](), NETWORKS[name][1]
    plain = peak_under(network, {})
    in_force = apply_policy(network, POLICIES["both"](stages))
    chosen = choose_policy(network, STEP, budget_bytes=plain - 1)
    assert set(chosen.values()) == {"recompute"}
    assert apply_policy(network, {}) == in_force
    remove_policy(network)
    assert peak_under(network, chosen) < plain
    assert choose_policy(network, STEP, budget_bytes=plain - 1) == chosen
    assert choose_policy(network, STEP, budget_bytes=plain) == {}


def test_a_choice_looks_inside_of_stages_and_then_to_the_host():
    network = nn.Sequential(Chain())
    assert choose_policy(network, STEP, budget_bytes=peak_under(network, {}) - 1) == {
        "0.blocks.0": "recompute"
    }
    least = peak_under(network, {"": "offload"})
    assert choose_policy(network, STEP, budget_bytes=least) == {"0": "offload"}
    assert choose_policy(Chain(), STEP, budget_bytes=least) == {"": "offload"}
    with pytest.raises(MemoryBudgetError, match=r"Sequential takes .* at least"):
        choose_policy(network, STEP, budget_bytes=least - 1)
    assert apply_policy(network, {}) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["SegResNet", "Nested", "Chain"])
def test_numbers_on_cuda(name, policy, monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    torch.manual_seed(0)
    plain = train(NETWORKS[name][0]().double().cuda(), name)
    ours = train(under(name, policy).cuda(), name)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_an_offloaded_network_leaves_the_cuda_device():
    network, batch = Chain().cuda(), torch.randn(1, 1, 64, 64, 64, device="cuda")
    apply_policy(network, {"": "offload"})
    for _ in range(2):  # workspaces that stay are there after the first
        network.zero_grad()
        before = torch.cuda.memory_allocated()
        logits = network(batch)
        kept = torch.cuda.memory_allocated() - before
        logits.mean().backward()
    assert kept - logits.nbytes <= 3 * 2 * 512 + 512
