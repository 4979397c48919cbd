"""What a convolution takes on a CPU beside its tensors: counted, and given back by the system."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from effseg.memory.host_convolution import VECTOR_BYTES, Convolution

WIDTH = VECTOR_BYTES.get(torch.backends.cpu.get_cpu_capability(), 4) // 4
"""Channels of float32 in a vector."""

MEASURED = """
import sys
import torch
from torch import nn
from effseg.memory import PeakResident, mapped_blocks
from effseg.memory.host_convolution import Convolution

torch.set_num_threads(int(sys.argv[1]))
with mapped_blocks():
    for row in sys.stdin:
        kind, dtype, layout, *numbers = row.split()
        n, n_inputs, n_outputs, side, kernel, stride = map(int, numbers)
        dtype = getattr(torch, dtype)
        padding = kernel // 2 if kind == "Conv3d" else 0
        conv = getattr(nn, kind)(n_inputs, n_outputs, kernel, stride, padding).to(dtype)
        options = ([stride] * 3, [padding] * 3, [1] * 3, kind != "Conv3d", [0] * 3, 1)
        found = []
        for to_inputs in (False, True):
            image = torch.ones(n, n_inputs, side, side, side, dtype=dtype)
            image = image.to(memory_format=getattr(torch, layout)).requires_grad_(to_inputs)
            for again in (False, True):
                conv.zero_grad(set_to_none=False)
                image.grad = None
                resident = PeakResident().start()
                result = conv(image)
                forward = resident.stop() - result.nbytes
                gradient = torch.ones_like(result)
                resident = PeakResident().start()
                result.backward(gradient)
                backward = resident.stop() - image.nbytes * to_inputs - conv.weight.nbytes
            counted = Convolution(image, conv.weight, conv.bias, result, options)
            found += [forward, counted.forward_bytes()]
            found += [backward, counted.backward_bytes(to_inputs=to_inputs)]
            del result, gradient
        print(*found)
"""
MIB = 2**20
SHAPES = [
    "Conv3d float32 contiguous_format 2 1 16 48 3 1",
    "Conv3d float32 contiguous_format 2 8 13 48 3 1",
    "Conv3d float32 contiguous_format 2 13 8 48 3 1",
    "Conv3d float32 contiguous_format 2 17 40 48 3 1",
    "Conv3d float32 contiguous_format 2 16 32 48 3 2",
    "Conv3d float32 contiguous_format 2 8 8 48 1 1",
    "Conv3d float32 contiguous_format 2 320 320 8 3 1",
    "Conv3d bfloat16 contiguous_format 2 320 320 8 3 1",
    "Conv3d bfloat16 contiguous_format 2 1 16 48 3 1",
    "Conv3d bfloat16 contiguous_format 2 8 13 48 3 1",
    "Conv3d bfloat16 contiguous_format 2 12 16 48 3 1",
    "Conv3d bfloat16 contiguous_format 2 17 40 48 3 1",
    "Conv3d bfloat16 contiguous_format 4 16 16 48 3 1",
    "Conv3d bfloat16 contiguous_format 2 16 32 48 3 2",
    "Conv3d bfloat16 channels_last_3d 2 8 16 48 3 1",
    "Conv3d bfloat16 channels_last_3d 2 32 32 48 3 2",
    "Conv3d float32 channels_last_3d 2 16 32 48 3 2",
    "ConvTranspose3d float32 contiguous_format 2 13 24 32 2 2",
    "ConvTranspose3d float32 contiguous_format 2 32 16 48 3 1",
    "ConvTranspose3d bfloat16 contiguous_format 2 16 16 32 2 2",
    "ConvTranspose3d bfloat16 contiguous_format 2 32 16 32 2 2",
    "ConvTranspose3d bfloat16 channels_last_3d 2 13 24 32 2 2",
]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and glibc are Linux's")
@pytest.mark.skipif(WIDTH != 16, reason="which kernels others take is not known")
@pytest.mark.parametrize("n_threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_is_counted_is_what_the_system_counts(n_threads):
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, str(n_threads)],
        input="\n".join(SHAPES),
        capture_output=True,
        text=True,
        check=True,
    )
    wrong = []
    for shape, line in zip(SHAPES, ended.stdout.splitlines(), strict=True):
        numbers = [int(number) for number in line.split()]
        for measured, counted in zip(numbers[::2], numbers[1::2], strict=True):
            if abs(measured - counted) > 0.05 * counted + MIB:
                wrong.append(f"{shape}: {line}")
    assert wrong == []


def counted(conv, shape):
    image = torch.zeros(shape, dtype=conv.weight.dtype)
    options = (conv.stride, conv.padding, conv.dilation, conv.transposed, [0] * 3, 1)
    return Convolution(image, conv.weight, conv.bias, conv(image), options)


def test_a_transposed_one_is_written_turned_and_returned():
    conv = nn.ConvTranspose3d(32, 16, 2, 2).bfloat16()
    found = counted(conv, (2, 32, 8, 8, 8))
    assert found.kernel == "MkldnnTranspose"  # torch's binding has no name for it
    assert found.forward_bytes() == 2 * found.outputs.nbytes


def test_a_kernel_of_torchs_own_lays_out_columns():
    found = counted(nn.Conv3d(4, 2, 3, padding=1), (1, 4, 5, 6, 7))
    assert found.kernel == "Slow3d"
    assert found.forward_bytes() == 4 * 27 * (5 * 6 * 7) * 4
    pointwise = counted(nn.Conv3d(4, 2, 1), (1, 4, 5, 6, 7))
    assert pointwise.forward_bytes() == 0
    assert pointwise.backward_bytes(to_inputs=False) == 0
    assert pointwise.backward_bytes(to_inputs=True) == 4 * (5 * 6 * 7) * 4
