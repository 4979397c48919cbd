"""The Triton kernels, run on CPU tensors by Triton's interpreter.

`test_cuda_kernels.py` runs this file with TRITON_INTERPRET=1, which Triton reads when it is first
imported; pytest does not collect it by itself.
"""

import gc
import math
from contextlib import ExitStack
from importlib import import_module

import numpy as np
import pytest
import torch
import triton
from kernel_cases import (
    OPERATORS,
    SIZES,
    TOLERANCE,
    arguments,
    assert_agree,
    copied,
    head_arguments,
    results,
)
from torch import nn
from triton.runtime import interpreter

from effseg.kernels import pointwise
from effseg.kernels.cuda import KERNELS, blocks
from effseg.kernels.cuda import pointwise as cuda_pointwise
from effseg.kernels.cuda.partials import PARTIALS, partial_bytes
from effseg.losses import CompoundLoss
from effseg.memory import measure_peak
from effseg.networks import DenseBlock, NormActConv
from effseg.networks.head import defer_logits
from effseg.plans import LossConfig

assert triton.knobs.runtime.interpret


def kernel_of(name: str):
    """The function that launches it."""
    module = OPERATORS[name]._init_fn.__module__.rpartition(".")[2]
    return getattr(import_module(f"effseg.kernels.cuda.{module}"), name)


@pytest.fixture(autouse=True)
def _multiplied_bfloat16(monkeypatch) -> None:
    """The interpreter keeps bfloat16 as bare bits and would multiply those as integers."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), triton.language.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_kernel_gives_the_operators_numbers(name, size, dtype) -> None:
    if size == "wide" and dtype != torch.float32:
        pytest.skip("what is wide takes the same way in any type")
    given = arguments(name, size, dtype)
    exact = copied(given, torch.float64)
    expected = results(name, OPERATORS[name]._init_fn, exact)
    assert_agree(results(name, kernel_of(name), given), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", OPERATORS)
def test_long_runs_give_the_same_sums(name, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "PROGRAMS", 4)  # two runs of each sample, one of three blocks
    monkeypatch.setattr(blocks, "VALUES", 32 * 32)
    given = arguments(name, "odd", torch.float32)
    expected = results(name, OPERATORS[name]._init_fn, copied(given, torch.float64))
    assert_agree(results(name, kernel_of(name), given), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", OPERATORS)
def test_what_lies_beside_a_slice_stays(name) -> None:
    given = arguments(name, "odd", torch.float32)
    written = results(name, lambda *_: None, given)
    wider = [each._base for each in written if each._base is not None]
    before = [base.clone() for base in wider]
    kernel_of(name)(*given)
    for base, old in zip(wider, before, strict=True):
        margin = torch.ones_like(base, dtype=torch.bool)
        margin[:, :, 2:-3] = False
        assert margin.any()
        assert torch.equal(base[margin], old[margin])
        assert not torch.equal(base, old)


@pytest.mark.parametrize("name", PARTIALS)
def test_partial_sums_are_predicted_to_the_byte(name, monkeypatch) -> None:
    short = name.removeprefix("effseg::")
    given = arguments(short, "odd", torch.bfloat16)
    kept: list[object] = []

    def run() -> None:
        kept.append(kernel_of(short)(*given))

    def one_segment(*args) -> None:
        backward(*args)
        gc.collect()  # the interpreter's own cycles keep what a kernel was given

    backward = cuda_pointwise._segment_backward
    monkeypatch.setattr(cuda_pointwise, "_segment_backward", one_segment)

    predicted = partial_bytes(name, given)
    assert predicted is not None
    report = measure_peak(run)
    flat = [t for arg in given for t in (arg if isinstance(arg, list) else [arg])]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*flat, *results(short, lambda *_: kept[0], given))
        if isinstance(t, torch.Tensor)
    }
    assert report.peak_bytes - sum(held.values()) == sum(predicted)


def test_a_large_mean_costs_the_variance_no_digits() -> None:
    rows = (torch.randn(2, 5000, 8) + 1000).contiguous()
    mean, variance = kernel_of("moments")(rows, True)
    expected = rows.double().flatten(0, 1)
    torch.testing.assert_close(mean[0].double(), expected.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        variance[0].double(), expected.var(0, correction=0), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_what_is_not_a_number_stays_none(slope) -> None:
    rows = torch.tensor([[[math.nan], [-math.inf], [2.0]]])
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    given = kernel_of("affine_act")(rows, one, zero, slope)
    torch.testing.assert_close(
        given, pointwise.affine_act(rows, one, zero, slope), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("focal_gamma", [0.0, 0.5, 2.0])
def test_a_class_ruled_out_and_a_voxel_sure_of_its_class(focal_gamma) -> None:
    rows = torch.tensor([[[20.0, 0.0], [0.0, 20.0], [0.3, 0.1], [1e-4, -8.0]]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for name in ("head_sums", "head_sums_backward"):
        given = head_arguments(name, rows, weight, None, focal_gamma=focal_gamma)
        given[2] = torch.tensor([0.0, 0.0, -math.inf])
        given[6] = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
        exact = copied(given, torch.float64)
        expected = results(name, OPERATORS[name]._init_fn, exact)
        assert_agree(results(name, kernel_of(name), given), expected, 2e-6)


@pytest.mark.parametrize("n_classes", [3, 20])
def test_features_of_any_layout(n_classes) -> None:
    rows = torch.randn(2, 9, 130).transpose(1, 2)
    weight = torch.randn(n_classes, 9)
    for name in ("head_sums", "head_sums_backward"):
        given = head_arguments(name, rows, weight, torch.randn(1, 9), focal_gamma=0.0)
        expected = results(name, OPERATORS[name]._init_fn, copied(given, torch.float64))
        assert_agree(results(name, kernel_of(name), given), expected, 2e-6)


@pytest.fixture(scope="module")
def _kernels_on_cpu() -> None:
    """In this process every operator runs by its kernel, on CPU tensors too."""
    for operator in KERNELS:
        kernel = kernel_of(operator._init_fn.__name__)
        operator.register_kernel("cpu", lambda *args, kernel=kernel: kernel(*args))


def with_and_without(module: nn.Module, run, x: torch.Tensor) -> list[list[torch.Tensor]]:
    """Value and gradients of a step, with the kernels and without."""
    found = []
    for disabled in ((), KERNELS):
        with ExitStack() as stack:
            for operator in disabled:
                stack.enter_context(operator.set_kernel_enabled("cpu", enabled=False))
            module.zero_grad()
            given = x.clone().requires_grad_()
            value = run(given)
            value.backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        found.append([value.detach(), given.grad, *gradients])
    return found


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_dense_block_that_reads_segments(norm) -> None:
    block = DenseBlock(10, 4, 2, bottleneck=2, norm=norm, act="leaky_relu")
    after = NormActConv(18, 5, norm=norm)
    weights = torch.randn(2, 5, 4, 5, 6)

    def run(x):
        return (after(block((x[:, :7], x[:, 7:]))) * weights).mean()

    given, expected = with_and_without(
        nn.ModuleList([block, after]), run, torch.randn(2, 10, 4, 5, 6)
    )
    assert_agree(given, expected, 5e-6)


@pytest.mark.usefixtures("_kernels_on_cpu")
def test_a_dense_block_below_a_loss_that_makes_its_logits() -> None:
    block = DenseBlock(6, 4, 2, bottleneck=2)
    head = NormActConv(14, 3, bias=True)
    labels = torch.randint(0, 3, (2, 4, 5, 6))
    loss = CompoundLoss(LossConfig(focal_gamma=2.0))

    def run(x):
        return loss(defer_logits(head, block(x)), labels)

    given, expected = with_and_without(
        nn.ModuleList([block, head]), run, torch.randn(2, 6, 4, 5, 6)
    )
    assert_agree(given, expected, 5e-6)
