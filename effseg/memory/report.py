"""What a measured or traced call took: peak, saved bytes, and a timeline by module."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from effseg.memory.work import Work
from effseg.plans import format_bytes

Phase: TypeAlias = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True)
class MemoryEvent:
    """A stretch of consecutive operators that belong to one module in one phase.

    Attributes:
        module: the module's path, from the class of the outermost one, `BasicUNet.down_1.convs`;
            empty for what runs outside of any module, a loss function for one.
        phase: backward covers what a checkpoint recomputes, too.
        start_bytes: what lives before the first operator.
        peak_bytes: the most that lives at once within.
        end_bytes: what is left when the next stretch begins.
        saved_bytes: what autograd kept for backward within (each storage counts once, where it is
            kept first).
    """

    module: str
    phase: Phase
    start_bytes: int
    peak_bytes: int
    end_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a call.

    Attributes:
        peak_bytes: all that lives at once: parameters, buffers, gradients, optimizer state,
            batch, activations. On CUDA what `torch.cuda.max_memory_allocated` says, kernels'
            workspaces and rounding included.
        saved_bytes: kept from forward to backward; parameters and batch aside.
        parameter_bytes: the parameters alone.
        timeline: in the order of execution; empty where no operator ran.
        reserved_bytes: what CUDA's caching allocator holds for it, in use or not, as
            `torch.cuda.max_memory_reserved`; None on a CPU.
        device_bytes: what nvidia-smi shows: reserved bytes and the CUDA context. Of a step traced
            for a CPU, the resident memory it takes where large blocks are mapped
            (`mapped_blocks`). None where it was measured on a CPU: `PeakResident` asks the system.
        work: what a traced call computes and moves; None where it was measured. It takes no part
            in a comparison of two reports: these are about bytes.
    """

    peak_bytes: int
    saved_bytes: int
    parameter_bytes: int
    timeline: tuple[MemoryEvent, ...]
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    work: Work | None = field(default=None, compare=False)

    @property
    def peak_event(self) -> MemoryEvent | None:
        """The stretch that sets the peak; None where no operator ran."""
        return max(self.timeline, key=lambda event: event.peak_bytes, default=None)

    def table(self, *, depth: int = 2) -> str:
        """One line a module: its peak in each phase and what it saves.

        Args:
            depth: how many names of a path are told apart; 1 is the outermost module.
        """
        rows: dict[str, dict[str, int]] = {}
        for event in self.timeline:
            name = ".".join(event.module.split(".")[:depth]) or "(outside)"
            row = rows.setdefault(name, {})
            row[event.phase] = max(row.get(event.phase, 0), event.peak_bytes)
            row["saved"] = row.get("saved", 0) + event.saved_bytes
        columns = ("forward", "backward", "optimizer", "saved")
        width = max(len(name) for name in ("module", *rows))
        lines = [f"{'module':{width}}" + "".join(f"{column:>12}" for column in columns)]
        for name, row in rows.items():
            cells = (format_bytes(row[column]) if column in row else "-" for column in columns)
            lines.append(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)

    def __str__(self) -> str:
        """One line."""
        text = (
            f"peak {format_bytes(self.peak_bytes)}, saved {format_bytes(self.saved_bytes)}, "
            f"parameters {format_bytes(self.parameter_bytes)}"
        )
        if self.reserved_bytes is not None:
            text += f", reserved {format_bytes(self.reserved_bytes)}"
        if self.device_bytes is not None:
            text += f", device {format_bytes(self.device_bytes)}"
        event = self.peak_event
        if event is None:
            return text
        return f"{text}; the peak is in {event.module or 'no module'} ({event.phase})"
