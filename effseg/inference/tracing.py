"""What a pass over windows takes, from a trace of it: nothing is allocated."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from effseg.devices import DeviceKind
from effseg.inference.headless import Headless, finest
from effseg.memory import trace_forward


def traced_pass_bytes(
    network: nn.Module,
    shape: Sequence[int],
    *,
    autocast: torch.dtype | None,
    kind: DeviceKind,
) -> int:
    """What a pass takes at most, weights, windows and the kernels' own copies included.

    Args:
        network: takes and returns what `Predictor` says.
        shape: of the windows, (N, C, z, y, x).
        autocast: the lower type of mixed precision; None: off.
        kind: of the device.

    Raises:
        PlanError: if the network cannot be traced.
    """
    copied = [0]
    # a function is not copied with the module that is traced
    watched = _Watched(network, lambda n_bytes: copied.append(n_bytes))
    report = trace_forward(watched, shape, autocast=autocast, device=kind)
    if kind == "cpu":
        # found on torch 2.10: one channel goes through columns of the kernel's size, several are
        # brought into another order first
        return report.peak_bytes + max(copied)
    return max(report.peak_bytes, report.reserved_bytes or 0)


def traced_outputs(network: nn.Module, shape: Sequence[int]) -> int:
    """How many channels a network makes of windows.

    Args:
        network: as of `traced_pass_bytes`.
        shape: of the windows, (N, C, z, y, x).

    Raises:
        PlanError: if the network cannot be traced.
    """
    found: list[int] = []
    trace_forward(_Counted(network, lambda n: found.append(n)), shape, device="cpu")
    return found[-1]


class _Counted(nn.Module):
    """A network that tells how many channels it makes."""

    def __init__(self, network: nn.Module, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.network = network
        self.tell = tell

    def forward(self, image: Tensor) -> Tensor:
        output = finest(self.network(image))
        self.tell(output.shape[1])
        return output


class _Watched(nn.Module):
    """A network that notes what its convolutions copy of what they read."""

    def __init__(self, network: nn.Module, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.network = network
        self.tell = tell

    def forward(self, image: Tensor) -> Tensor:
        def note(conv: nn.Conv3d, given: tuple[Tensor, ...]) -> None:
            n_columns = math.prod(conv.kernel_size) if conv.in_channels == 1 else 1
            self.tell(given[0].numel() * given[0].element_size() * n_columns)

        left_out = self.network.conv if isinstance(self.network, Headless) else None
        hooks = [
            module.register_forward_pre_hook(note)
            for module in self.network.modules()
            if isinstance(module, nn.Conv3d) and module is not left_out
        ]
        try:
            output: Tensor = self.network(image)
        finally:
            for hook in hooks:
                hook.remove()
        return output
