"""Predicts what a training step takes, by tracing it on hollow tensors: nothing is allocated."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from effseg.devices import DeviceKind
from effseg.errors import PlanError
from effseg.memory.cuda_rules import CudaRules
from effseg.memory.cuda_workspace import CudaCard
from effseg.memory.hollow import HollowFunctions, HollowMode, hollow, hollow_empty
from effseg.memory.host_workspace import HOST_BYTES, HostWorkspace
from effseg.memory.report import MemoryReport
from effseg.memory.shapes import UnknownValueError
from effseg.memory.simulated import SimulatedCard
from effseg.memory.tracker import MemoryTracker
from effseg.memory.work import Work


def trace_peak(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    loss: Callable[..., Tensor] | None = None,
    label_shape: Sequence[int] | None = None,
    label_dtype: torch.dtype = torch.int64,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    autocast: torch.dtype | None = None,
    device: DeviceKind = "cuda",
    card: CudaCard | None = None,
) -> MemoryReport:
    """Predict the memory of one training step: forward, loss, backward, optimizer.

    The step is one in the middle of a training: the optimizer's state exists, the gradients of
    the step before are gone, and the network's output is held no longer than loss and backward
    need it. It runs on a copy of the module whose tensors hold no memory, in the mode (train or
    eval) the module is in.

    With `device="cpu"` tensor bytes equal, to the byte, what `measure_peak` counts for the same
    step, and `device_bytes` is what the process then takes of the system within `mapped_blocks`:
    convolutions' own copies, and a few MiB. With "cuda" autocast follows CUDA's rules, an optimizer
    that leaves `foreach` open takes it, kernels take their workspaces, and CUDA's caching allocator
    is simulated, over this step and the next: `reserved_bytes` is what it then holds.

    Args:
        module: any network that takes one tensor; its weights may lie anywhere, on "meta" too.
        input_shape: of the whole batch, (N, C, *S). Its type is that of the first floating
            parameter.
        loss: called with the network's output, and with the labels where `label_shape` is given;
            returns a scalar. None: the mean of the output; for several outputs (a list, a tuple, a
            dict) the sum of their means.
        label_shape: of the whole batch's labels, (N, *S) for one.
        label_dtype: of the labels.
        optimizer: makes an optimizer of parameters, `functools.partial(torch.optim.AdamW,
            lr=1e-3)`. None: the step ends with the gradients.
        autocast: the lower type of mixed precision; None: off.
        device: whose rules to follow.
        card: the CUDA card that is meant; None: a Hopper card.

    Returns:
        The report; the batch counts in its peak.

    Raises:
        PlanError: if a shape has a length below one, the loss is no scalar or hangs on no
            parameter, the network looks at values (`.item()`, boolean indexing), which a trace
            does not have, or it is compiled.
    """
    _check_shapes(input_shape, label_shape)
    _check_not_compiled(module)
    simulated = SimulatedCard(card or CudaCard()) if device == "cuda" else None
    host = HostWorkspace() if device == "cpu" else None
    with _hollow_world(module, device, simulated, host) as tracker:
        net = _hollow_copy(module)
        batch = hollow_empty(tuple(input_shape), _input_dtype(net))
        labels = [] if label_shape is None else [hollow_empty(tuple(label_shape), label_dtype)]
        tracker.adopt((*net.parameters(), *net.buffers(), batch, *labels))
        stepper = None if optimizer is None else optimizer(net.parameters())
        start = _requests(simulated)
        with tracker:
            with _autocast(autocast, device):
                value = (loss or mean_of_outputs)(net(batch), *labels)
                _check_loss(value)
            value.backward()
            del value
            stop = resume = _requests(simulated)
            if stepper is not None:
                if device == "cuda":
                    _prefer_foreach(stepper)
                stepper.step()
                tracker.settle()
                resume = _requests(simulated)
                stepper.step()
        report = tracker.report()
        if simulated is not None:
            net.zero_grad()
            # the next step, beside an optimizer's state that lies where activations lay before
            simulated.repeat(slice(start, stop), slice(resume, None))
            report = _on_card(report, simulated)
        if host is not None:
            report = _on_host(report, tracker, host)
    return report


def trace_forward(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    autocast: torch.dtype | None = None,
    device: DeviceKind = "cuda",
    card: CudaCard | None = None,
) -> MemoryReport:
    """Predict the memory of one pass without gradients, the module in eval mode.

    Args:
        module: any network that takes one tensor.
        input_shape: of the whole batch, (N, C, *S).
        autocast: the lower type of mixed precision; None: off.
        device: whose rules to follow.
        card: the CUDA card that is meant; None: a Hopper card.

    Returns:
        The report; parameters and the batch count in its peak.

    Raises:
        PlanError: as `trace_peak`.
    """
    _check_shapes(input_shape, None)
    _check_not_compiled(module)
    simulated = SimulatedCard(card or CudaCard()) if device == "cuda" else None
    host = HostWorkspace() if device == "cpu" else None
    with _hollow_world(module, device, simulated, host) as tracker, torch.no_grad():
        net = _hollow_copy(module).eval()
        batch = hollow_empty(tuple(input_shape), _input_dtype(net))
        tracker.adopt((*net.parameters(), *net.buffers(), batch))
        with tracker, _autocast(autocast, device):
            net(batch)
    report = tracker.report()
    if host is not None:
        return _on_host(report, tracker, host)
    assert simulated is not None
    return _on_card(report, simulated)


def _requests(simulated: SimulatedCard | None) -> int:
    return 0 if simulated is None else simulated.n_requests


def _on_card(report: MemoryReport, simulated: SimulatedCard) -> MemoryReport:
    return replace(
        report, reserved_bytes=simulated.reserved_bytes, device_bytes=simulated.device_bytes
    )


def _on_host(report: MemoryReport, tracker: MemoryTracker, host: HostWorkspace) -> MemoryReport:
    taken = tracker.working_bytes + HOST_BYTES + host.kept_bytes
    return replace(report, device_bytes=taken)


@contextmanager
def _hollow_world(
    module: nn.Module,
    device: DeviceKind,
    simulated: SimulatedCard | None,
    host: HostWorkspace | None,
) -> Iterator[MemoryTracker]:
    """Where new tensors are hollow, with a tracker; what needs values is refused by name."""
    tracker = MemoryTracker(card=simulated, scratch=host, work=Work())
    try:
        with torch.random.fork_rng(devices=()), HollowFunctions(), HollowMode(device=device):
            yield tracker
    except UnknownValueError as error:
        last = tracker.report().timeline[-1:]
        where = (last[0].module if last else "") or type(module).__name__
        raise PlanError(
            f"{where} cannot be traced: {error} needs values, or has no shape rule, and a trace "
            "has shapes alone; run it on real data in measure_peak(...) instead"
        ) from error


@contextmanager
def _autocast(dtype: torch.dtype | None, device: DeviceKind) -> Iterator[None]:
    """The device's rules for mixed precision."""
    with ExitStack() as rules:
        if dtype is not None:
            rules.enter_context(torch.autocast("cpu", dtype=dtype))
        if device == "cuda":
            rules.enter_context(CudaRules())
        yield


def _check_shapes(input_shape: Sequence[int], label_shape: Sequence[int] | None) -> None:
    for name, shape in (("input_shape", input_shape), ("label_shape", label_shape)):
        if shape is not None and any(length < 1 for length in shape):
            raise PlanError(f"{name} {tuple(shape)}; expected lengths of at least one voxel")


def _check_not_compiled(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise PlanError(
                f"{type(part).__name__} is compiled, and a trace follows torch's own operators; "
                "trace it before torch.compile, or run it in measure_peak(...)"
            )


def mean_of_outputs(output: Any) -> Tensor:
    """The mean of a tensor; the sum of the means of several."""
    means = [tensor.mean() for tensor in _floating(output)]
    if not means:
        raise PlanError(
            f"output {type(output).__name__}; expected floating tensors, or give a loss"
        )
    total = means[0]
    for mean in means[1:]:
        total = total + mean
    return total


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for part in output.values():
            yield from _floating(part)
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _floating(part)


def _hollow_copy(module: nn.Module) -> nn.Module:
    # Parameters copy themselves past the mode, so their copies are laid ready.
    ready: dict[int, Any] = {
        id(parameter): nn.Parameter(hollow(parameter), parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, ready)


def _input_dtype(net: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in net.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise PlanError(f"loss of {got}; expected a scalar tensor")
    if not value.requires_grad:
        raise PlanError("loss without a gradient; expected one that hangs on a parameter")


def _prefer_foreach(optimizer: Optimizer) -> None:
    """On CUDA an optimizer whose `foreach` is left open works on all tensors at once."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
