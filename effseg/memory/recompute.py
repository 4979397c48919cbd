"""Runs a part of a network without keeping what it saves, and runs it again in backward."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from effseg.errors import PlanError
from effseg.memory.cuda_rules import CudaRules

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recompute(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward`, keep its inputs alone, and call it once more when backward comes to it.

    The second call draws the same random numbers, follows the same autocast, stops as soon as the
    last saved tensor is there, and leaves running statistics alone: torch's own checkpoint updates
    them a second time.

    Args:
        module: whose parts `forward` runs.
        forward: a function of tensors.
        args: of `forward`.
        kwargs: of `forward`.

    Raises:
        PlanError: if `forward` changes a buffer that is no norm's running statistic (a spectral
            norm does); the second call would start from the changed one and compute something else.
    """
    norms = [
        part
        for part in module.modules()
        if isinstance(part, _NormBase) and part.training and part.track_running_stats
    ]
    counted = {id(getattr(norm, name)) for norm in norms for name in STATISTICS}
    others = [
        (name, buffer, buffer._version)
        for name, buffer in module.named_buffers()
        if id(buffer) not in counted
    ]
    output = checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), SecondRun(norms)),
        **kwargs,
    )
    changed = [name for name, buffer, version in others if buffer._version != version]
    if changed:
        raise PlanError(
            f"{type(module).__name__} changes its buffer {changed[0]} in each forward and cannot "
            'be recomputed; "keep" it and name stages beside or inside it'
        )
    return output


class SecondRun:
    """The context of the second call; it can be entered again where backward runs again.

    Norms update copies of their running statistics. In a trace for CUDA, whose rules are a mode
    that backward knows nothing of, they hold once more.

    Args:
        norms: all of them training: they do not read the statistics that they update.
    """

    def __init__(self, norms: list[_NormBase]) -> None:
        self._norms = norms
        modes = _get_current_function_mode_stack()
        self._rules = [mode for mode in modes if isinstance(mode, CudaRules)]
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for mode in self._rules:
            self._stack.enter_context(mode)
        for norm in self._norms:
            buffers = {name: norm._buffers[name] for name in STATISTICS}
            self._stack.callback(norm._buffers.update, buffers)
            for name, buffer in buffers.items():
                norm._buffers[name] = None if buffer is None else buffer.clone()

    def __exit__(self, *error: object) -> None:
        self._stack.close()
