"""What a step computes and moves: what its seconds can be reckoned from before it runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MATRIX_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}
POINTWISE = {
    "effseg::affine_act_linear": (3, 1),
    "effseg::affine_act_linear_backward": (3, 2),
    "effseg::head_sums": (1, 1),
    "effseg::head_sums_backward": (1, 3),
}
"""Our 1x1 convolutions: which argument is the weight, and how often rows meet it."""


@dataclass
class Work:
    """Of a call, all its operators together.

    Attributes:
        flops: of convolutions and matrix products, a multiplication and an addition counting two.
        moved_bytes: that the other operators read and write.
        n_operators: that were called.
    """

    flops: int = 0
    moved_bytes: int = 0
    n_operators: int = 0

    def add(self, name: str, args: Sequence[Any], result: Any) -> None:
        """Count one operator; views are free.

        Args:
            name: the schema's, `aten::convolution`.
            args: of the call.
            result: of the call.
        """
        self.n_operators += 1
        flops = operator_flops(name, args, result)
        self.flops += flops
        if flops == 0:
            self.moved_bytes += _bytes_of(args) + _bytes_of((result,))


def operator_flops(name: str, args: Sequence[Any], result: Any) -> int:
    """Of one operator; 0 for those whose time goes into memory traffic."""
    if name == "aten::convolution":
        inputs, weight, transposed = args[0], args[1], args[6]
        return _at_each_place(inputs if transposed else result, weight)
    if name == "aten::convolution_backward":
        gradient, inputs, weight, transposed, wanted = *args[:3], args[7], args[10]
        # as much as forward for each of the two gradients that are asked for
        return _at_each_place(inputs if transposed else gradient, weight) * int(sum(wanted[:2]))
    if name in MATRIX_PRODUCTS:
        left, right = args[1:3] if "add" in name else args[:2]
        return 2 * int(left.numel()) * int(right.shape[-1])
    if name in POINTWISE:
        rows = args[0][0] if isinstance(args[0], list | tuple) else args[0]
        position, times = POINTWISE[name]
        return 2 * times * int(rows.shape[0] * rows.shape[1] * args[position].numel())
    return 0


def _at_each_place(places: Tensor, weight: Tensor) -> int:
    n_places = places.shape[0] * math.prod(places.shape[2:])
    return 2 * int(n_places) * weight.numel()


def _bytes_of(values: Sequence[Any]) -> int:
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, list | tuple):
            total += _bytes_of(value)
    return total
