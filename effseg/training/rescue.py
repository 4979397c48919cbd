"""What becomes of a step that ran out of memory: it is done again with less.

A plan is made to fit, but another process may take the card, or the system's memory. The step then
starts over as it was, one rung further down: more recomputed first, then the samples of a batch
one after the other. The optimizer sees the same gradients, to rounding.
"""

import logging
import re
import traceback
from collections.abc import Callable
from datetime import datetime
from typing import Any, Self

import torch
from torch import Tensor, nn

from effseg.errors import MemoryBudgetError
from effseg.memory import apply_policy, give_back_memory, outermost_parts, stage_policies
from effseg.networks import DenseUNet, why_whole
from effseg.record import RunEvent
from effseg.training.step import BatchLoss, RandomState, SampleBySample, Step, WholeBatch

logger = logging.getLogger("effseg")

LASTING = "from now on "

STAGES = ("encoder", "decoder", "up", "down")
"""Of a `DenseUNet`: all that saves much, in parts none of which lies in another."""

WORDS = (
    "can't allocate memory",  # torch on Linux
    "not enough memory",  # torch on Windows
    "std::bad_alloc",
    "could not create a memory",  # oneDNN
    "could not create a primitive",  # oneDNN, of its scratch
    "CUDA out of memory",  # in a worker's or a wrapped error
)
"""In a RuntimeError, that memory was refused."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was refused, by a device or the system.

    oneDNN gives no reason: what it could not create in a step that ran before, it had no memory
    for. "could not create a primitive descriptor" is another matter, an operator it does not have.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and "primitive descriptor" not in text
        and any(words in text for words in WORDS)
    )


class Rescue:
    """Runs steps of a training, and runs one again that was refused memory.

    Args:
        network: that is trained; recomputation is raised on its stages.
        batch_loss: of its outputs.
        batch_size: samples of a batch.
        split: whether its samples go one after the other from the start.

    Attributes:
        step: how a batch becomes gradients now.
        events: what happened so far.
    """

    def __init__(
        self, network: nn.Module, batch_loss: BatchLoss, *, batch_size: int, split: bool = False
    ) -> None:
        self.network = network
        self.batch_loss = batch_loss
        self.batch_size = batch_size
        self.step: Step = (SampleBySample if split else WholeBatch)(network, batch_loss)
        self.events: list[RunEvent] = []

    def run(self, closure: Callable[[], Any], *, epoch: int, step: int) -> Any:
        """Call what computes a step's gradients until it gets through.

        Args:
            closure: forward and backward; called again from the state before: random numbers,
                buffers of network and loss, no gradients.
            epoch: from 0, for the record.
            step: from 0, for the record.

        Returns:
            What `closure` returns.

        Raises:
            MemoryBudgetError: if there is nothing left to change.
        """
        start = _Start.of(self.network, self.batch_loss)
        while True:
            try:
                return closure()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                asked = first_line(error)
                _drop_frames(error)
            # the error is gone here, and what its frames held with it
            self.network.zero_grad(set_to_none=True)
            give_back_memory()
            changed = self._less()
            self._note(asked, changed or "nothing was left to change", epoch=epoch, step=step)
            if changed is None:
                raise MemoryBudgetError(self._refusal(asked, step))
            start.restore()

    def _note(self, asked: str, changed: str, *, epoch: int, step: int) -> None:
        when = datetime.now().replace(microsecond=0)
        self.events.append(
            RunEvent(epoch=epoch, step=step, when=when, asked=asked, changed=changed)
        )
        logger.warning("step %d ran out of memory (%s): %s", step, asked, changed)

    def _less(self) -> str | None:
        """Take less memory from now on; what was changed, or None where nothing is left."""
        stages = self._stages_kept()
        if stages:
            apply_policy(self.network, dict.fromkeys(stages, "recompute"))
            return f"{LASTING}{len(stages)} more stages are recomputed in backward"
        if self._may_split() and isinstance(self.step, WholeBatch):
            self.step = SampleBySample(self.network, self.batch_loss)
            return f"{LASTING}{self.batch_size} samples of a batch go one after the other"
        return None

    def _stages_kept(self) -> list[str]:
        """The outermost stages that keep what they save, and have none within that is offloaded."""
        policies = stage_policies(self.network)
        offloaded = [path for path, policy in policies.items() if policy == "offload"]
        stages = (
            [
                f"{name}.{part}"
                for name in STAGES
                for part, _ in self.network.get_submodule(name).named_children()
            ]
            if isinstance(self.network, DenseUNet)
            else outermost_parts(self.network)
        )
        return [
            path
            for path in stages
            if policies.get(path, "keep") == "keep"
            and not any(inner.startswith(f"{path}.") for inner in offloaded)
        ]

    def _may_split(self) -> bool:
        return self.batch_size > 1 and why_whole(self.network) is None

    def _refusal(self, asked: str, step: int) -> str:
        tried = [event.changed.removeprefix(LASTING) for event in self.events[:-1]]
        if not self._may_split():
            one = "the batch is one sample"
            why = one if self.batch_size == 1 else why_whole(self.network)
            tried.append(f"the batch cannot be split: {why}")
        return (
            f"step {step} ran out of memory ({asked}) and nothing is left to change"
            f"{': ' if tried else ''}{'; '.join(tried)}: free memory that others hold, "
            "or plan again with a smaller --memory"
        )


class _Start:
    """A step's start: random numbers, and the buffers of network and loss."""

    def __init__(self, random: RandomState, buffers: dict[Tensor, Tensor]) -> None:
        self._random, self._buffers = random, buffers

    @classmethod
    def of(cls, network: nn.Module, loss: BatchLoss) -> Self:
        device = next(network.parameters()).device
        modules = [network, *([loss] if isinstance(loss, nn.Module) else [])]
        buffers = {buffer: buffer.clone() for module in modules for buffer in module.buffers()}
        return cls(RandomState.of(device), buffers)

    @torch.no_grad()
    def restore(self) -> None:
        self._random.restore()
        for buffer, value in self._buffers.items():
            buffer.copy_(value)


def _drop_frames(error: BaseException) -> None:
    """Clear the frames that an error came through: they hold the graph that is to go."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    error.__traceback__ = None


def first_line(error: BaseException) -> str:
    """What was asked for, as the error has it, without where and the advice that follows."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^\[enforce fail .*?(?=\w+Allocator)", "", lines[0] if lines else repr(error))
