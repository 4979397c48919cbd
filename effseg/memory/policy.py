"""Recomputation and offloading of any network's stages, set from outside and taken off again."""

import difflib
import weakref
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from effseg.errors import PlanError
from effseg.memory.offload import offload
from effseg.memory.recompute import recompute

Policy: TypeAlias = Literal["keep", "recompute", "offload"]


def apply_policy(network: nn.Module, policies: Mapping[str, Policy]) -> dict[str, Policy]:
    """Say of stages of a network what becomes of the tensors that they save for backward.

    "keep": nothing is changed. "recompute": the stage keeps its inputs and runs again in backward.
    "offload": what lives only for backward goes to the host meanwhile; on the CPU it is there
    already.

    A policy acts in training mode while gradients are enabled; without them, and in eval mode, a
    stage runs as it is. Numbers, running statistics, dropout, names of parameters, the state dict
    and the classes stay the same, and `copy.deepcopy` and pickle take the policies along. A stage
    is a module that is called and does nothing but compute its outputs.

    In an offloaded stage a recomputed one sends its inputs to the host; in a recomputed stage a
    recomputed one lowers the peak of backward.

    Args:
        network: any module; it is changed in place.
        policies: by the path of a stage, as `named_modules` gives it, with `*`, `?` and `[...]`
            within a name: "up_layers.*" are the parts of `up_layers` and not their parts. "" is the
            network as a whole. The last one that matches wins; stages that none matches stay as
            they are.

    Returns:
        The stages under a policy from now on, in the network's order.

    Raises:
        PlanError: if a path matches no module that can be called, a policy is unknown, or an
            offloaded stage would lie in a recomputed one. The network is untouched then.
    """
    wanted = stage_policies(network)
    for pattern, policy in policies.items():
        if policy not in get_args(Policy):
            raise PlanError(
                f'{pattern!r}: policy {policy!r}; expected "keep", "recompute" or "offload"'
            )
        wanted |= dict.fromkeys(_match(network, pattern), policy)
    _check_nesting(network, wanted)
    replace_policies(network, wanted)
    return stage_policies(network)


def remove_policy(network: nn.Module) -> None:
    """Take all policies off: every stage runs as its class says."""
    replace_policies(network, {})


class StageForward:
    """A module's forward under a policy; it stands on the module, before that of its class.

    The module is held weakly, or each network would be a cycle that lives until it is collected.

    Args:
        module: the stage.
        policy: what becomes of what it saves.
        inner: the forward that stood on the module before; None for its class's.
    """

    def __init__(
        self, module: nn.Module, policy: Policy, inner: Callable[..., Any] | None = None
    ) -> None:
        self._module = weakref.ref(module)
        self.policy = policy
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage."""
        module = self._module()
        assert module is not None
        forward = self.inner or type(module).forward.__get__(module)
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        run = recompute if self.policy == "recompute" else offload
        return run(module, forward, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deepcopy make a new one for the module's copy."""
        return StageForward, (self._module(), self.policy, self.inner)


def stage_policies(network: nn.Module) -> dict[str, Policy]:
    """The stages that are under a policy, by path, in the network's order."""
    found = {}
    for path, module in network.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, StageForward):
            found[path] = forward.policy
    return found


def replace_policies(network: nn.Module, policies: Mapping[str, Policy]) -> None:
    """Put these policies in the place of all that there are."""
    for path in stage_policies(network):
        _set(network.get_submodule(path), "keep")
    for path, policy in policies.items():
        _set(network.get_submodule(path), policy)


def _set(module: nn.Module, policy: Policy) -> None:
    attributes = vars(module)
    inner = attributes.get("forward")
    if isinstance(inner, StageForward):
        inner = inner.inner
    if policy != "keep":
        attributes["forward"] = StageForward(module, policy, inner)
    elif inner is not None:
        attributes["forward"] = inner
    else:
        attributes.pop("forward", None)


def can_run(module: nn.Module) -> bool:
    """Whether a module is called, or only holds its parts (`nn.ModuleList`)."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _match(network: nn.Module, pattern: str) -> list[str]:
    """The first path of each module that can be called and one of whose paths matches."""
    first = {module: path for path, module in network.named_modules()}
    every = list(network.named_modules(remove_duplicate=False))
    matched = [module for path, module in every if _fits(path, pattern)]
    if not matched:
        close = difflib.get_close_matches(pattern, [path for path, _ in every], n=3, cutoff=0.5)
        hint = f"; close are {', '.join(map(repr, close))}" if close else ""
        raise PlanError(f"{pattern!r} is no module of {type(network).__name__}{hint}")
    stages = [first[module] for module in matched if can_run(module)]
    if not stages:
        raise PlanError(
            f"{pattern!r} is a {type(matched[0]).__name__}, which is never called; its parts are "
            f"{pattern + '.*'!r}"
        )
    return stages


def _fits(path: str, pattern: str) -> bool:
    names, wanted = (text.split(".") if text else [] for text in (path, pattern))
    return len(names) == len(wanted) and all(map(fnmatchcase, names, wanted))


def _check_nesting(network: nn.Module, policies: dict[str, Policy]) -> None:
    for outer in (path for path, policy in policies.items() if policy == "recompute"):
        inside = set(network.get_submodule(outer).modules())
        for inner, policy in policies.items():
            if policy == "offload" and network.get_submodule(inner) in inside:
                raise PlanError(
                    f'{inner!r}: "offload" inside of {outer!r}: "recompute", which keeps nothing '
                    "that could go to the host; offload the outer one and recompute the inner"
                )
