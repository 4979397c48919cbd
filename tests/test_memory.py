import copy
import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filled import filled
from monai.networks import nets
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from effseg.errors import PlanError
from effseg.memory import (
    PeakResident,
    measure_peak,
    peak_resident_bytes,
    resident,
    resident_bytes,
    trace_peak,
)
from effseg.memory.cuda_rules import ATEN, CudaRules, build_rules
from effseg.memory.hollow import HollowMode, hollow, hollow_empty
from effseg.memory.shapes import UnknownValueError
from effseg.memory.trace import mean_of_outputs

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)


class Residual(nn.Module):
    """Recomputes its middle by a checkpoint."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.last = nn.Conv3d(8, 2, 1)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + checkpoint(self.middle, x, use_reentrant=self.reentrant))


class BufferedScale(torch.autograd.Function):
    """Fills one buffer piece by piece, forward and backward, and clears it in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], 3 * x.shape[1], *x.shape[2:])
        for part in range(3):
            torch.mul(x, scale[part], out=out[:, part * x.shape[1] : (part + 1) * x.shape[1]])
        ctx.save_for_backward(x, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        total = torch.zeros_like(x)
        grad_scale = torch.zeros_like(scale)
        for part, piece in enumerate(grad.split(x.shape[1], dim=1)):
            total.addcmul_(piece, scale[part])
            grad_scale[part] += (piece * x).sum()
        return total, grad_scale


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Conv3d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(BufferedScale.apply(self.conv(x), self.scale))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16**3, 3)),
    "dropout": lambda: nn.Sequential(nn.Conv3d(1, 4, 1), nn.Dropout(0.3), nn.Conv3d(4, 2, 1)),
    "norms": lambda: nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.InstanceNorm3d(8, affine=True),
        nn.LeakyReLU(inplace=True),
        nn.GroupNorm(2, 8),
        nn.LayerNorm(16),
        nn.BatchNorm3d(8),
    ),
    "checkpoint": lambda: Residual(reentrant=False),
    "reentrant": lambda: Residual(reentrant=True),
    "function": Buffered,
    "BasicUNet": lambda: nets.BasicUNet(3, 1, 2, features=(4, 4, 4, 4, 4, 4), norm="batch"),
    "SegResNet": lambda: nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)),
    "DynUNet": lambda: nets.DynUNet(
        3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], res_block=True
    ),
    "supervised": lambda: nets.SegResNetDS(3, 8, 1, 2, blocks_down=(1, 1, 1), dsdepth=2),
    "UNet": lambda: nets.UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2),
    "AttentionUnet": lambda: nets.AttentionUnet(3, 1, 2, (4, 8, 16), (2, 2)),
}

LARGE_NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "VNet": (lambda: nets.VNet(3, 1, 2), 32),
    "UNETR": (
        lambda: nets.UNETR(
            *(1, 2, (16, 16, 16)), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3
        ),
        16,
    ),
    "SwinUNETR": (
        lambda: nets.SwinUNETR(1, 2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(1, 1, 1, 1)),
        64,
    ),
}
"""With the side of their patch."""


def step_of(
    network: nn.Module,
    shape: tuple[int, ...],
    *,
    autocast: torch.dtype | None,
    optimizer: Callable[..., torch.optim.Optimizer] | None,
) -> Callable[[], None]:
    """A real training step, past the first."""
    batch = torch.randn(shape)
    stepper = None if optimizer is None else optimizer(network.parameters())

    def step() -> None:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = mean_of_outputs(network(batch))
        loss.backward()
        del loss
        if stepper is not None:
            stepper.step()

    if stepper is not None:
        step()
    network.zero_grad()
    return step


def assert_traced_is_measured(
    name: str,
    autocast: torch.dtype | None,
    optimizer: Callable[..., Any] | None,
) -> None:
    assert_step_is_traced(NETWORKS[name](), (2, 1, 16, 16, 16), autocast, optimizer)


def assert_step_is_traced(
    network: nn.Module,
    shape: tuple[int, ...],
    autocast: torch.dtype | None,
    optimizer: Callable[..., Any] | None,
) -> None:
    traced = trace_peak(network, shape, autocast=autocast, optimizer=optimizer, device="cpu")
    measured = measure_peak(step_of(network, shape, autocast=autocast, optimizer=optimizer))
    assert traced.timeline == measured.timeline
    assert replace(traced, device_bytes=None) == measured


@pytest.mark.parametrize("name", NETWORKS)
def test_traced_equals_measured_to_the_byte(name):
    assert_traced_is_measured(name, None, ADAMW)


@pytest.mark.parametrize("name", ["linear", "dropout", "norms", "checkpoint", "SegResNet"])
def test_traced_equals_measured_in_bfloat16(name):
    assert_traced_is_measured(name, torch.bfloat16, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD], ids=["none", "sgd"])
def test_traced_equals_measured_everywhere(name, autocast, optimizer):
    assert_traced_is_measured(name, autocast, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_NETWORKS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_large_networks_traced_equal_measured(name, autocast):
    if "NETR" in name:
        pytest.importorskip("einops")
    build, side = LARGE_NETWORKS[name]
    assert_step_is_traced(build(), (1, 1, side, side, side), autocast, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(
    ("c_in", "c_out", "kernel", "stride", "transposed", "groups"),
    [
        (8, 4, 3, 1, False, 1),
        (8, 4, 1, 1, False, 1),
        (8, 4, 3, 2, False, 2),
        (8, 4, 2, 2, True, 1),
        (8, 8, 3, 1, False, 8),
    ],
)
def test_convolutions_lie_as_the_real_ones(
    dtype, innermost, c_in, c_out, kernel, stride, transposed, groups
):
    layout = torch.channels_last_3d if innermost else torch.contiguous_format
    x = torch.randn(2, c_in, 6, 6, 6).to(dtype).contiguous(memory_format=layout)
    one, other = (c_in, c_out) if transposed else (c_out, c_in)
    weight = torch.randn(one, other // groups, kernel, kernel, kernel).to(dtype)
    options = ([stride] * 3, [0] * 3, [1] * 3, transposed, [0] * 3, groups)

    def strides(x: Tensor, weight: Tensor) -> list[tuple[int, ...]]:
        y = torch.ops.aten.convolution(x, weight, None, *options)
        gradients = torch.ops.aten.convolution_backward(
            torch.ones_like(y), x, weight, None, *options, [True, True, False]
        )
        return [tensor.stride() for tensor in (y, *gradients[:2])]

    expected = strides(x, weight)
    with HollowMode(device="cpu"):
        assert strides(hollow(x), hollow(weight)) == expected
    with HollowMode(device="cuda"):
        on_card = strides(hollow(x), hollow(weight))
    assert all((stride[1] == 1) == innermost for stride in on_card if kernel > 1)


def test_bytes_of_a_linear_layer_by_hand():
    report = trace_peak(nn.Linear(4, 3), (5, 4), device="cpu")
    weights, batch, out, loss = 4 * (4 * 3 + 3), 4 * 5 * 4, 4 * 5 * 3, 4
    assert report.parameter_bytes == weights
    assert report.saved_bytes == 0  # its input is the batch, its weight a parameter
    # backward: the gradient of the output and of the parameters live together, and the loss and 1.0
    assert report.peak_bytes == batch + 2 * weights + out + 2 * loss


def test_adamw_state_and_temporary_by_hand():
    report = trace_peak(nn.Linear(4, 3), (5, 4), device="cpu", optimizer=ADAMW)
    weights, batch, steps, denominator = 4 * (4 * 3 + 3), 4 * 5 * 4, 2 * 4, 4 * 4 * 3
    in_step = [e for e in report.timeline if e.phase == "optimizer"]
    assert len(in_step) == 1
    # parameter, gradient, two moments; the root of one moment and that divided
    assert report.peak_bytes == batch + 4 * weights + steps + 2 * denominator
    assert in_step[0].start_bytes == batch + 4 * weights + steps


def test_saved_bytes_by_hand():
    voxels = 2 * 8**3
    conv_relu_conv = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 1))
    report = trace_peak(conv_relu_conv, (2, 1, 8, 8, 8), device="cpu")
    assert report.saved_bytes == 4 * 8 * voxels  # ReLU's result is the second convolution's input
    assert sum(event.saved_bytes for event in report.timeline) == report.saved_bytes
    leaky = nn.Sequential(nn.Conv3d(1, 8, 1), nn.LeakyReLU(), nn.Conv3d(8, 2, 1))
    report = trace_peak(leaky, (2, 1, 8, 8, 8), device="cpu")
    assert report.saved_bytes == 2 * 4 * 8 * voxels  # leaky ReLU keeps its input beside its result


def test_measured_peak_is_the_cpu_allocators_own():
    network = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.Softmax(1))
    batch = torch.randn(128, 64)
    before = 4 * (128 * 64 + sum(p.numel() for p in network.parameters()))

    def step() -> None:
        (network(batch) ** 2).sum().backward()

    step()
    network.zero_grad()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    network.zero_grad()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    assert measure_peak(step).peak_bytes - before == np.cumsum(sizes).max()


def test_measuring_counts_what_existed_from_the_start_and_frees_what_dies():
    held = {"x": torch.zeros(1000)}
    late = torch.zeros(500)

    def fn() -> None:
        y = held["x"] + 1
        del y
        held.pop("x")
        z = late + 1
        del z

    report = measure_peak(fn)
    assert report.timeline[0].start_bytes == 4 * 1500
    assert report.peak_bytes == 4 * 2500
    assert report.timeline[-1].end_bytes == 4 * 500
    assert (report.saved_bytes, report.parameter_bytes) == (0, 0)


def test_measuring_follows_views_growth_and_in_place():
    grown = torch.zeros(0)

    def fn() -> None:
        x = torch.ones(100)
        y = x.view(10, 10)[2:].t()
        y.add_(1)
        torch.add(x, 1, out=grown.resize_(100))

    assert measure_peak(fn).peak_bytes == 2 * 400
    assert grown[50] == 3


def test_measuring_nothing_gives_nothing():
    report = measure_peak(lambda: None)
    assert report.peak_bytes == report.saved_bytes == report.parameter_bytes == 0
    assert report.timeline == ()
    assert report.peak_event is None
    assert str(report) == "peak 0 B, saved 0 B, parameters 0 B"
    assert report.table().split() == ["module", "forward", "backward", "optimizer", "saved"]


def test_measuring_leaves_the_numbers_alone_and_no_hook_behind():
    network = NETWORKS["checkpoint"]()
    twin = copy.deepcopy(network)
    batch = torch.randn(1, 1, 8, 8, 8)
    network(batch).square().mean().backward()
    measure_peak(lambda: twin(batch).square().mean().backward())
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    with pytest.raises(ZeroDivisionError):
        measure_peak(lambda: 1 / 0)
    assert not torch.nn.modules.module._global_forward_hooks


def test_timeline_names_modules_forward_backward_and_in_recomputation():
    report = trace_peak(NETWORKS["checkpoint"](), (1, 1, 8, 8, 8), device="cpu", optimizer=ADAMW)
    phases = {
        phase: {e.module for e in report.timeline if e.phase == phase}
        for phase in ("forward", "backward", "optimizer")
    }
    convs = {f"Residual.{part}" for part in ("first.0", "middle.0", "last")}
    assert convs <= phases["forward"]
    assert convs <= phases["backward"]
    assert phases["optimizer"] == {""}
    for event in report.timeline:
        assert event.peak_bytes >= max(event.start_bytes, event.end_bytes)
    for event, following in zip(report.timeline, report.timeline[1:], strict=False):
        assert event.end_bytes == following.start_bytes
    assert report.peak_event.peak_bytes == report.peak_bytes
    rows = {line.split("  ")[0].strip(): line for line in report.table(depth=2).splitlines()}
    assert set(rows) == {"module", "Residual", "(outside)"} | {
        f"Residual.{part}" for part in ("first", "middle", "last")
    }
    assert rows["Residual.middle"].endswith(" 0 B")  # it saves nothing: it is recomputed
    assert str(report).startswith("peak ")


def test_labels_reach_the_loss_and_count():
    network = nn.Conv3d(1, 3, 1)
    seen = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((labels.shape, labels.dtype))
        return F.cross_entropy(logits, labels.long())

    shapes = {"input_shape": (2, 1, 8, 8, 8), "label_shape": (2, 8, 8, 8)}
    small = trace_peak(network, loss=loss, label_dtype=torch.uint8, device="cpu", **shapes)
    large = trace_peak(network, loss=loss, device="cpu", **shapes)
    assert seen == [((2, 8, 8, 8), torch.uint8), ((2, 8, 8, 8), torch.int64)]
    assert large.timeline[0].start_bytes - small.timeline[0].start_bytes == 7 * 2 * 8**3


def test_tracing_touches_neither_module_nor_random_state_nor_memory():
    network = nets.BasicUNet(3, 1, 2, features=(16, 16, 16, 16, 16, 16), norm="batch")
    before = copy.deepcopy(network.state_dict())
    random_state = torch.get_rng_state()
    trace_peak(network, (1, 1, 32, 32, 32), optimizer=ADAMW)
    peak = PeakResident().start()
    report = trace_peak(network, (4, 1, 512, 512, 512), optimizer=ADAMW)
    assert report.peak_bytes > 2**38  # a quarter of a terabyte
    assert peak.stop() < 100 * 2**20
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_module_on_meta_traces_like_the_real_one():
    with torch.device("meta"):
        shadow = NETWORKS["DynUNet"]()
    real = trace_peak(NETWORKS["DynUNet"](), (1, 1, 16, 16, 16))
    assert trace_peak(shadow, (1, 1, 16, 16, 16)) == real


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "shared"])
def test_our_dense_block(mode):
    from effseg.networks import DenseBlock

    network = nn.Sequential(nn.Conv3d(1, 8, 1), DenseBlock(8, 4, 3, memory=mode, dropout=0.1))
    shape = (2, 1, 12, 12, 12)
    for autocast in (None, torch.bfloat16):
        step = step_of(network, shape, autocast=autocast, optimizer=None)
        traced = trace_peak(network, shape, autocast=autocast, device="cpu")
        assert replace(traced, device_bytes=None) == measure_peak(step)


class Undecided(nn.Module):
    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 1)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.look(x) is None else x * 2


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.mean().item(),
    "if": lambda x: bool(x.sum() > 0),
    "mask": lambda x: x[x > 0],
    "numpy": lambda x: x.detach().numpy(),
    "tolist": lambda x: x.detach().tolist(),
}


def test_a_compiled_network_is_refused_in_one_line():
    compiled_in_place = nn.Conv3d(1, 2, 1)
    compiled_in_place.compile(backend="eager")
    compiled = torch.compile(nn.Conv3d(1, 2, 1), backend="eager")
    for network in (compiled, nn.Sequential(compiled_in_place)):
        with pytest.raises(PlanError, match=r"^\w+ is compiled.*before torch.compile") as refusal:
            trace_peak(network, (1, 1, 8, 8, 8))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_network_that_looks_at_values_is_refused(look):
    with pytest.raises(PlanError, match=r"^Undecided.*cannot be traced.*measure_peak"):
        trace_peak(Undecided(look), (1, 1, 32, 32, 32))


def test_known_values_may_be_looked_at():
    network = Undecided(lambda x: torch.arange(4).float().mean().item())
    assert trace_peak(network, (1, 1, 8, 8, 8)).peak_bytes > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_shape": (1, 1, 0, 8, 8)}, r"input_shape \(1, 1, 0, 8, 8\)"),
        ({"label_shape": (-1, 8)}, r"label_shape \(-1, 8\)"),
        ({"loss": lambda out: out}, r"loss of shape \(1, 2, 8, 8, 8\); expected a scalar"),
        ({"loss": lambda out: 1.0}, "loss of float; expected a scalar"),
        ({"loss": lambda out: out.detach().mean()}, "loss without a gradient"),
    ],
    ids=["input", "label", "vector", "number", "detached"],
)
def test_bad_input_is_refused_at_the_door(options, words):
    given = {"input_shape": (1, 1, 8, 8, 8)} | options
    with pytest.raises(PlanError, match=words):
        trace_peak(nn.Conv3d(1, 2, 1), **given)


def test_hollow_tensors_are_ordinary_but_for_their_memory():
    x = hollow_empty((2, 3, 4), torch.bfloat16)
    assert type(x) is Tensor
    assert (x.device.type, x.dtype, x.stride()) == ("cpu", torch.bfloat16, (12, 4, 1))
    assert x.untyped_storage().nbytes() == 48
    assert hollow(torch.zeros(4, 6)[:, ::2].t()).untyped_storage().nbytes() == 4 * (18 + 4 + 1)
    assert "0., 0." in repr(x)  # a debugger may print it
    with HollowMode(device="cpu"):
        y = torch.cat([x, x], dim=1)
        small = torch.ones(3) + 1
        assert small.tolist() == [2, 2, 2]
        small += y[0, :3, 0]
        with pytest.raises(UnknownValueError):
            small.sum().item()
        out = torch.empty(2, 6, 4, dtype=torch.bfloat16)
        assert torch.add(y, 1, out=out) is out
        with pytest.raises(RuntimeError):
            x @ x
    assert y.shape == (2, 6, 4)


def test_cuda_rules_are_the_lists_of_the_installed_torch():
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    if not header.is_file():
        pytest.skip("this torch comes without its headers")
    text = header.read_text()
    lists = {
        name: set(re.findall(r"_\((\w+)[,)]", body.replace("ADD_NS(", "")))
        for name, body in re.findall(r"#define AT_FORALL_(\w+)\(_\)((?:.*\\\n)+.*)", text)
    }
    assert set(lists) > {"FP32", "FP32_SET_OPT_DTYPE", "PROMOTE", "LOWER_PRECISION_FP"}

    casts = torch._C._dispatch_has_kernel_for_dispatch_key
    ours = {name: rule for rule, names in ATEN.items() for name in names}
    operators = torch._C._dispatch_get_all_op_names()
    for name in {n[6:].split(".")[0] for n in operators if n.startswith("aten::")}:
        overloads = [n for n in operators if n.split(".")[0] == f"aten::{name}"]
        on_cpu = any(casts(overload, "AutocastCPU") for overload in overloads)
        on_cuda = any(casts(overload, "AutocastCUDA") for overload in overloads)
        rule = ours.get(name)
        if name in lists["FP32"] and not on_cpu:
            assert rule == "float32", name
        if name in lists["FP32_SET_OPT_DTYPE"]:
            assert rule == "dtype", name
        if name in lists["PROMOTE"]:
            assert rule == "widest", name
        if rule == "as is":
            assert (on_cpu, on_cuda) == (True, False), name
        if rule == "lower":
            assert name in lists["LOWER_PRECISION_FP"], name
    assert build_rules()["softmax"] == "dtype"


def test_meta_tensors_ignore_autocast_and_hollow_ones_do_not():
    weight, shape = torch.ones(2, 1, 1, 1, 1), (1, 1, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on_meta = F.conv3d(torch.empty(shape, device="meta"), weight.to("meta"))
        with HollowMode(device="cuda"):
            on_nothing = F.conv3d(hollow_empty(shape, torch.float32), hollow(weight))
    assert (on_meta.dtype, on_nothing.dtype) == (torch.float32, torch.bfloat16)


def test_backward_for_cuda_needs_no_card():
    # a tensor that says it is on CUDA ends the process here once autograd asks for its device
    with HollowMode(device="cuda"):
        x = hollow_empty((2, 3), torch.float32).requires_grad_()
        (x * 2).sum().backward()
    assert (x.device.type, x.grad.shape) == ("cpu", x.shape)


VOLUME, LOW, WIDE = (1, 2, 4, 4, 4), torch.bfloat16, torch.float32


CASTS: list[tuple[Callable[[Tensor], Tensor], torch.dtype]] = [
    (lambda x: F.conv3d(x, torch.ones(2, 2, 1, 1, 1)), LOW),
    (lambda x: F.conv_transpose3d(x, torch.ones(2, 2, 1, 1, 1)), LOW),
    (lambda x: F.linear(x.float(), torch.ones(3, 4)), LOW),
    (lambda x: x.float() @ x.float(), LOW),
    (lambda x: torch.einsum("ncxyz,nkxyz->ck", x.float(), x.float()), LOW),
    (lambda x: F.avg_pool3d(x, 2), LOW),
    (lambda x: F.adaptive_avg_pool3d(x, 2), LOW),
    (lambda x: F.max_pool3d(x, 2), LOW),
    (lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate"), LOW),
    (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), WIDE),
    (lambda x: F.interpolate(x, size=2, mode="area"), LOW),
    (lambda x: F.softmax(x, dim=1), WIDE),
    (lambda x: torch.log_softmax(x, 1), WIDE),
    (lambda x: x.softmax(1, dtype=torch.float16), torch.float16),
    (lambda x: F.group_norm(x, 1), WIDE),
    (lambda x: F.layer_norm(x, (4,), torch.ones(4)), WIDE),
    (lambda x: F.instance_norm(x), LOW),
    (lambda x: F.cross_entropy(x, torch.zeros(1, 4, 4, 4, dtype=torch.long)), WIDE),
    (lambda x: F.mse_loss(x, x), WIDE),
    (lambda x: x.exp(), WIDE),
    (lambda x: x**2, WIDE),
    (lambda x: 1 / x, WIDE),
    (lambda x: x.sum(), WIDE),
    (lambda x: x.mean(), LOW),
    (lambda x: F.max_pool3d(x, 2, return_indices=True)[0], LOW),
    (lambda x: F.batch_norm(x, None, None, training=True), LOW),
    (lambda x: F.leaky_relu(x, 0.1), LOW),
    (lambda x: F.prelu(x, torch.ones(2)), LOW),
    (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), WIDE),
    (lambda x: F.rms_norm(x, (4,), torch.ones(4)), WIDE),
    (lambda x: F.binary_cross_entropy_with_logits(x, x), WIDE),
    (lambda x: torch.stack([x, x]), LOW),
    (lambda x: torch.cat([x, x, x.float()], 1), WIDE),
    (lambda x: F.pad(x, (1, 1, 1, 1, 1, 1)), LOW),
    (lambda x: x.norm(), WIDE),
    (lambda x: torch.cat([x, x]), LOW),
    (lambda x: torch.cat([x, x.float()]), WIDE),
    (lambda x: torch.addcmul(x, x.float(), x), WIDE),
    (lambda x: x + x.float(), WIDE),
]


@pytest.mark.parametrize(("run", "dtype"), CASTS, ids=map(str, range(len(CASTS))))
def test_cuda_autocast_types(run, dtype):
    x = hollow_empty(VOLUME, LOW)  # the CPU has no kernel for some of them
    with HollowMode(device="cuda"), torch.autocast("cpu", dtype=LOW), CudaRules():
        assert run(x).dtype == dtype
        with torch.autocast("cpu", enabled=False), CudaRules():
            assert x.exp().dtype == LOW  # a block that switches it off is obeyed


def test_tracing_for_cuda_rounds_casts_and_keeps_a_small_dropout_mask():
    by_512 = trace_peak(nn.Linear(4, 3), (5, 4))
    assert by_512.parameter_bytes == 2 * 512
    assert by_512.peak_bytes % 512 == 0

    network, shape = nn.Sequential(nn.Conv3d(1, 4, 1), nn.Dropout(0.5)), (1, 1, 32, 32, 32)
    values = 4 * 32**3
    assert trace_peak(network, shape, device="cpu").saved_bytes == 4 * values  # floating noise
    assert trace_peak(network, shape).saved_bytes == values

    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.Softmax(1))
    half = trace_peak(network, shape, autocast=torch.float16)
    assert half.saved_bytes == 512 + 2 * values // 4 + 4 * values  # weight, batch, softmax


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_traced_is_near_the_cuda_allocator(autocast):
    network = nets.SegResNet(3, 16, 1, 2)
    shape = (1, 1, 64, 64, 64)
    traced = trace_peak(network, shape, autocast=autocast)
    network.cuda()
    batch = torch.randn(shape, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
            loss = network(batch).mean()
        loss.backward()

    step()
    network.zero_grad()
    measured = measure_peak(step)
    assert traced.saved_bytes == pytest.approx(measured.saved_bytes, rel=0.01)
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.25)
    assert traced.reserved_bytes == pytest.approx(measured.reserved_bytes, rel=0.25)
    assert traced.device_bytes == pytest.approx(measured.device_bytes, rel=0.25)


@pytest.mark.parametrize("resettable", [True, False])
def test_resident_peak_rises_by_what_is_touched(resettable, monkeypatch, tmp_path):
    if not resident.STATUS.exists():
        pytest.skip("no /proc here")
    if not resettable:
        monkeypatch.setattr(resident, "CLEAR", tmp_path / "missing" / "clear_refs")
    size = 96 * 2**20
    peak = PeakResident().start()
    assert peak.baseline_bytes > 2**20
    touched = filled(size)
    if not resettable:
        peak._stopped.wait(0.2)
    del touched
    assert 0.9 * size < peak.peak_bytes < 1.5 * size
    assert peak.stop() == peak.peak_bytes
    frozen = peak.peak_bytes
    filled(2 * size)
    assert peak.peak_bytes == frozen


def test_resident_bytes_without_proc(monkeypatch, tmp_path):
    assert 2**20 < resident_bytes() <= peak_resident_bytes() * 1.01
    monkeypatch.setattr(resident, "STATUS", tmp_path / "status")
    assert resident_bytes() == peak_resident_bytes() > 2**20
