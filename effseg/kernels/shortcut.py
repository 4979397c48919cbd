"""A shorter way into an operator than torch's dispatcher, for when nobody watches operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def call(operator: CustomOpDef, rows: Tensor | Sequence[Tensor], *others: Any) -> Any:
    """Call an operator that autograd does not differentiate.

    On its way through torch's dispatcher an operator written in Python passes several layers of
    Python, which take longer than a few hundred voxels do. They serve the compiler, modes that
    watch operators (fake tensors, whoever counts memory), other kinds of tensors and other devices;
    where there is none of them the operator's own function is called.

    Args:
        operator: with a function of its own for the CPU.
        rows: its first argument.
        others: its other arguments.
    """
    first = rows if isinstance(rows, Tensor) else rows[0]
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(first) is not Tensor
        or first.device.type != "cpu"
    ):
        return operator(rows, *others)
    return operator._init_fn(rows, *others)
