"""The Triton kernels of CUDA devices: interpreted, compiled for absent cards, and run."""

import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from kernel_cases import OPERATORS, SIZES, TOLERANCE, arguments, assert_agree, copied, results

from effseg.kernels.cuda import KERNELS, fits_head, fits_head_backward, fits_matrices, fits_rows
from effseg.kernels.cuda.dispatch import triton_is_installed, with_kernel
from effseg.networks import DenseBlock

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not triton_is_installed(), reason="Triton is not installed here")


def run_with_triton(*command: str, **environment: str) -> str:
    """Of a Python process of its own, which must end well."""
    answer = subprocess.run(
        [sys.executable, *command],
        cwd=HERE,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.slow
@needs_triton
def test_the_kernels_give_the_operators_numbers_in_tritons_interpreter() -> None:
    output = run_with_triton(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_kernels.py"),
        TRITON_INTERPRET="1",
    )
    assert " passed" in output


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_kernels_compile_for_cards_that_are_not_here(capability, tmp_path) -> None:
    output = run_with_triton("compiled_kernels.py", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    shared, ways = zip(*(map(int, line.split()[1:]) for line in output.splitlines()), strict=True)
    assert len(shared) == 9
    assert max(shared) <= 99 * 1024  # what a program has on the smallest of them
    assert max(ways) <= 2  # by alignment: another layer is no reason to compile anew


@needs_triton
@pytest.mark.parametrize("name", OPERATORS)
def test_where_a_kernel_cannot_run_torch_does_and_says_so_once(name, caplog) -> None:
    plain = OPERATORS[name]._init_fn
    run = with_kernel(plain, lambda *_: True)
    given = arguments(name, "odd", torch.float32)
    expected = results(name, plain, copied(given))
    with caplog.at_level(logging.WARNING, logger="effseg"):
        for _ in range(2):  # tensors on a CPU are nothing that Triton can launch a kernel on
            again = copied(given)
            assert_agree(results(name, run, again), expected, 1e-6)
    assert len(caplog.records) == 1
    assert f"{name} runs on torch's own operators" in caplog.text


def test_without_triton_torch_does_the_work(monkeypatch) -> None:
    monkeypatch.setattr("effseg.kernels.cuda.dispatch.triton_is_installed", lambda: False)
    run = with_kernel(OPERATORS["moments"]._init_fn, lambda *_: pytest.fail("asked for a kernel"))
    mean, _ = run(torch.ones(1, 4, 3), True)
    assert mean.tolist() == [[1.0] * 3]


@pytest.mark.parametrize("name", OPERATORS)
def test_arguments_without_a_kernel_are_known(name) -> None:
    fits = KERNELS[OPERATORS[name]]
    assert fits(*arguments(name, "odd", torch.bfloat16))
    assert not fits(*arguments(name, "odd", torch.float64))
    exact = arguments(name, "odd", torch.float32)
    assert fits(*exact) == (fits is fits_rows)  # matrix products in full precision are torch's


@pytest.fixture
def tf32() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("name", OPERATORS)
def test_float32_has_kernels_where_tf32_is_allowed(name) -> None:
    assert KERNELS[OPERATORS[name]](*arguments(name, "odd", torch.float32))


def test_nothing_and_channels_apart_and_many_classes_have_no_kernel() -> None:
    rows = torch.ones(1, 6, 4, dtype=torch.bfloat16)
    assert fits_rows(rows, True)
    assert not fits_rows(rows[:, :0], True)
    assert not fits_rows(rows.transpose(1, 2), True)
    row, weight = torch.ones(1, 4), torch.ones(130, 4, dtype=torch.bfloat16)
    assert fits_matrices([rows], row, row, weight, 0.0)
    assert not fits_matrices([rows, rows.transpose(1, 2)], row, row, weight, 0.0)
    assert fits_head(rows.transpose(1, 2), weight[:128])
    assert not fits_head(rows, weight)
    for name, fits in (("head_sums", fits_head), ("head_sums_backward", fits_head_backward)):
        given = arguments(name, "odd", torch.bfloat16)
        assert fits(*given, False, False, 0.0, None)
        for unusual in ((True, False, 0.0), (False, True, 0.0), (False, False, 1.0)):
            assert not fits(*given, *unusual, None)


@pytest.mark.gpu
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("name", OPERATORS)
def test_a_card_gives_the_operators_numbers_and_the_same_each_time(name, caplog) -> None:
    for size, dtype in product(SIZES, TOLERANCE):
        given = arguments(name, size, dtype, device="cuda")
        again, exact = copied(given), copied(given, torch.float64)
        with caplog.at_level(logging.WARNING, logger="effseg"):
            found = results(name, OPERATORS[name], given)
        assert not caplog.records  # the kernel did run
        assert all(map(torch.equal, found, results(name, OPERATORS[name], again)))
        matrices = KERNELS[OPERATORS[name]] is not fits_rows
        rounded = dtype == torch.float32 and matrices  # to tf32, of as many bits as float16
        expected = results(name, OPERATORS[name]._init_fn, exact)
        assert_agree(found, expected, TOLERANCE[torch.float16 if rounded else dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_card_trains_a_dense_block_as_plain_memory_does(norm) -> None:
    torch.manual_seed(0)
    shared, plain = (
        DenseBlock(24, 8, 3, norm=norm, memory=mode).cuda() for mode in ("shared", "plain")
    )
    shared.load_state_dict(plain.state_dict())
    x = torch.randn(2, 24, 20, 21, 22, device="cuda")
    found = []
    for block in (shared, plain):
        with torch.autocast("cuda", torch.bfloat16):
            y = block(x)
        y.float().square().mean().backward()
        found.append([y.detach(), *(p.grad for p in block.parameters())])
    assert_agree(*found, 5e-2)
