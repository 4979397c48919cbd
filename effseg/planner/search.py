"""Patch, batch and what is recomputed, searched together by tracing; no step is ever run.

The objective is context a second: the share of the median case that a patch shows, times the voxels
that pass in a second. Twice the context is worth half the speed, and recomputation, which costs a
third of the time, is worth a patch that is a third larger. Patch and policy come first, at the
smallest batch; then the largest batch that fits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from effseg.devices import DeviceKind
from effseg.errors import MemoryBudgetError
from effseg.memory import MemoryReport, Policy, apply_policy, choose_policy, outermost_stages
from effseg.networks import MemoryMode
from effseg.planner.rates import Rates
from effseg.planner.step import Step, Subject, choose_heap, predicted_peak
from effseg.plans import Alternative, format_bytes, format_shape
from effseg.types import Shape3

SMALLEST_BATCH = 2
LARGEST_BATCH = 4
"""Past it, more steps teach more than larger batches."""
HOST_LINK = 20e9
"""Bytes a second between a card and the host's pinned memory: PCIe 4, 16 lanes, in practice."""
MARGIN: dict[DeviceKind, float] = {"cpu": 1.03, "cuda": 1.0}
"""What is predicted of a CPU is right within 5 %, mostly from above: this much is kept free."""
TIE = 0.95
"""Of the best score: what scores as much and computes less twice is taken instead."""
LARGER_PATCHES = 4
"""How many patches beyond the best one are looked at with some of their stages recomputed."""


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


@dataclass(frozen=True)
class Pace:
    """How long a step may take, by rates that do not depend on what else a machine is doing."""

    rates: Rates
    seconds: float

    def share(self, step: Step) -> float:
        """Of the seconds that a step may take, those that this one takes."""
        assert step.report.work is not None
        return self.rates.seconds(step.report.work) / self.seconds


@dataclass(frozen=True)
class Answer:
    """The step that was chosen, and what it was weighed against.

    Attributes:
        step: the best that fits.
        too_large: the next larger patch, as it would have been; None where there is none.
        alternatives: what was weighed, the one that was taken first.
    """

    step: Step
    too_large: Step | None
    alternatives: tuple[Alternative, ...]


@dataclass
class Search:
    """What stays the same over a search.

    Attributes:
        subject: what is planned for.
        patches: the largest first; the first is as much as there is to see.
        budget_bytes: for the peak.
        device: whose rules to follow.
        rates: of the machine; what seconds are estimated by.
        beside_bytes: what stands beside a step all the time, of its report.
        longest: what a step may take: its work turned into seconds by rates that every machine of
            the kind shares, and their bound; None: as long as it likes.
        smallest_batch: samples.
        largest_batch: samples.
    """

    subject: Subject
    patches: Sequence[Shape3]
    budget_bytes: int
    device: DeviceKind
    rates: Rates
    beside_bytes: Callable[[MemoryReport], int]
    longest: Pace | None = None
    smallest_batch: int = SMALLEST_BATCH
    largest_batch: int = LARGEST_BATCH
    _known: dict[tuple[Shape3, Rung], Step] = field(default_factory=dict)
    _stages: list[list[str]] = field(default_factory=list)

    def run(self) -> Answer:
        """Search.

        Raises:
            MemoryBudgetError: if the smallest patch does not fit; says what would do.
        """
        self.patches = self._quick_enough()
        found = self._found()
        firsts = {rung: self._at(i, rung) for rung, i in found.items()}
        most = max(map(self.score, firsts.values()))
        best = next(rung for rung, one in firsts.items() if self.score(one) >= TIE * most)
        step, index = self._with_fewer_stages(firsts[best], found[best], best)
        step = self._with_more_samples(step)
        too_large = self._next_larger(index, best)
        others = [one for rung, one in firsts.items() if rung != best]
        return Answer(
            step=step, too_large=too_large, alternatives=self._weighed(step, too_large, others)
        )

    def _next_larger(self, index: int, rung: Rung) -> Step | None:
        """The next patch in the way that takes least; as this rung takes it, where that fits.

        Which way that is depends on the network: recomputation may take more than it saves.
        """
        if index == 0:
            return None
        least = self._least(index - 1)
        return self._at(index - 1, rung) if self._fits(least) else least

    def score(self, step: Step) -> float:
        """Context a second: the share of the largest patch that is seen, times voxels a second."""
        context = math.prod(step.patch) / math.prod(self.patches[0])
        return context * step.batch * math.prod(step.patch) / step.seconds

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

    def _needed_bytes(self, step: Step) -> int:
        return math.ceil(step.peak_bytes * MARGIN[self.device])

    def _fits(self, step: Step) -> bool:
        return self._needed_bytes(step) <= self.budget_bytes

    def _least(self, index: int) -> Step:
        """A patch on the rung where it takes least."""
        return min((self._at(index, rung) for rung in self._rungs()), key=lambda s: s.peak_bytes)

    def _rungs(self) -> list[Rung]:
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

    def _at(self, index: int, rung: Rung) -> Step:
        patch = self.patches[index]
        if (patch, rung) not in self._known:
            policies: dict[str, Policy] = {}
            if rung.policy != "keep":
                policies = dict.fromkeys(self._outermost(index, rung.mode), rung.policy)
            self._known[patch, rung] = self.step(
                patch, self.smallest_batch, rung.mode, policies, split=rung.split
            )
        return self._known[patch, rung]

    def _outermost(self, index: int, mode: MemoryMode) -> list[str]:
        """As of the first patch whose network has the same stages."""
        network = self.subject.network(self.patches[index], mode)
        paths = {path for path, _ in network.named_modules()}
        for known in self._stages:
            if paths.issuperset(known):
                return known
        self._stages.append(outermost_stages(network, self._at(index, Rung(mode)).report))
        return self._stages[-1]

    def _quick_enough(self) -> list[Shape3]:
        """The patches whose steps are short enough, by what the largest one would take.

        A part of a case must leave time for the largest batch; a whole case, which shows where
        things lie, for the smallest.
        """
        patches = list(self.patches)
        if self.longest is None:
            return patches
        first = self._at(0, Rung(self.subject.modes[-1]))
        share = self.longest.share(first)
        if share <= 1:
            return patches
        most = math.prod(patches[0]) * self.smallest_batch / (share * self.largest_batch)
        return [patch for patch in patches if math.prod(patch) <= most] or patches[-1:]

    def _found(self) -> dict[Rung, int]:
        """The first patch that fits on each rung that may be worth it.

        Raises:
            MemoryBudgetError: if none fits on any.
        """
        found: dict[Rung, int] = {}
        for rung in self._rungs():
            if self._may_be_best(rung, found):
                index = self._largest(rung)
                if index is not None:
                    found[rung] = index
        if found:
            return found
        smallest = self._least(len(self.patches) - 1)
        needed = math.ceil(self._needed_bytes(smallest) / 2**20)
        raise MemoryBudgetError(
            f"a budget of {format_bytes(self.budget_bytes)}; the smallest patch worth training on, "
            f"{format_shape(smallest.patch)} at batch {smallest.batch}, takes "
            f"{format_bytes(smallest.peak_bytes)}: --memory {needed}MiB would do"
        )

    def _may_be_best(self, rung: Rung, found: Mapping[Rung, int]) -> bool:
        """Whether a rung could show more than those before, as one trace of it tells.

        Not once they show all there is to see, unless it keeps all as well; nor where its bytes
        fall by less than its seconds grow: scores grow with voxels, and so do bytes, but for what
        the smallest patch takes.
        """
        if not found or (rung.policy == "keep" and not rung.split):
            return True
        if 0 in found.values():
            return False
        best = max(self.score(self._at(i, known)) for known, i in found.items())
        here = self._at(min(found.values()), rung)
        fixed = self._at(len(self.patches) - 1, next(iter(found))).peak_bytes
        room = (self.budget_bytes - fixed) / max(1, here.peak_bytes - fixed)
        return self.score(here) * room > best

    def _largest(self, rung: Rung) -> int | None:
        """The first patch that fits; bytes grow with voxels, so each trace tells where to look."""
        too_large, fitting = 0, len(self.patches) - 1
        if not self._fits(self._at(fitting, rung)):
            return None
        if self._fits(self._at(too_large, rung)):
            return 0
        while fitting - too_large > 1:
            large, small = self._at(too_large, rung), self._at(fitting, rung)
            voxels = [math.prod(one.patch) for one in (small, large)]
            share = (self.budget_bytes - small.peak_bytes) / (large.peak_bytes - small.peak_bytes)
            most = voxels[0] + share * (voxels[1] - voxels[0])
            inside = range(too_large + 1, fitting)
            index = next((i for i in inside if math.prod(self.patches[i]) <= most), inside[-1])
            if self._fits(self._at(index, rung)):
                fitting = index
            else:
                too_large = index
        return fitting

    def _with_fewer_stages(self, step: Step, index: int, rung: Rung) -> tuple[Step, int]:
        """Look for better between two rungs: some of the stages recomputed, or a larger patch."""
        best = self._partly(index, rung) if rung.policy != "keep" else step
        if best is None or self.score(best) <= self.score(step):
            best = step
        for larger in range(index - 1, max(-1, index - 1 - LARGER_PATCHES), -1):
            found = self._partly(larger, rung)
            if found is None:
                break
            if self.score(found) > self.score(best):
                best, index = found, larger
        return best, index

    def _partly(self, index: int, rung: Rung) -> Step | None:
        """A patch with the least recomputed that makes it fit; None where nothing does."""
        patch = self.patches[index]
        rung = Rung(self.subject.modes[-1], split=rung.split)
        if not self._fits(self._at(index, replace(rung, policy="recompute"))):
            return None
        network = self.subject.network(patch, rung.mode)
        steps: list[Step] = []

        def trace(candidate: nn.Module) -> MemoryReport:
            batch = self.smallest_batch
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

    def _with_more_samples(self, step: Step) -> Step:
        """The same step with the largest batch that fits and is short enough."""
        for batch in range(self.largest_batch, step.batch, -1):
            if self.longest is not None and self.longest.share(step) * batch > step.batch:
                continue
            larger = self.step(step.patch, batch, step.mode, step.policies, split=step.split)
            if self._fits(larger):
                return larger
        return step

    def _weighed(
        self, step: Step, too_large: Step | None, others: Sequence[Step]
    ) -> tuple[Alternative, ...]:
        taken = Alternative(
            choice=describe(step),
            peak_bytes=step.peak_bytes,
            seconds=step.seconds,
            taken=True,
            why="the most context a second that fits",
        )
        rows = [taken]
        if too_large is not None:
            why = (
                "fits, but shows less context a second"
                if self._fits(too_large)
                else f"needs {format_bytes(self._needed_bytes(too_large))}; the budget is "
                f"{format_bytes(self.budget_bytes)}"
            )
            rows.append(
                Alternative(
                    choice=describe(too_large),
                    peak_bytes=too_large.peak_bytes,
                    seconds=too_large.seconds,
                    why=why,
                )
            )
        rows += [
            Alternative(
                choice=describe(other),
                peak_bytes=other.peak_bytes,
                seconds=other.seconds,
                why=f"{self.score(other) / self.score(step):.2f} x the context a second",
            )
            for other in others
            if describe(other) != describe(step)
        ]
        return tuple(rows)


def describe(step: Step) -> str:
    """A step in words."""
    n_stages, kinds = len(step.policies), sorted(set(step.policies.values()))
    how = {"plain": "nothing computed twice", "shared": "features stored once"}.get(
        step.mode, "bottlenecks computed twice"
    )
    if n_stages:
        how = f"{n_stages} stages {'offloaded' if kinds == ['offload'] else 'recomputed'}"
    if step.split:
        how += ", samples one after the other"
    return f"patch {format_shape(step.patch)}, batch {step.batch}, {how}"
