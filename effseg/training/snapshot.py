"""The state of a training in one file: tensors, and all else as JSON beside them.

Nothing that is read here runs code: no pickle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from effseg.errors import CheckpointError
from effseg.files import written_whole

State: TypeAlias = Any
"""Dicts with keys of text or numbers, lists, tuples, tensors, and what JSON has."""

ENTRY = "state"


def save_snapshot(path: Path, state: Mapping[str, State]) -> None:
    """Write a state; the file appears whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_flat(state, tensors))
    try:
        with written_whole(path) as partial:
            save_file(tensors, partial, metadata={ENTRY: tree})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def load_snapshot(path: Path) -> dict[str, State]:
    """Read a state as it was saved, tensors on the CPU.

    Raises:
        CheckpointError: if the file is damaged, or is no snapshot.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})[ENTRY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state: dict[str, State] = _whole(tree, tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no state of a training that can be read ({error}); train again in a new "
            "folder"
        ) from error
    return state


def _flat(part: State, tensors: dict[str, Tensor]) -> State:
    """JSON in which a tensor is its name; a dict is its items, since keys may be numbers."""
    if isinstance(part, Tensor):
        name = str(len(tensors))
        # a copy: two names of one storage are refused
        tensors[name] = part.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(part, Mapping):
        return {"items": [[key, _flat(value, tensors)] for key, value in part.items()]}
    if isinstance(part, tuple):
        return {"tuple": [_flat(value, tensors) for value in part]}
    if isinstance(part, list):
        return [_flat(value, tensors) for value in part]
    return part


def _whole(part: State, tensors: Mapping[str, Tensor]) -> State:
    if isinstance(part, list):
        return [_whole(value, tensors) for value in part]
    if not isinstance(part, dict):
        return part
    kind, content = next(iter(part.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_whole(value, tensors) for value in content)
    return {key: _whole(value, tensors) for key, value in content}


def random_state(device: torch.device) -> dict[str, State]:
    """Where torch's random numbers are, on the host and on a card."""
    card = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"host": torch.get_rng_state(), "card": card}


def restore_random(state: Mapping[str, State], device: torch.device) -> None:
    """Go back there; on another kind of device the host's alone."""
    torch.set_rng_state(state["host"])
    if device.type == "cuda" and state["card"] is not None:
        torch.cuda.set_rng_state(state["card"], device)
