"""Which of an operator's two ways runs on a card: its Triton kernels, or torch's own operators.

Both give the same numbers. A kernel is compiled when it first runs, never at install. Where Triton
is not installed, where it cannot compile for the card, and for arguments that it has no kernel for,
torch's operators do the work, a tile at a time, as on a CPU. They do so too inside
`with operator.set_kernel_enabled("cuda", enabled=False)`, torch's own switch.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from effseg.kernels.cuda.blocks import LARGEST_CLASSES

logger = logging.getLogger("effseg")

HALF = (torch.bfloat16, torch.float16)
LARGEST_INT = 2**31 - 1


class KernelError(RuntimeError):
    """A kernel cannot be compiled or launched; nothing has been computed."""


def with_kernel(plain: Callable[..., Any], fits: Callable[..., bool]) -> Callable[..., Any]:
    """An operator's function for cards: its kernel's where it can, else its own.

    Args:
        plain: its own. The kernel's has the same name, in this package's module of the same name,
            which is imported when it first runs.
        fits: whether there is a kernel for these arguments.
    """
    module = f"{__package__}.{plain.__module__.rpartition('.')[2]}"
    broken = False

    def run(*args: Any) -> Any:
        nonlocal broken
        if broken or not triton_is_installed() or not fits(*args):
            return plain(*args)
        try:
            return getattr(import_module(module), plain.__name__)(*args)
        except (KernelError, ImportError) as error:
            broken = True
            logger.warning(
                "%s runs on torch's own operators from here on, with the same numbers but more "
                "slowly: its Triton kernel does not run on this card (%s)",
                plain.__name__,
                error,
            )
            return plain(*args)

    return run


@cache
def triton_is_installed() -> bool:
    """CUDA builds of torch for Linux bring it."""
    return find_spec("triton") is not None


def tf32_is_allowed() -> bool:
    """Whether torch was told to multiply float32 matrices on tensor cores, in 10 bits."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def fits_rows(rows: Tensor, *others: object) -> bool:
    """Whether an operator without matrix products has a kernel for these arguments."""
    given = [rows, *(other for other in others if isinstance(other, Tensor))]
    features = [tensor for tensor in given if tensor.ndim == rows.ndim]
    return _fit(features, (*HALF, torch.float32))


def fits_matrices(
    segments: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    slope: float,
    gradient: Tensor | None = None,
    into: Sequence[Tensor] = (),
) -> bool:
    """Whether `affine_act_linear` or its backward has a kernel for these arguments.

    Float32 in full precision is torch's: tensor cores do not multiply it, and Triton's products
    without them spill registers.
    """
    features = [*segments, *into, *(() if gradient is None else (gradient,))]
    return _fit(features, _matrix_dtypes()) and weight.numel() > 0


def fits_head(rows: Tensor, weight: Tensor, *others: Any) -> bool:
    """Whether `head_sums` has a kernel for these arguments: of a softmax and the usual sums.

    Sigmoids, squares and an edge weight are its tenth to twelfth.
    """
    return (
        not any(others[7:10])
        and rows.dtype in _matrix_dtypes()
        and rows.numel() > 0
        and 0 < weight.shape[0] <= LARGEST_CLASSES
        and rows.shape[2] * rows.stride(2) <= LARGEST_INT
    )


def fits_head_backward(rows: Tensor, weight: Tensor, *others: Any) -> bool:
    """Whether `head_sums_backward` has one; its tenth argument is the gradient."""
    return fits_head(rows, weight, *others[:7], *others[8:])


def _matrix_dtypes() -> tuple[torch.dtype, ...]:
    return (*HALF, torch.float32) if tf32_is_allowed() else HALF


def _fit(features: Sequence[Tensor], dtypes: tuple[torch.dtype, ...]) -> bool:
    """Of one type, of these, and not empty; channels side by side."""
    dtype = features[0].dtype
    return dtype in dtypes and all(
        each.dtype == dtype and each.numel() > 0 and (each.shape[2] == 1 or each.stride(2) == 1)
        for each in features
    )
