"""What a training starts from: weights of another run, by name and shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from effseg.errors import CheckpointError
from effseg.record import WEIGHTS

MOST_NAMES = 6
"""Of tensors, in a sentence."""


@dataclass(frozen=True)
class Loaded:
    """What became of a file of weights.

    Attributes:
        source: the file.
        matched: names of tensors that were taken.
        unused: of the file, without a place in the network.
        fresh: of the network, not in the file or of another shape there.
    """

    source: Path
    matched: tuple[str, ...]
    unused: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        n_all = len(self.matched) + len(self.fresh)
        return (
            f"{len(self.matched)} of {n_all} tensors start from {self.source}; "
            f"fresh: {_named(self.fresh)}; not used: {_named(self.unused)}"
        )


def load_weights(network: nn.Module, source: str | Path) -> Loaded:
    """Copy weights into a network, where name and shape agree.

    Args:
        network: what does not match in it stays as it is.
        source: a run's folder or a file of tensors.

    Raises:
        CheckpointError: if there is no such file, it cannot be read, or nothing in it matches.
    """
    path = Path(source)
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; expected the folder of a run, or a file of weights such as "
            f"its {WEIGHTS}"
        )
    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected safetensors") from error
    own = network.state_dict()
    matched = {n: t for n, t in given.items() if n in own and t.shape == own[n].shape}
    if not matched:
        raise CheckpointError(
            f"{path}: none of its {len(given)} tensors has name and shape of one of the network's "
            f"{len(own)}, {_described(given)} vs {_described(own)}; take weights of a network of "
            "this kind"
        )
    network.load_state_dict(matched, strict=False)
    return Loaded(
        source=path,
        matched=tuple(matched),
        unused=tuple(name for name in given if name not in matched),
        fresh=tuple(name for name in own if name not in matched),
    )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(names[:MOST_NAMES]) or "none") + more


def _described(tensors: dict[str, Tensor]) -> str:
    name, tensor = next(iter(tensors.items()), ("nothing", None))
    return name if tensor is None else f"{name} {tuple(tensor.shape)}"
