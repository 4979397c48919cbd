"""What moves the weights: AdamW or SGD, with slow weights around either."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from effseg.plans import LookaheadConfig, OptimizerConfig

SLOW = "slow"
"""In an optimizer's state of a weight: its slow one."""
STEPS = "lookahead_steps"
"""In an optimizer's first group: steps done."""


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """The optimizer that a configuration describes.

    Norms' gains and biases, whatever has one axis, are not decayed. Beside the weights live
    `numbers_kept(config)` numbers of each from the first step on.

    Args:
        parameters: of the network; those that stand still may be among them.
        config: kind, rate, decay, momentum, lookahead.
    """
    weights = list(parameters)
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate = config.learning_rate
    optimizer: Optimizer = (
        AdamW(groups, lr=rate)
        if config.kind == "adamw"
        else SGD(groups, lr=rate, momentum=config.momentum, nesterov=True)
    )
    if config.lookahead is not None:
        Lookahead(config.lookahead).attach(optimizer)
    return optimizer


def numbers_kept(config: OptimizerConfig) -> int:
    """How many numbers an optimizer keeps of each weight from step to step."""
    own = 2 if config.kind == "adamw" else 1
    return own + (config.lookahead is not None)


class Lookahead:
    """Slow weights around an optimizer.

    Every few steps the slow weights go a share of the way to the fast ones, the optimizer's, which
    go on from there. It acts by hooks of the optimizer, not as another one around it: what counts
    an optimizer's memory, keeps its state in a checkpoint or scales its gradients sees one
    optimizer. Moments are kept as they are where the weights are set back.

    Args:
        config: how often, and how far.

    Source: Zhang, Lucas, Hinton and Ba, "Lookahead optimizer: k steps forward, 1 step back", 2019,
    algorithm 1.
    """

    def __init__(self, config: LookaheadConfig) -> None:
        self.config = config
        self._starts: dict[Tensor, Tensor] = {}

    def attach(self, optimizer: Optimizer) -> None:
        """Act around each step of an optimizer from now on."""
        optimizer.param_groups[0].setdefault(STEPS, 0)
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Slow weights start where a weight is before its first step."""
        del args, kwargs
        self._starts = {
            weight: weight.detach().clone()
            for weight in _weights(optimizer)
            if weight.requires_grad and SLOW not in optimizer.state.get(weight, {})
        }

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        for weight, start in self._starts.items():
            # a weight without a gradient was not moved, and an optimizer takes a state that is
            # not empty for its own
            if weight.grad is not None:
                optimizer.state[weight][SLOW] = start
        self._starts = {}
        group = optimizer.param_groups[0]
        group[STEPS] += 1
        if group[STEPS] % self.config.steps:
            return
        for weight in _weights(optimizer):
            slow = optimizer.state.get(weight, {}).get(SLOW)
            if slow is not None:
                slow.lerp_(weight, self.config.share)
                weight.copy_(slow)


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]
