"""Parts of a network that stand still: no gradients, no statistics, no dropout."""

from collections.abc import Sequence

from torch import nn

from effseg.errors import PlanError
from effseg.plans import StartConfig


def set_frozen(network: nn.Module, parts: Sequence[str], *, frozen: bool) -> None:
    """Let parts stand still, or learn.

    What stands still needs no gradients and no optimizer's state, and where nothing before it
    learns, nothing of it is kept for backward. Its norms use their running statistics, where they
    have some, and leave them alone.

    Args:
        network: any.
        parts: module paths.
        frozen: whether they are to stand still.

    Raises:
        PlanError: if there is no such part, or it has no parameters.
    """
    for path in parts:
        module = _part(network, path)
        module.requires_grad_(requires_grad=not frozen)
        module.train(mode=not frozen)


def freeze_for_start(network: nn.Module, config: StartConfig) -> None:
    """Let the parts stand still that do at the start of a training.

    Raises:
        PlanError: if one is no part of the network, or nothing is left to learn.
    """
    for stage in config.thaw:
        for path in stage.parts:
            _part(network, path)
    set_frozen(network, config.freeze, frozen=True)
    if not any(p.requires_grad for p in network.parameters()):
        raise PlanError(
            "training.start.freeze leaves nothing to learn; name fewer parts of "
            f"{', '.join(name for name, _ in network.named_children())}"
        )


def _part(network: nn.Module, path: str) -> nn.Module:
    try:
        part = network.get_submodule(path)
    except AttributeError:
        part = None
    if not path or part is None or next(part.parameters(), None) is None:
        names = [
            name
            for name, module in network.named_modules()
            if 0 < len(name.split(".")) <= 2
            and name
            and next(module.parameters(), None) is not None
        ]
        raise PlanError(
            f"training.start: {path!r} is no part of {type(network).__name__} with weights; "
            f"expected one of {', '.join(names)}, or a part of these"
        )
    return part
