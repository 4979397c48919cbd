"""Patch, batch and what is recomputed, searched together by tracing; no step is ever run.

Patch and policy come first, at the smallest batch, by the context that a step shows a second
(`candidates`); then the largest batch that fits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from effseg.errors import MemoryBudgetError
from effseg.planner.alternatives import weighed
from effseg.planner.candidates import Candidates, Rung
from effseg.planner.rates import Rates
from effseg.planner.step import Step
from effseg.plans import Alternative, format_bytes, format_shape
from effseg.types import Shape3

LARGEST_BATCH = 4
"""Past it, more steps teach more than larger batches."""
TIE = 0.95
"""Of the best score: what scores as much and computes less twice is taken instead."""
LARGER_PATCHES = 4
"""How many patches beyond the best one are looked at with some of their stages recomputed."""


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
    """Looks for the best of candidates.

    Attributes:
        candidates: what may be chosen from, and what of it fits.
        longest: what a step may take: its work turned into seconds by rates that every machine of
            the kind shares, and their bound; None: as long as it likes.
        largest_batch: samples.
    """

    candidates: Candidates
    longest: Pace | None = None
    largest_batch: int = LARGEST_BATCH

    def run(self) -> Answer:
        """Search.

        Raises:
            MemoryBudgetError: if the smallest patch does not fit; says what would do.
        """
        self.candidates = replace(self.candidates, patches=self._quick_enough())
        score = self.candidates.score
        found = self._found()
        firsts = {rung: self.candidates.at(i, rung) for rung, i in found.items()}
        most = max(map(score, firsts.values()))
        best = next(rung for rung, one in firsts.items() if score(one) >= TIE * most)
        step, index = self._with_fewer_stages(firsts[best], found[best], best)
        step = self._with_more_samples(step)
        too_large = self._next_larger(index, best)
        others = [one for rung, one in firsts.items() if rung != best]
        alternatives = weighed(self.candidates, step, too_large, others)
        return Answer(step=step, too_large=too_large, alternatives=alternatives)

    def _next_larger(self, index: int, rung: Rung) -> Step | None:
        """The next patch in the way that takes least; as this rung takes it, where that fits.

        Which way that is depends on the network: recomputation may take more than it saves.
        """
        among = self.candidates
        if index == 0:
            return None
        least = among.least(index - 1)
        return among.at(index - 1, rung) if among.fits(least) else least

    def _quick_enough(self) -> list[Shape3]:
        """The patches whose steps are short enough, by what the largest one would take.

        A part of a case must leave time for the largest batch; a whole case, which shows where
        things lie, for the smallest.
        """
        among = self.candidates
        patches = list(among.patches)
        if self.longest is None:
            return patches
        first = among.at(0, Rung(among.subject.modes[-1]))
        share = self.longest.share(first)
        if share <= 1:
            return patches
        most = math.prod(patches[0]) * among.batch / (share * self.largest_batch)
        return [patch for patch in patches if math.prod(patch) <= most] or patches[-1:]

    def _found(self) -> dict[Rung, int]:
        """The first patch that fits on each rung that may be worth it.

        Raises:
            MemoryBudgetError: if none fits on any.
        """
        among = self.candidates
        found: dict[Rung, int] = {}
        for rung in among.rungs():
            if self._may_be_best(rung, found):
                index = self._largest(rung)
                if index is not None:
                    found[rung] = index
        if found:
            return found
        smallest = among.least(len(among.patches) - 1)
        needed = math.ceil(among.needed_bytes(smallest) / 2**20)
        raise MemoryBudgetError(
            f"a budget of {format_bytes(among.budget_bytes)}; the smallest patch worth training "
            f"on, {format_shape(smallest.patch)} at batch {smallest.batch}, takes "
            f"{format_bytes(smallest.peak_bytes)}: --memory {needed}MiB would do"
        )

    def _may_be_best(self, rung: Rung, found: Mapping[Rung, int]) -> bool:
        """Whether a rung could show more than those before, as one trace of it tells.

        Not once they show all there is to see, unless it keeps all as well, or is the first that
        leaves a CPU room to keep freed memory; nor where its bytes fall by less than its seconds
        grow: scores grow with voxels, and so do bytes, but for what the smallest patch takes.
        """
        among = self.candidates
        if not found or (rung.policy == "keep" and not rung.split):
            return True
        if 0 in found.values():
            whole = [among.at(0, known) for known, index in found.items() if index == 0]
            mapped = all(step.heap == "mapped" for step in whole)
            return mapped and among.at(0, rung).heap == "kept"
        best = max(among.score(among.at(i, known)) for known, i in found.items())
        here = among.at(min(found.values()), rung)
        fixed = among.at(len(among.patches) - 1, next(iter(found))).peak_bytes
        room = (among.budget_bytes - fixed) / max(1, here.peak_bytes - fixed)
        return among.score(here) * room > best

    def _largest(self, rung: Rung) -> int | None:
        """The first patch that fits; bytes grow with voxels, so each trace tells where to look."""
        among = self.candidates
        too_large, fitting = 0, len(among.patches) - 1
        if not among.fits(among.at(fitting, rung)):
            return None
        if among.fits(among.at(too_large, rung)):
            return 0
        while fitting - too_large > 1:
            large, small = among.at(too_large, rung), among.at(fitting, rung)
            voxels = [math.prod(one.patch) for one in (small, large)]
            share = (among.budget_bytes - small.peak_bytes) / (large.peak_bytes - small.peak_bytes)
            most = voxels[0] + share * (voxels[1] - voxels[0])
            inside = range(too_large + 1, fitting)
            index = next((i for i in inside if math.prod(among.patches[i]) <= most), inside[-1])
            if among.fits(among.at(index, rung)):
                fitting = index
            else:
                too_large = index
        return fitting

    def _with_fewer_stages(self, step: Step, index: int, rung: Rung) -> tuple[Step, int]:
        """Look for better between two rungs: some of the stages recomputed, or a larger patch."""
        among = self.candidates
        best = among.partly(index, rung) if rung.policy != "keep" else step
        if best is None or among.score(best) <= among.score(step):
            best = step
        for larger in range(index - 1, max(-1, index - 1 - LARGER_PATCHES), -1):
            found = among.partly(larger, rung)
            if found is None:
                break
            if among.score(found) > among.score(best):
                best, index = found, larger
        return best, index

    def _with_more_samples(self, step: Step) -> Step:
        """The same step with the largest batch that fits and is short enough.

        No sample is worth giving freed memory back for where it could be kept.
        """
        for batch in range(self.largest_batch, step.batch, -1):
            if self.longest is not None and self.longest.share(step) * batch > step.batch:
                continue
            larger = self.candidates.step(
                step.patch, batch, step.mode, step.policies, split=step.split
            )
            if self.candidates.fits(larger) and (step.heap, larger.heap) != ("kept", "mapped"):
                return larger
        return step
