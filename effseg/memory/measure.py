"""Measures what a call takes, by running it."""

from collections.abc import Callable
from dataclasses import replace

import torch

from effseg.memory.cuda_workspace import bytes_beyond_allocator
from effseg.memory.report import MemoryReport
from effseg.memory.tracker import ACCELERATOR, MemoryTracker


def measure_peak(fn: Callable[[], object]) -> MemoryReport:
    """Run `fn` once and count the bytes of all tensors that live meanwhile.

    On the CPU every number is the bytes of tensors; a kernel's own scratch space is not among them.
    As soon as `fn` works on CUDA only that device is reported: `peak_bytes` and `reserved_bytes`
    are what its allocator says, scratch space and rounding included, and `device_bytes` what the
    card holds, other processes included; the other numbers stay bytes of tensors. What the
    allocator keeps of earlier calls is given back to the card before.

    What existed before and is used by `fn`, or belongs to a module that `fn` calls, counts as
    living from the start on. Make the batch outside of `fn`: what is made inside and kept for
    backward counts among `saved_bytes`.

    Args:
        fn: typically one training step, `loss(net(x)).backward()`. What it returns is dropped at
            once.

    Returns:
        The report; all zero where `fn` runs no operator.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    tracker = MemoryTracker()
    with tracker:
        fn()
    report = tracker.report()
    if tracker.place == ACCELERATOR and torch.cuda.is_initialized():
        report = _by_allocator(report)
    return report


def _by_allocator(report: MemoryReport) -> MemoryReport:
    """The report with the numbers of CUDA's allocator, of all cards that it has used."""
    reserved = {
        device: n_bytes
        for device in range(torch.cuda.device_count())
        if (n_bytes := torch.cuda.max_memory_reserved(device))
    }
    beyond = sum(bytes_beyond_allocator(device) for device in reserved)
    return replace(
        report,
        peak_bytes=sum(torch.cuda.max_memory_allocated(device) for device in reserved),
        reserved_bytes=sum(reserved.values()),
        device_bytes=sum(reserved.values()) + beyond,
    )
