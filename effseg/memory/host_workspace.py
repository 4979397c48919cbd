"""What a training step takes on a CPU beside tensors: convolutions' own copies.

oneDNN convolves channels in blocks as wide as a vector register. Where channels are not innermost
torch's convolution copies its operands to that layout and its result back, in memory that no tensor
owns (`ONEDNN_VERBOSE=1` prints the reorders). Where they are, it reads and writes in place.
torch's own kernel, for small single samples, lays out a column of each voxel's neighbourhood
(slow_conv3d in aten/src/ATen/native/ConvolutionMM3d.cpp). Operands of a sum or product that are of
different types are converted as wholes first (compute_types in aten/src/ATen/TensorIterator.cpp).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effseg.kernels.tiles import tile_length
from effseg.memory.shapes import convolution_layout

HOST_BYTES = 16 * 2**20
"""Threads' stacks, the libraries' compiled kernels and tables: what a first step leaves. Measured
with and without threads as 11 to 20 MiB over seven networks."""
VECTOR_BYTES = {"AVX512": 64, "AVX2": 32}
"""By `torch.backends.cpu.get_cpu_capability()`; channels fill such a vector of float32, and as many
of them those of shorter types."""

PRODUCT_BYTES = 563 * 1024
"""What oneDNN keeps of a matrix product in bfloat16 that it has compiled, for each shape: measured
over two hundred shapes on AVX512. In float32 it keeps next to nothing."""
PRODUCTS = {
    "aten::mm": 1,
    "aten::addmm": 1,
    "aten::bmm": 1,
    "effseg::affine_act_linear": 1,
    "effseg::affine_act_linear_backward": 2,
    "effseg::head_sums": 1,
    "effseg::head_sums_backward": 2,
}
"""How many shapes of matrix products an operator computes."""
PROMOTING = {
    f"aten::{name}{place}"
    for name in ("add", "sub", "mul", "div", "addcmul", "addcdiv", "lerp")
    for place in ("", "_")
} | {"aten::maximum", "aten::minimum", "aten::where"}
"""Pointwise operators that bring their operands to one type."""
BLOCKED = {"Mkldnn", "MkldnnTranspose"}
COLUMNS = {"Slow2d", "Slow3d"}


class HostWorkspace:
    """What operators take on a CPU beside tensors; of one trace, since some of it stays.

    Attributes:
        kept_bytes: what stays: compiled matrix products of shorter types.
    """

    def __init__(self) -> None:
        self._products: dict[Any, int] = {}

    @property
    def kept_bytes(self) -> int:
        """Of all operators so far."""
        return PRODUCT_BYTES * sum(self._products.values())

    def __call__(self, name: str, args: Sequence[Any], result: Any) -> int:
        """What an operator takes while it runs, beside its arguments and results.

        Args:
            name: the schema's, `aten::convolution`.
            args: of the call; of tensors, shapes and strides are looked at.
            result: of the call.
        """
        if name == "aten::convolution":
            inputs, weight, bias, *options = args
            return _of_convolution(result, inputs, weight, bias, options)
        if name == "aten::convolution_backward":
            gradient, inputs, weight, _, *options, (to_inputs, *_) = args
            return _of_convolution(
                gradient, inputs, weight, None, options, backward=True, to_inputs=to_inputs
            )
        if name in PROMOTING:
            condition = name == "aten::where"
            return _promoted_bytes(list(_tensors(args))[condition:], result)
        if name in PRODUCTS:
            tensors = list(_tensors(args))
            if tensors[0].element_size() == 2:
                shapes = tuple(tensor.shape for tensor in tensors)
                self._products[name, shapes] = PRODUCTS[name] * _n_lengths(name, args[0])
        return 0


def _n_lengths(name: str, rows: Tensor | Sequence[Tensor]) -> int:
    """How many lengths the tiles of our own operators have; they differ by one voxel at most."""
    if not name.startswith("effseg::"):
        return 1
    segments = [rows] if isinstance(rows, Tensor) else rows
    n_voxels = segments[0].shape[1]
    step = tile_length(sum(segment.shape[2] for segment in segments), "cpu")
    return 1 if n_voxels % -(-n_voxels // step) == 0 else 2


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _promoted_bytes(operands: Sequence[Tensor], result: Tensor) -> int:
    """Of copies of operands, and of a result in place, that are not of the type computed in."""
    whole = [tensor for tensor in operands if tensor.dim() > 0]
    common = result.dtype
    for tensor in whole:
        common = torch.promote_types(common, tensor.dtype)
    return sum(
        tensor.numel() * common.itemsize for tensor in (*whole, result) if tensor.dtype != common
    )


def _of_convolution(
    output: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Sequence[Any],
    *,
    backward: bool = False,
    to_inputs: bool = False,
) -> int:
    """Of a convolution in either direction; backward takes one of its two halves at a time.

    Channels that fill no vector are read in place; a gradient of them is written as one.
    """
    stride, padding, dilation, transposed, output_padding, groups = options
    kernel = torch._C._select_conv_backend(
        inputs, weight, bias, stride, padding, dilation, transposed, output_padding, groups, None
    ).name
    if kernel in COLUMNS:
        if math.prod(weight.shape[2:]) == 1 and not backward:
            return 0  # the input is its own columns; their gradient is a tensor apart all the same
        places = output.shape[0] * math.prod(output.shape[2:])
        return weight[0].numel() * places * weight.element_size()
    if kernel not in BLOCKED:
        return 0
    turned = 0
    if backward and weight.element_size() == 2 and math.prod(weight.shape[2:]) > 1:
        # shorter types are turned, two voxels into one register, for the gradient of the weights
        fills = inputs.shape[1] >= _channels_of_a_vector()
        inner = _blocked_bytes(inputs) if fills else inputs.numel() * inputs.element_size()
        turned = (inner + _blocked_bytes(output)) // max(stride)
    layout = convolution_layout(inputs, weight, bias, options, device="cpu")
    if layout == torch.contiguous_format:
        in_place = (
            not to_inputs
            and not transposed
            and torch.backends.cpu.get_cpu_capability() == "AVX512"  # of others it is not known
            and inputs.shape[1] < _channels_of_a_vector()
            and math.prod(weight.shape[2:]) > 1
        )
        copied = (output, weight) if in_place else (inputs, output, weight)
        return turned + sum(map(_blocked_bytes, copied))
    return turned


def _blocked_bytes(tensor: Tensor) -> int:
    """Of a copy whose channels fill whole vectors."""
    n_channels, width = tensor.shape[1], _channels_of_a_vector()
    return tensor.numel() // n_channels * (-(-n_channels // width) * width) * tensor.element_size()


def _channels_of_a_vector() -> int:
    n_bytes = VECTOR_BYTES.get(torch.backends.cpu.get_cpu_capability(), 4)
    return n_bytes // 4
