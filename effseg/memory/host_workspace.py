"""What a training step takes on a CPU beside tensors.

Convolutions copy their operands (`host_convolution`). Operands of a sum or product that are of
different types are converted as wholes first (compute_types in aten/src/ATen/TensorIterator.cpp).
oneDNN keeps what it compiles of matrix products.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effseg.kernels.tiles import tile_length
from effseg.memory.host_convolution import Convolution

HOST_BYTES = 16 * 2**20
"""Threads' stacks, the libraries' compiled kernels and tables: what a first step leaves. Measured
with and without threads as 11 to 20 MiB over seven networks."""
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
            return Convolution(inputs, weight, bias, result, options).forward_bytes()
        if name == "aten::convolution_backward":
            gradient, inputs, weight, _, *options, (to_inputs, *_) = args
            convolution = Convolution(inputs, weight, None, gradient, options)
            return convolution.backward_bytes(to_inputs=to_inputs)
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
