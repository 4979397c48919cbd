"""What this machine is good at: the device and the number type to train with."""

import torch

from effseg.devices import DeviceKind, Precision
from effseg.planner.rates import machine_rates

WORTH = 1.2
"""bfloat16 must be this much faster on a CPU before its lower precision is taken."""


def choose_device(device: str | None) -> tuple[str, str]:
    """The device to plan for, and why; one that is asked for need not be here."""
    if device is not None:
        return device, "as asked"
    if torch.cuda.is_available():
        return "cuda", "torch sees a CUDA device"
    return "cpu", "torch sees no CUDA device"


def choose_precision(kind: DeviceKind) -> tuple[Precision, str]:
    """The number type to compute in, and why.

    On CUDA bfloat16 where the card has it; a plan for a card that is not here takes it too. On a
    CPU bfloat16 only where a convolution is faster in it, each measured at its best (`rates`).
    """
    if kind == "cuda":
        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            return "float16", "the card has no bfloat16"
        return "bfloat16", "tensor cores, with the range of float32"
    brief, full = (machine_rates(kind, one).flops for one in ("bfloat16", "float32"))
    ratio = brief / full
    said = f"a convolution here is {ratio:.1f} times as fast in bfloat16 as in float32, measured"
    return ("bfloat16" if ratio >= WORTH else "float32"), said
