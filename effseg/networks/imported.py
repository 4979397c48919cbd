"""Networks of others, MONAI's or a user's own, made by the call that a plan names.

A plan is JSON, and a name in it is looked up and called. So only a class or a function is called
that has `in_channels` and `out_channels` among its parameters, and only a network may come of it;
its module is imported, as `import` does: take plans and runs from those whose code you would run.
"""

import difflib
import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from effseg.errors import PlanError
from effseg.plans import ImportedNetwork

SHORT_NAMES = {"monai": "monai.networks.nets"}
"""Modules whose networks go by a shorter name."""
CHANNELS = ("in_channels", "out_channels")
SPATIAL_DIMS = 3


def build_imported(config: ImportedNetwork) -> nn.Module:
    """The network that a plan names, with fresh weights on the CPU.

    Raises:
        PlanError: if its module cannot be imported, holds no such name, what is there makes no
            network for channels, or the call fails.
    """
    place = f"network {config.build}"
    make = maker_of(config.build)
    given: dict[str, Any] = dict(
        zip(CHANNELS, (config.in_channels, config.out_channels), strict=True)
    )
    if "spatial_dims" in _parameters(make):
        given["spatial_dims"] = SPATIAL_DIMS
    if taken := sorted(set(given) & set(config.arguments)):
        raise PlanError(f"{place}: network.arguments has {taken[0]}, which the plan itself gives")
    try:
        # a network may look at numbers while it is made, which the meta device does not have
        with torch.device("cpu"):
            network = make(**given, **config.arguments)
    except Exception as error:
        raise PlanError(
            f"{place}: {_said(error)}; called with {given | config.arguments}: correct "
            "network.arguments"
        ) from error
    if not isinstance(network, nn.Module):
        raise PlanError(f"{place}: made a {type(network).__name__}; expected a torch.nn.Module")
    return network


def maker_of(build: str) -> Callable[..., Any]:
    """What makes a network, found by its module and name; it is not called.

    Raises:
        PlanError: if there is none, or it takes no channels.
    """
    place = f"network {build}"
    module_name, colon, name = build.partition(":")
    if not (module_name and colon and name):
        raise PlanError(f"{place}: expected module:name, such as monai:SegResNet")
    make = _found(_imported(module_name, place), name, place)
    missing = [parameter for parameter in CHANNELS if parameter not in _parameters(make)]
    if missing:
        raise PlanError(
            f"{place}: takes no {missing[0]}; expected a class or a function "
            f"{name}(in_channels, out_channels, ...) that makes a network"
        )
    return make


def why_whole(network: nn.Module) -> str | None:
    """Why samples of a batch may not go through a network one after the other; None: they may.

    Looked for are torch's own layers: batch norm, which makes samples see each other, and dropout,
    which would drop the same of each sample. Dropout of `DenseBlock` is told of the batch
    (`one_of_batch`).
    """
    for part in network.modules():
        if isinstance(part, _BatchNorm):
            return "batch norm needs it whole"
        if isinstance(part, _DropoutNd) and part.p > 0:
            return "dropout draws for it as a whole"
    return None


def _imported(module_name: str, place: str) -> ModuleType:
    full_name = SHORT_NAMES.get(module_name, module_name)
    try:
        return import_module(full_name)
    except Exception as error:  # whatever the module's own code raises
        raise PlanError(
            f"{place}: module {full_name} cannot be imported ({_said(error)}); install it, or put "
            "its folder on PYTHONPATH"
        ) from error


def _found(module: ModuleType, name: str, place: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    names = [known for known in vars(module) if not known.startswith("_")]
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"; close are {', '.join(near)}" if near else ""
    raise PlanError(f"{place}: no class or function {name} in module {module.__name__}{hint}")


def _parameters(make: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(make).parameters)
    except (TypeError, ValueError):  # of some that are written in C
        return ()


def _said(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
