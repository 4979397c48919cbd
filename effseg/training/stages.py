"""Whose turn it is in adversarial training, until what, and what comes then: no tensors here.

The segmenter learns alone until its training VOE is under a bound; the discriminator until its
accuracy is over one; then both in turn, the bound on VOE tightened from turn to turn. Each stage
ends by its criterion. Where that stays out of reach, a limit of steps ends it:

- The segmenter alone: training stops. One that has not learnt its own cases has nothing that a
  discriminator could pass on.
- The segmenter in a later turn: on it goes. The bound was tightened, and the discriminator has
  moved too.
- The discriminator: it goes on with what it can tell. If that is nothing, training stops: the
  segmenter treats scans that it never saw as those it was trained on, and that was the aim.

Turns of a segmenter and a discriminator: Luc et al., "Semantic segmentation using adversarial
networks", 2016, arXiv:1611.08408.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from effseg.plans import AdversarialConfig

Player: TypeAlias = Literal["segmenter", "discriminator"]


@dataclass(frozen=True)
class Stage:
    """A stretch of training in which one network learns and the other is frozen.

    Attributes:
        player: the one that learns.
        turn: 0: the segmenter alone.
        bound: that ends it: on VOE from above, on accuracy from below.
        limit: of steps.
    """

    player: Player
    turn: int
    bound: float
    limit: int

    @property
    def name(self) -> str:
        """In messages."""
        return f"{self.player} {self.turn}" if self.turn else "segmenter alone"

    @property
    def criterion(self) -> str:
        """In messages."""
        what, relation = ("training VOE", "<") if self.player == "segmenter" else ("accuracy", ">")
        return f"{what} {relation} {self.bound:.3g}"

    def is_met(self, score: float) -> bool:
        """Whether a VOE or an accuracy is within the bound; NaN is not."""
        return score < self.bound if self.player == "segmenter" else score > self.bound


@dataclass(frozen=True)
class Verdict:
    """How a stage ended.

    Attributes:
        met: by its criterion, not by its limit.
        stops: whether training ends with it, though stages are left.
        said: in a line.
    """

    met: bool
    stops: bool
    said: str


def stages_of(config: AdversarialConfig) -> tuple[Stage, ...]:
    """All stages in their order; the last is the segmenter's, since it is what is wanted."""
    turns = [Stage("segmenter", 0, config.voe, config.segmenter_steps)]
    for turn in range(1, config.turns + 1):
        bound = config.voe * config.tighten**turn
        turns.append(Stage("discriminator", turn, config.accuracy, config.discriminator_steps))
        turns.append(Stage("segmenter", turn, bound, config.segmenter_steps))
    return tuple(turns)


def judge(stage: Stage, step: int, score: float, *, chance: float) -> Verdict | None:
    """Whether a stage is over.

    Args:
        stage: under way.
        step: steps taken in it.
        score: its VOE or accuracy after them.
        chance: an accuracy that tells nothing.

    Returns:
        How it ended; None: it goes on.
    """
    what = "training VOE" if stage.player == "segmenter" else "accuracy"
    after = f"stage {stage.name}: {what} {score:.3f} after {step} steps"
    if stage.is_met(score):
        return Verdict(met=True, stops=False, said=f"{after}, as wanted ({stage.criterion})")
    if step < stage.limit:
        return None
    missed = f"{after}, its limit, not {stage.criterion}"
    if stage.player == "segmenter":
        if stage.turn > 0:
            return Verdict(met=False, stops=False, said=f"{missed}; going on")
        why = "a segmenter that has not learnt its own cases gains nothing from a discriminator"
        return Verdict(met=False, stops=True, said=f"{missed}; stopping: {why}")
    if score > chance:
        return Verdict(met=False, stops=False, said=f"{missed}; going on with what it can tell")
    why = "it cannot tell cases that the segmenter was trained on from those it never saw"
    return Verdict(met=False, stops=True, said=f"{missed}; stopping: {why}")
