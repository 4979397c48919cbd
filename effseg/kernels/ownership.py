"""Whether a gradient that autograd hands to a backward is that backward's alone.

Autograd forbids to write into an incoming gradient because others may read it later: another node
that was handed the same tensor, a hook that kept it, the caller who passed it to `backward`. Where
nobody else can, writing into it saves a copy as wide as the features. Each such reader holds a
reference, in Python, in C++ or to the memory below, so counting them tells. What the counts are
where there is no reader depends on the versions of Python and torch, and is taken from a backward
whose gradient is known to be its own.
"""

import sys
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from effseg.kernels.tiles import channels_last


def writable(gradient: Tensor, dtype: torch.dtype, *, sole_holder: bool) -> Tensor:
    """A gradient that may be written into, in channels-last memory.

    Args:
        gradient: (batch, channels, *space), as autograd handed it over.
        dtype: of the result.
        sole_holder: what `sole_holders` said of it.

    Returns:
        The gradient itself where nobody else holds it, it is of this type and lies channels-last;
        else a copy.
    """
    own = channels_last(gradient, dtype)
    return own.clone() if own is gradient and not sole_holder else own


def sole_holders(gradients: tuple[Tensor | None, ...]) -> list[bool]:
    """Of each gradient, whether nothing but the running backward can reach its memory.

    Call it from `backward(ctx, *gradients)` itself, with all of them, before anything else refers
    to one.
    """
    if torch.compiler.is_compiling():
        return [False] * len(gradients)
    return [counts in _SOLE_HOLDERS for counts in _count_holders(gradients)]


_Counts: TypeAlias = tuple[int, int, int, int]


def _count_holders(gradients: tuple[Tensor | None, ...]) -> list[_Counts | None]:
    """How many hold each tensor in Python and in C++, its memory, and what it is a view of."""
    return [
        None
        if gradient is None
        else (
            sys.getrefcount(gradient),
            gradient._use_count(),  # type: ignore[attr-defined]
            torch._C._storage_Use_Count(gradient.untyped_storage()._cdata),
            0 if gradient._base is None else sys.getrefcount(gradient._base),
        )
        for gradient in gradients
    ]


class _Probe(torch.autograd.Function):
    """Counts the holders of a gradient that it alone holds."""

    counts: _Counts | None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        (_Probe.counts,) = _count_holders(gradients)
        return gradients[0]


def _count_sole_holders() -> frozenset[_Counts | None]:
    counts = []
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(2, device="cpu", requires_grad=True)
        for use in (torch.square, lambda y: y.view(2, 1).square()):  # a tensor, and a view of one
            result = _Probe.apply(x)  # type: ignore[no-untyped-call]
            use(result).sum().backward()
            counts.append(_Probe.counts)
    return frozenset(counts)


_SOLE_HOLDERS: Final = _count_sole_holders()
