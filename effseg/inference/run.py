"""A trained run as it lies in its folder: the plan and the weights."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from effseg.devices import AUTOCAST, DeviceKind, is_present
from effseg.errors import CheckpointError, PlanError
from effseg.inference.headless import Headless, find_headless
from effseg.memory import trace_forward
from effseg.networks import build_network
from effseg.plans import Plan
from effseg.record import PLAN, WEIGHTS

logger = logging.getLogger("effseg")


@dataclass(frozen=True)
class Run:
    """A plan and the network it describes, with trained weights, in eval mode on the CPU."""

    folder: Path
    plan: Plan
    network: nn.Module
    _window_bytes: dict[DeviceKind, int] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def device(self) -> str:
        """Where it runs unless a call says otherwise: as planned, or on the CPU with a warning."""
        if is_present(self.plan.device):
            return self.plan.device
        logger.warning(
            "%s: planned for %s, which is not here; it runs on the CPU",
            self.folder,
            self.plan.device,
        )
        return "cpu"

    @cached_property
    def headless(self) -> Headless | None:
        """The network up to its head, where blending that takes less than blending logits."""
        shape = (1, len(self.plan.channels), *self.plan.patch_size)
        return find_headless(self.network, shape)

    @property
    def n_blended(self) -> int:
        """How many channels are blended: features below the head, or logits."""
        headless = self.headless
        return len(self.plan.labels) if headless is None else headless.conv.in_channels

    def window_bytes(self, kind: DeviceKind) -> int:
        """What one pass over a batch of windows takes at most, weights included; traced once."""
        if kind not in self._window_bytes:
            plan = self.plan
            shape = (plan.inference.window_batch, len(plan.channels), *plan.patch_size)
            report = trace_forward(
                self.headless or self.network,
                shape,
                autocast=AUTOCAST[plan.precision],
                device=kind,
            )
            self._window_bytes[kind] = report.peak_bytes
        return self._window_bytes[kind]


def load_run(folder: str | Path) -> Run:
    """Load a trained run.

    Raises:
        CheckpointError: if the folder is no run, has no weights yet, or they do not fit the plan.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such run; `effseg train` makes one")
    try:
        plan = Plan.load(folder / PLAN)
    except PlanError as error:
        raise CheckpointError(f"{folder}: not a run that can be used: {error}") from error
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS}: the run has not finished an epoch yet")
    network = build_network(plan.network)
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights}: cannot be read ({error}); train again") from error
    expected = network.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise CheckpointError(f"{weights}: no tensor {name}, which {PLAN}'s network has")
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{weights}: {name} has shape {tuple(state[name].shape)}; {PLAN}'s network "
                f"expects {tuple(tensor.shape)}"
            )
    extra = sorted(set(state) - set(expected))
    if extra:
        raise CheckpointError(f"{weights}: tensor {extra[0]} is not in {PLAN}'s network")
    network.load_state_dict(state)
    return Run(folder=folder, plan=plan, network=network.eval())
