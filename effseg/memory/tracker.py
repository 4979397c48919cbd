"""Counts the bytes of all tensors that live, operator by operator and module by module.

The tracker stands where operators reach their kernels, below autograd and autocast. It meets the
storage of every tensor that goes in or comes out and hears when that storage dies; views share
their storage and count once. It never looks at a value, so real and hollow tensors are counted by
the same code, and a traced step equals a measured one to the byte.

What it cannot see is a kernel's own scratch space; in a trace that is reckoned: for a CUDA card it
counts as CUDA counts it, and each storage takes the block that CUDA's allocator would hand out; for
a CPU it stands in a figure of its own, `working_bytes`.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from effseg.memory.allocator import Block
from effseg.memory.report import MemoryEvent, MemoryReport, Phase
from effseg.memory.simulated import SimulatedCard
from effseg.memory.whereabouts import Whereabouts
from effseg.memory.work import Work

HOST, ACCELERATOR = 0, 1
"""Storages are counted apart; a report speaks of the accelerator as soon as it holds anything."""


class _Storage(weakref.ref[torch.UntypedStorage]):
    """A living storage, as it was counted."""

    __slots__ = (
        *("block", "inherited", "key", "length", "n_bytes", "optimizer", "place", "saved"),
    )

    block: Block | None
    key: int
    length: int
    n_bytes: int
    place: int
    inherited: bool
    optimizer: bool
    saved: bool


@dataclass(slots=True)
class _Stretch:
    """A timeline event in the making; bytes are relative to what was inherited.

    Attributes:
        working: the most on the host, operators' scratch included.
    """

    module: str
    phase: Phase
    start: list[int]
    peak: list[int]
    end: list[int]
    saved: int = 0
    working: int = 0


class MemoryTracker(TorchDispatchMode):
    """Counts while it is entered; once only.

    Tensors are *inherited* when they existed before: they are counted as living from the start on,
    whenever the first operator touches them, until they are freed. A storage that changes its
    length is counted anew when the next operator touches it. Python's collector of reference cycles
    rests meanwhile, so that garbage lives equally long in every run.

    Args:
        card: where all of this is meant to happen: storages take its blocks, and what its kernels
            need beside tensors counts. None: storages count by their length.
        scratch: what an operator takes on the host beside tensors, by name, arguments and result.
        work: counts what is computed and moved; None: not counted.
    """

    def __init__(
        self,
        *,
        card: SimulatedCard | None = None,
        scratch: Callable[[str, Sequence[Any], Any], int] | None = None,
        work: Work | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._card = card
        self._scratch = scratch
        self._work = self._work_before_optimizer = work
        self._storages: dict[int, _Storage] = {}
        self._inherited = [0, 0]
        self._relative = [0, 0]
        self._parameter_bytes = [0, 0]
        self._saved_now = 0
        self._saved_peak = 0
        self._stretches: list[_Stretch] = []
        self._whereabouts = Whereabouts(
            on_module=self._adopt_module, on_optimizer=self._adopt_optimizer
        )
        self._stack = ExitStack()

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Count these as inherited, whether an operator will touch them or not."""
        for tensor in tensors:
            self._meet(tensor, inherited=True)

    def settle(self) -> None:
        """Count what the optimizer made and kept as inherited, and forget the step that made it.

        With this, after an optimizer's first step, the timeline reads as that of a later one.
        """
        for storage in self._storages.values():
            if storage.optimizer and not storage.inherited:
                storage.inherited = True
                self._inherited[storage.place] += storage.n_bytes
                self._relative[storage.place] -= storage.n_bytes
        if self._stretches and self._stretches[-1].phase == "optimizer":
            self._stretches.pop()
            self._work = self._work_before_optimizer

    def _adopt_module(self, module: nn.Module) -> None:
        self.adopt(module.buffers())
        for parameter in module.parameters():
            self.adopt([parameter] if parameter.grad is None else [parameter, parameter.grad])

    def _adopt_optimizer(self, optimizer: Optimizer) -> None:
        self._work_before_optimizer = copy(self._work)
        for group in optimizer.param_groups:
            self.adopt(group["params"])

    def _meet(self, tensor: Tensor, *, inherited: bool) -> _Storage | None:
        if tensor.layout is not torch.strided:
            return None
        memory = tensor.untyped_storage()
        known = self._storages.get(id(memory))
        length = memory.nbytes()
        if known is not None:
            if length != known.length:
                self._resize(known, length)
            return known
        known = _Storage(memory, self._forget)
        known.key = id(memory)
        known.length = length
        known.block, known.n_bytes = self._take(length)
        n_bytes = known.n_bytes
        known.place = HOST if memory.device.type in ("cpu", "meta") else ACCELERATOR
        known.inherited = inherited
        known.saved = False
        known.optimizer = self._whereabouts.optimizing
        self._storages[known.key] = known
        if isinstance(tensor, nn.Parameter):
            self._parameter_bytes[known.place] += n_bytes
        if inherited:
            self._inherited[known.place] += n_bytes
        else:
            self._add(known.place, n_bytes)
        return known

    def _take(self, length: int) -> tuple[Block | None, int]:
        """The block for a storage of this length, and what it counts."""
        block = None if self._card is None else self._card.allocate(length)
        return block, length if block is None else block.n_bytes

    def _resize(self, storage: _Storage, length: int) -> None:
        block, n_bytes = self._take(length)
        if self._card is not None:
            self._card.free(storage.block)
        self._add(storage.place, n_bytes)  # what was there is copied before it goes
        self._add(storage.place, -storage.n_bytes)
        storage.block, storage.n_bytes, storage.length = block, n_bytes, length

    def _add(self, place: int, n_bytes: int) -> None:
        now = self._relative[place] + n_bytes
        self._relative[place] = now
        if self._stretches:
            peak = self._stretches[-1].peak
            peak[place] = max(peak[place], now)

    def _forget(self, storage: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(storage, _Storage)
        if self._storages.get(storage.key) is storage:
            del self._storages[storage.key]
            self._relative[storage.place] -= storage.n_bytes
            if storage.saved:
                self._saved_now -= storage.n_bytes
            if self._card is not None:
                self._card.free(storage.block)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count what it touches."""
        del types
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # names in a profile; no tensor is touched
            return func(*args, **kwargs)
        self._turn()
        self._meet_all(args, inherited=True)
        if kwargs:
            self._meet_all(tuple(kwargs.values()), inherited=True)
        result = func(*args, **kwargs)
        self._meet_all((result,), inherited=False)
        if self._work is not None and not func.is_view:
            self._work.add(func._schema.name, args, result)
        if self._card is not None:
            backward = torch._C._current_autograd_node() is not None
            kept, passing = self._card.work(func._schema.name, args, result, backward=backward)
            self._inherited[HOST] += kept  # a step in the middle of a training finds it there
            self._add(HOST, passing)
            self._add(HOST, -passing)
        elif self._scratch is not None:
            passing = self._scratch(func._schema.name, args, result)
            last = self._stretches[-1]
            last.working = max(last.working, self._relative[HOST] + passing)
        return result

    def _meet_all(self, values: tuple[Any, ...] | list[Any], *, inherited: bool) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._meet(value, inherited=inherited)
            elif isinstance(value, list | tuple):
                self._meet_all(value, inherited=inherited)

    def _turn(self) -> None:
        """Begin a new stretch where module or phase have changed."""
        module, phase = self._whereabouts.now()
        now = self._relative
        if self._stretches:
            last = self._stretches[-1]
            if last.module == module and last.phase == phase:
                return
            last.end = list(now)
        self._stretches.append(_Stretch(module, phase, list(now), list(now), list(now)))

    def _pack(self, tensor: Tensor) -> Tensor:
        if torch._C._current_autograd_node() is None:  # else it is recomputed within backward
            self._turn()
            storage = self._meet(tensor, inherited=True)  # inputs are packed before their operator
            leaf = tensor.is_leaf and tensor.requires_grad
            if storage is not None and not (storage.inherited or storage.saved or leaf):
                storage.saved = True
                self._saved_now += storage.n_bytes
                self._saved_peak = max(self._saved_peak, self._saved_now)
                self._stretches[-1].saved += storage.n_bytes
        # Handed back as it is, an output would hold its own node: a cycle that outlives backward.
        return tensor.detach()

    def __enter__(self) -> Self:
        """Start to count."""
        if gc.isenabled():
            gc.disable()
            self._stack.callback(gc.enable)
        self._stack.enter_context(self._whereabouts)
        self._stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop; the numbers stay."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()
        if self._stretches:
            self._stretches[-1].end = list(self._relative)

    @property
    def place(self) -> int:
        """ACCELERATOR if anything was counted there, else HOST."""
        peaks = (stretch.peak[ACCELERATOR] for stretch in self._stretches)
        return ACCELERATOR if self._inherited[ACCELERATOR] or any(peaks) else HOST

    @property
    def working_bytes(self) -> int:
        """The most that lives at once on the host, operators' scratch included."""
        peaks = (max(stretch.peak[HOST], stretch.working) for stretch in self._stretches)
        return self._inherited[HOST] + max(peaks, default=0)

    def report(self) -> MemoryReport:
        """What was counted."""
        place = self.place
        base = self._inherited[place]
        timeline = tuple(
            MemoryEvent(
                module=stretch.module,
                phase=stretch.phase,
                start_bytes=base + stretch.start[place],
                peak_bytes=base + stretch.peak[place],
                end_bytes=base + stretch.end[place],
                saved_bytes=stretch.saved,
            )
            for stretch in self._stretches
        )
        return MemoryReport(
            peak_bytes=max((event.peak_bytes for event in timeline), default=base),
            saved_bytes=self._saved_peak,
            parameter_bytes=self._parameter_bytes[place],
            timeline=timeline,
            work=None if self._work is None else copy(self._work),
        )


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
