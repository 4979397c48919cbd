"""A trained run as it lies in its folder: the plan and the weights."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from effseg.devices import AUTOCAST, DeviceKind, is_present
from effseg.errors import CheckpointError, PlanError
from effseg.inference.headless import Headless, find_headless
from effseg.inference.pace import Pace
from effseg.inference.tracing import traced_pass_bytes
from effseg.networks import build_network, own_state
from effseg.plans import Plan
from effseg.record import PLAN, WEIGHTS

logger = logging.getLogger("effseg")


@dataclass(frozen=True)
class Run:
    """A plan and the network it describes, with trained weights, in eval mode on the CPU."""

    folder: Path
    plan: Plan
    network: nn.Module
    _window_bytes: dict[tuple[DeviceKind, int], int] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    _paces: dict[tuple[object, ...], Pace] = field(
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

    def pace(self, manner: tuple[object, ...]) -> Pace:
        """What was found of how many windows a pass should take, in a manner of passing them."""
        return self._paces.setdefault(manner, Pace())

    def window_bytes(self, kind: DeviceKind, n: int) -> int:
        """What one pass over so many windows takes at most, weights included; traced once.

        On a CUDA device with what its allocator keeps for itself.
        """
        plan = self.plan
        if (kind, n) not in self._window_bytes:
            self._window_bytes[kind, n] = traced_pass_bytes(
                self.headless or self.network,
                (n, len(plan.channels), *plan.patch_size),
                autocast=AUTOCAST[plan.precision],
                kind=kind,
            )
        return self._window_bytes[kind, n]


Runs: TypeAlias = str | Path | Run | Sequence[str | Path | Run]
"""A run or several, loaded or where they lie."""


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
    expected = own_state(network)
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
    network.load_state_dict(state, strict=False)  # names agree; see own_state
    return Run(folder=folder, plan=plan, network=network.eval())


def load_runs(run: Runs) -> tuple[Run, ...]:
    """The runs that are meant, loaded.

    Raises:
        CheckpointError: if one cannot be loaded, or they do not belong together.
    """
    given = [run] if isinstance(run, str | Path | Run) else list(run)
    runs = tuple(one if isinstance(one, Run) else load_run(one) for one in given)
    if not runs:
        raise CheckpointError("no run; expected one or more")
    for name in ("patch_size", "spacing", "channels", "labels"):
        ours = getattr(runs[0].plan, name)
        for other in runs[1:]:
            theirs = getattr(other.plan, name)
            if theirs != ours:
                raise CheckpointError(
                    f"{runs[0].folder} and {other.folder} differ in {name}, {ours} vs {theirs}; "
                    "only runs of one plan, such as folds, can be averaged"
                )
    return runs
