"""What a pass over windows takes, from a trace of it: nothing is allocated."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from effseg.devices import DeviceKind
from effseg.memory import trace_forward
from effseg.memory.host_workspace import HOST_BYTES
from effseg.networks import finest


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
    report = trace_forward(network, shape, autocast=autocast, device=kind)
    assert report.device_bytes is not None
    if kind == "cpu":
        return report.device_bytes - HOST_BYTES  # that is the process's own, not the pass's
    return max(report.peak_bytes, report.reserved_bytes or 0)


def pass_beside_others(passes: Sequence[int], weight_bytes: int) -> int:
    """Of several networks the pass that takes most, with the others' weights beside it.

    Args:
        passes: what a pass of each takes, its weights included.
        weight_bytes: of all networks, which are about equally large.
    """
    return max(passes) + weight_bytes * (len(passes) - 1) // len(passes)


def weight_bytes_of(networks: Sequence[nn.Module]) -> int:
    """Of the parameters of several networks."""
    return sum(p.numel() * p.element_size() for one in networks for p in one.parameters())


def count_outputs(network: nn.Module, shape: Sequence[int], *, device: torch.device) -> int:
    """How many channels a network makes of windows; one that cannot be traced is run once.

    Args:
        network: as of `traced_pass_bytes`; on the device.
        shape: of the windows, (N, C, z, y, x).
        device: where it runs.
    """
    found: list[int] = []
    try:
        trace_forward(_Counted(network, lambda n: found.append(n)), shape, device="cpu")
    except Exception:  # what a network cannot do without memory it may do with it
        with torch.inference_mode():
            found.append(finest(network(torch.zeros(shape, device=device))).shape[1])
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
