"""The steps that a search weighs, each traced once.

The objective is context a second: the share of the median case that a patch shows, times the voxels
that pass in a second. Twice the context is worth half the speed, and recomputation, which costs a
third of the time, is worth a patch that is a third larger.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from effseg.devices import DeviceKind
from effseg.memory import MemoryReport, Policy, apply_policy, choose_policy, outermost_stages
from effseg.networks import MemoryMode
from effseg.planner.rates import Rates
from effseg.planner.step import Step, Subject, choose_heap, predicted_peak
from effseg.types import Shape3

SMALLEST_BATCH = 2
MAPPED_SECONDS = 1.8
"""Of a step that gives freed memory back, over one that keeps it (`benchmarks/heaps.py`)."""
HOST_LINK = 20e9
"""Bytes a second between a card and the host's pinned memory: PCIe 4, 16 lanes, in practice."""
MARGIN: dict[DeviceKind, float] = {"cpu": 1.03, "cuda": 1.0}
"""What is predicted of a CPU is right within 5 %, mostly from above: this much is kept free."""


@dataclass(frozen=True)
class Rung:
    """One way to take less memory.

    Attributes:
        mode: the network's own.
        policy: for all its stages.
        split: whether samples of a batch go through the network one after the other.
    """

    mode: MemoryMode
    policy: Policy = "keep"
    split: bool = False


@dataclass
class Candidates:
    """What may be chosen from; steps of the smallest batch are kept once they are traced.

    Attributes:
        subject: what is planned for.
        patches: the largest first; the first is as much as there is to see.
        budget_bytes: for the peak.
        device: whose rules to follow.
        rates: of the machine; what seconds are estimated by.
        beside_bytes: what stands beside a step all the time, of its report.
        batch: samples of the smallest.
    """

    subject: Subject
    patches: Sequence[Shape3]
    budget_bytes: int
    device: DeviceKind
    rates: Rates
    beside_bytes: Callable[[MemoryReport], int]
    batch: int = SMALLEST_BATCH
    _known: dict[tuple[Shape3, Rung], Step] = field(default_factory=dict)
    _stages: list[list[str]] = field(default_factory=list)

    def rungs(self) -> list[Rung]:
        """From the fastest to the one that takes least."""
        *_, least = self.subject.modes
        split = self.subject.can_split
        rungs = [Rung(mode) for mode in self.subject.modes]
        if split:  # takes less than the recomputation of stages, for the same second forward
            rungs.append(Rung(least, split=True))
        rungs.append(Rung(least, "recompute", split))
        if self.device == "cuda":
            rungs.append(Rung(least, "offload", split))
        return rungs

    def score(self, step: Step) -> float:
        """Context a second: the share of the largest patch that is seen, times voxels a second."""
        context = math.prod(step.patch) / math.prod(self.patches[0])
        return context * step.batch * math.prod(step.patch) / step.seconds

    def needed_bytes(self, step: Step) -> int:
        """The budget that a step would do with."""
        return math.ceil(step.peak_bytes * MARGIN[self.device])

    def fits(self, step: Step) -> bool:
        """Whether the budget does."""
        return self.needed_bytes(step) <= self.budget_bytes

    def least(self, index: int) -> Step:
        """A patch on the rung where it takes least."""
        return min((self.at(index, rung) for rung in self.rungs()), key=lambda s: s.peak_bytes)

    def at(self, index: int, rung: Rung) -> Step:
        """A patch's step on a rung, of the smallest batch."""
        patch = self.patches[index]
        if (patch, rung) not in self._known:
            policies: dict[str, Policy] = {}
            if rung.policy != "keep":
                policies = dict.fromkeys(self._outermost(index, rung.mode), rung.policy)
            self._known[patch, rung] = self.step(
                patch, self.batch, rung.mode, policies, split=rung.split
            )
        return self._known[patch, rung]

    def _outermost(self, index: int, mode: MemoryMode) -> list[str]:
        """As of the first patch whose network has the same stages."""
        network = self.subject.network(self.patches[index], mode)
        paths = {path for path, _ in network.named_modules()}
        for known in self._stages:
            if paths.issuperset(known):
                return known
        self._stages.append(outermost_stages(network, self.at(index, Rung(mode)).report))
        return self._stages[-1]

    def partly(self, index: int, rung: Rung) -> Step | None:
        """A patch with the least recomputed that makes it fit; None where nothing does."""
        patch = self.patches[index]
        rung = Rung(self.subject.modes[-1], split=rung.split)
        if not self.fits(self.at(index, replace(rung, policy="recompute"))):
            return None
        network = self.subject.network(patch, rung.mode)
        steps: list[Step] = []

        def trace(candidate: nn.Module) -> MemoryReport:
            batch = self.batch
            report = self.subject.trace(candidate, patch, batch, split=rung.split)
            steps.append(self._weigh(patch, batch, rung, {}, report))
            if rung.split and len(steps) == 1:
                # in backward one sample at a time is saved, which that step's forward does not show
                alone = self.subject.trace(candidate, patch, 1)
                report = replace(report, timeline=alone.timeline)
            return replace(report, peak_bytes=steps[-1].peak_bytes)

        policies = choose_policy(
            network, trace, budget_bytes=int(self.budget_bytes / MARGIN[self.device])
        )
        return replace(steps[-1], policies=policies)

    def step(
        self,
        patch: Shape3,
        batch: int,
        mode: MemoryMode,
        policies: Mapping[str, Policy],
        *,
        split: bool = False,
    ) -> Step:
        """Trace one candidate."""
        network = self.subject.network(patch, mode)
        apply_policy(network, policies)
        report = self.subject.trace(network, patch, batch, split=split)
        return self._weigh(patch, batch, Rung(mode, split=split), policies, report)

    def _weigh(
        self,
        patch: Shape3,
        batch: int,
        rung: Rung,
        policies: Mapping[str, Policy],
        report: MemoryReport,
    ) -> Step:
        assert report.work is not None
        seconds = self.rates.seconds(report.work)
        if "offload" in policies.values():
            seconds += 2 * report.saved_bytes / HOST_LINK
        beside = self.beside_bytes(report)
        heap = choose_heap(
            report, device=self.device, beside_bytes=beside, budget_bytes=self.budget_bytes
        )
        if heap == "mapped":
            seconds *= MAPPED_SECONDS
        return Step(
            patch=patch,
            batch=batch,
            mode=rung.mode,
            split=rung.split,
            policies=dict(policies),
            report=report,
            peak_bytes=predicted_peak(report, device=self.device, heap=heap, beside_bytes=beside),
            seconds=seconds,
            heap=heap,
        )
