"""A trained run as it lies in its folder: the plan and the weights."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from effseg.errors import CheckpointError, PlanError
from effseg.networks import build_network
from effseg.plans import Plan
from effseg.record import PLAN, WEIGHTS


@dataclass(frozen=True)
class Run:
    """A plan and the network it describes, with trained weights, in eval mode on the CPU."""

    folder: Path
    plan: Plan
    network: nn.Module


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
