"""Patch and batch that fit the budget, found by tracing the real training step."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from effseg.devices import DeviceKind, Precision
from effseg.errors import MemoryBudgetError
from effseg.memory import MemoryReport
from effseg.networks import MemoryMode
from effseg.planner.geometry import Stages, shrinking_patches
from effseg.planner.step import trace_step
from effseg.plans import LossConfig, NetworkConfig, format_bytes, format_shape
from effseg.types import Shape3, Spacing

SMALLEST_BATCH = 2
LARGEST_BATCH = 4
"""Past it, more steps teach more than larger batches."""
CPU_STEP_VOXELS = 2**18
"""Of all samples of a step: about half a second on two cores. Larger steps would fit most budgets,
and leave a training of minutes with a handful of them."""
CPU_PATCH_VOXELS = CPU_STEP_VOXELS // LARGEST_BATCH
"""Of a patch that is part of a case. One that is a whole case may take as much as the smallest
batch of them allows: where something lies in the case is then there to be learnt."""
HOST_RESERVE_BYTES = 144 * 2**20
"""Of a CPU's budget, for what is no tensor: threads' buffers, the convolutions' own workspace."""
HOST_SLACK = 1.1
"""Resident memory over tensor bytes: freed memory that the C library keeps on its heap."""


@dataclass(frozen=True)
class Step:
    """One training step that might be taken, and what it takes.

    Attributes:
        patch: voxels.
        batch: samples.
        network: its configuration.
        report: of the traced step, tensor bytes.
        peak_bytes: predicted, with what is no tensor.
    """

    patch: Shape3
    batch: int
    network: NetworkConfig
    report: MemoryReport
    peak_bytes: int


@dataclass(frozen=True)
class Question:
    """What stays the same over a search."""

    budget_bytes: int
    median: Shape3
    spacing: Spacing
    build_config: Callable[[Stages, MemoryMode], NetworkConfig]
    loss: LossConfig
    ignored: bool
    precision: Precision
    device: DeviceKind

    def is_quick(self, patch: Shape3, *, whole: bool) -> bool:
        """Whether steps on a patch are short enough; `whole`: it is the median case."""
        most = CPU_STEP_VOXELS // SMALLEST_BATCH if whole else CPU_PATCH_VOXELS
        return self.device == "cuda" or math.prod(patch) <= most

    def most_samples(self, patch: Shape3) -> int:
        """Of a batch."""
        if self.device == "cuda":
            return LARGEST_BATCH
        return min(LARGEST_BATCH, CPU_STEP_VOXELS // math.prod(patch))

    def step(self, patch: Shape3, stages: Stages, batch: int, memory: MemoryMode) -> Step:
        """Trace one candidate; nothing is allocated."""
        config = self.build_config(stages, memory)
        report = trace_step(
            config,
            {},
            patch=patch,
            batch=batch,
            loss=self.loss,
            ignored=self.ignored,
            precision=self.precision,
            device=self.device,
        )
        # the averaged weights stand beside the network's own
        if self.device == "cuda":
            assert report.device_bytes is not None
            peak = report.device_bytes + report.parameter_bytes
        else:
            tensors = report.peak_bytes + report.parameter_bytes
            peak = round(tensors * HOST_SLACK) + HOST_RESERVE_BYTES
        return Step(patch=patch, batch=batch, network=config, report=report, peak_bytes=peak)


@dataclass(frozen=True)
class Answer:
    """The step that was chosen, and the next larger patch that did not fit, if there is one.

    Attributes:
        step: the largest patch that fits, then the largest batch, then without recomputation where
            that fits too.
        too_large: None where the largest patch fits.
    """

    step: Step
    too_large: Step | None


def search(question: Question) -> Answer:
    """The largest patch that fits with a batch of 2, then the largest batch up to 4, then speed.

    Patch and batch are found with shared memory, which takes least; where everything also fits with
    nothing recomputed, nothing is.

    Raises:
        MemoryBudgetError: if the smallest patch does not fit; says what would.
    """
    candidates = [
        (patch, stages)
        for i, (patch, stages) in enumerate(shrinking_patches(question.median, question.spacing))
        if question.is_quick(patch, whole=i == 0)
    ]
    traced: dict[int, Step] = {}

    def fits(index: int) -> bool:
        patch, stages = candidates[index]
        traced[index] = question.step(patch, stages, SMALLEST_BATCH, "shared")
        return traced[index].peak_bytes <= question.budget_bytes

    # patches shrink from candidate to candidate, so bisect for the first that fits; often it is
    # the largest, which one trace tells
    first = 0 if fits(0) else bisect_left(range(len(candidates)), True, lo=1, key=fits)
    if first == len(candidates):
        smallest = traced[first - 1]
        raise MemoryBudgetError(
            f"a budget of {format_bytes(question.budget_bytes)}; the smallest patch worth training "
            f"on, {format_shape(smallest.patch)} at batch {SMALLEST_BATCH}, takes "
            f"{format_bytes(smallest.peak_bytes)}: "
            f"--memory {-(-smallest.peak_bytes // 2**20)}MiB would do"
        )
    best = traced[first]
    patch, stages = candidates[first]
    for batch in range(question.most_samples(patch), SMALLEST_BATCH, -1):
        larger = question.step(patch, stages, batch, "shared")
        if larger.peak_bytes <= question.budget_bytes:
            best = larger
            break
    plain = question.step(patch, stages, best.batch, "plain")
    if plain.peak_bytes <= question.budget_bytes:
        best = plain
    return Answer(step=best, too_large=traced.get(first - 1))
