"""What this machine is good at: the device and the number type to train with."""

import statistics
import time

import torch

from effseg.devices import DeviceKind, Precision

RACES = 7
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
    CPU bfloat16 only where a convolution is faster in it, measured now.
    """
    if kind == "cuda":
        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            return "float16", "the card has no bfloat16"
        return "bfloat16", "tensor cores, with the range of float32"
    ratio = bfloat16_speedup()
    said = f"a convolution here is {ratio:.1f} times as fast in bfloat16 as in float32, measured"
    return ("bfloat16" if ratio >= WORTH else "float32"), said


def bfloat16_speedup() -> float:
    """Seconds in float32 over seconds in bfloat16, one convolution forward and backward, CPU.

    The median of several rounds, each of both in turn: a machine that is busy slows both alike.
    """
    _seconds(torch.float32), _seconds(torch.bfloat16)  # loads what is loaded once
    return statistics.median(
        _seconds(torch.float32) / _seconds(torch.bfloat16) for _ in range(RACES)
    )


def _seconds(dtype: torch.dtype) -> float:
    conv = torch.nn.Conv3d(32, 16, 3, padding=1, dtype=dtype)
    x = torch.ones(2, 32, 24, 24, 24, dtype=dtype).to(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    start = time.perf_counter()
    y = conv(x)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - start
