"""Which module and which phase the operator that runs right now belongs to."""

import weakref
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from effseg.memory.report import Phase

NO_NUMBER = 2**63
"""Nodes that accumulate into `.grad` are numbered from here on, so that they run first."""


class Whereabouts:
    """Follows modules and optimizers by their hooks while it is entered.

    Forward belongs to the innermost module. In backward an operator belongs to the module whose
    forward made the autograd node that runs it: nodes are numbered as they are made, so each
    stretch of numbers has its module, and no hook needs to touch the graph.

    Args:
        on_module: called with each outermost module before it first runs.
        on_optimizer: called with each optimizer before it steps.
    """

    def __init__(
        self, *, on_module: Callable[[nn.Module], None], on_optimizer: Callable[[Optimizer], None]
    ) -> None:
        self._on_module = on_module
        self._on_optimizer = on_optimizer
        self._modules: list[nn.Module] = []
        self._paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._last_owner = ""
        self._numbers: list[int] = []
        self._owners: list[str] = []
        self._stack = ExitStack()
        self.optimizing = False

    def now(self) -> tuple[str, Phase]:
        """The module's path, empty outside of any, and the phase."""
        if self.optimizing:
            return "", "optimizer"
        node = torch._C._current_autograd_node()
        if node is None:
            self._last_owner = ""
            return self._inside(), "forward"
        if self._modules:  # recomputed by a checkpoint
            return self._inside(), "backward"
        number = node._sequence_nr()
        if number < NO_NUMBER:  # else the node goes on with the last one's module
            index = bisect_right(self._numbers, number) - 1
            self._last_owner = self._owners[index] if index >= 0 else ""
        return self._last_owner, "backward"

    def _inside(self) -> str:
        return self._paths[self._modules[-1]] if self._modules else ""

    def _number(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(self._inside())

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        del args
        if module not in self._paths:
            name = type(module).__name__
            name = f"{self._inside()}.{name}" if self._modules else name
            for path, part in module.named_modules(prefix=name):
                self._paths.setdefault(part, path)
            self._on_module(module)
        self._modules.append(module)
        self._number()

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        del args, output
        while self._modules and self._modules.pop() is not module:
            pass
        self._number()

    def _enter_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self._on_optimizer(optimizer)
        self.optimizing = True

    def _leave_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self.optimizing = False

    def __enter__(self) -> Self:
        """Set the hooks."""
        hooks = (
            register_module_forward_pre_hook(self._enter_module),
            # a checkpoint that stops its recomputation early leaves modules by an exception
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        )
        for hook in hooks:
            self._stack.callback(hook.remove)
        return self

    def __exit__(self, *error: object) -> None:
        """Take the hooks away."""
        self._stack.close()
