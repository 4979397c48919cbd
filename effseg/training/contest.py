"""The stages as they are run: steps, looks in between, and a state from which a killed run goes on.

All that the next step depends on is the state, the plan and the data, so a run that is killed
anywhere and goes on from what it saved last ends at the weights it would have had, on a CPU to the
bit.
"""

import csv
import io
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from effseg.errors import CheckpointError
from effseg.files import write_text_whole
from effseg.plans import Plan
from effseg.record import METRICS, WEIGHTS
from effseg.training.callbacks import save_averaged
from effseg.training.contest_data import ContestData
from effseg.training.memory_watch import MemoryWatch
from effseg.training.pair import Pair
from effseg.training.snapshot import load_snapshot, save_snapshot
from effseg.training.stages import Stage, Verdict, judge, stages_of

logger = logging.getLogger("effseg")

Ending: TypeAlias = Literal["stages", "criterion", "minutes", "epochs"]
"""All stages done; one that ended training; the plan's length over."""


@dataclass
class Standing:
    """How far a run is.

    Attributes:
        stage: under way, from 0; as many as there are when all are done.
        step: steps taken in it.
        total: steps taken in all.
        seconds: that steps and looks took.
        loss: of the last step.
        frozen: fingerprint of the network that this stage may not change; empty between stages.
        ended: whether no step is left to take.
        said: a line a stage that is over.
        rows: of the run's metrics.
        best_score: validation Dice of the weights that are kept.
        best_epoch: the look at which it was found.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    frozen: str = ""
    ended: bool = False
    said: list[str] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    best_score: float = -1.0
    best_epoch: int = -1


@dataclass(frozen=True)
class ContestState:
    """What a progress callback is told after each step.

    Attributes:
        stage: its name.
        step: steps taken in it.
        limit: of these.
        loss: of the step.
        score: the last VOE or accuracy of this stage; None before the first look.
        criterion: what ends the stage.
    """

    stage: str
    step: int
    limit: int
    loss: float
    score: float | None
    criterion: str


class Contest:
    """Runs the stages of an adversarial training.

    Args:
        plan: with its `adversarial` part.
        pair: the networks.
        data: what they see.
        folder: of the run, for weights and metrics.
        snapshot: the file of the state.
        watch: knows the peak of memory.
        saved: called after each state that was saved.
        progress: called after each step.
    """

    def __init__(
        self,
        plan: Plan,
        pair: Pair,
        data: ContestData,
        *,
        folder: Path,
        snapshot: Path,
        watch: MemoryWatch,
        saved: Callable[[Standing], None],
        progress: Callable[[ContestState], None] | None = None,
    ) -> None:
        assert plan.adversarial is not None
        self.plan, self.config = plan, plan.adversarial
        self.pair, self.data = pair, data
        self.folder, self.snapshot = folder, snapshot
        self.watch, self.saved, self.progress = watch, saved, progress
        self.stages = stages_of(self.config)
        self.at = Standing()
        self._resumed_at = time.monotonic()
        self._seconds_before = 0.0

    def resume(self) -> None:
        """Go back to the state that was saved last.

        Raises:
            CheckpointError: if it cannot be read, or is not of this plan.
        """
        state = load_snapshot(self.snapshot)
        try:
            self.at = Standing(**state["standing"])
            pair = state["pair"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.snapshot}: not the state of an adversarial training ({error}); train "
                "again in a new folder"
            ) from error
        self.pair.load_state(pair)

    @property
    def begun(self) -> tuple[Stage, ...]:
        """Stages of which a step was taken."""
        return self.stages[: self.at.stage + (self.at.step > 0)]

    def run(self) -> Ending:
        """Take all steps that are left."""
        self._resumed_at, self._seconds_before = time.monotonic(), self.at.seconds
        while self.at.stage < len(self.stages) and not self.at.ended:
            verdict = self._play(self.stages[self.at.stage])
            if verdict is None:
                self._keep_something()
                self._save()
                return "minutes" if self.plan.training.minutes is not None else "epochs"
            self.at.said.append(
                f"{verdict.said}; the other network is unchanged, {self.at.frozen[:12]}"
            )
            logger.log(logging.INFO if verdict.met else logging.WARNING, "%s", verdict.said)
            self.at.ended = verdict.stops
            self.at.stage, self.at.step, self.at.frozen = self.at.stage + 1, 0, ""
            self._save()
        return "criterion" if self.at.ended else "stages"

    def _play(self, stage: Stage) -> Verdict | None:
        """One stage, or what is left of it; None where the plan's length is over first."""
        at, frozen = self.at, self.pair.enter(stage)
        if at.frozen not in ("", frozen.fingerprint):
            raise CheckpointError(
                f"{self.snapshot}: the {frozen.name} is not the one that stage {stage.name} "
                "froze; the file was changed, train again in a new folder"
            )
        at.frozen = frozen.fingerprint
        score: float | None = None
        while not self._is_over():
            frozen.check_mode()
            loss = self._step(stage)
            at.step, at.total, at.loss = at.step + 1, at.total + 1, loss
            verdict = None
            if at.step % self.config.check_every == 0 or at.step == stage.limit:
                score = self._look(stage)
                verdict = judge(stage, at.step, score, chance=self.config.chance)
            self._tell(stage, loss, score)
            if verdict is not None:
                frozen.check()
                return verdict
            if at.step % self.config.save_every == 0:
                frozen.check()
                self._save()
        frozen.check()
        return None

    def _step(self, stage: Stage) -> float:
        """One step of whoever's turn it is; its loss."""
        at, pair, data = self.at, self.pair, self.data
        if stage.player == "segmenter":
            loss = pair.learn_labels(*data.labelled(at.stage, at.step))
            if stage.turn > 0:
                loss += pair.learn_verdict(data.unknown(at.stage, at.step))
            pair.move_segmenter()
            return loss
        loss = pair.learn_to_tell(data.known(at.stage, at.step), known=True)
        loss += pair.learn_to_tell(data.unknown(at.stage, at.step), known=False)
        pair.move_discriminator()
        return loss

    def _look(self, stage: Stage) -> float:
        """Measure what the stage is judged by, and write it down with all else that is new."""
        n = self.config.check_patches
        if stage.player == "segmenter":
            score = self.pair.voe(self.data.training_looks(n))
            self._note({"training_voe": score} | self._validated())
            return score
        score, validation = (
            self.pair.accuracy(*self.data.looks(part, n)) for part in ("train", "validation")
        )
        self._note({"accuracy": score, "validation_accuracy": validation})
        return score

    def _validated(self) -> dict[str, float]:
        """Validation Dice of the averaged weights, which are kept if they are the best so far."""
        dice = self.pair.dice(self.data.validation_looks())
        mean = float(dice.nanmean().nan_to_num(0.0))
        if mean > self.at.best_score:
            self.at.best_score, self.at.best_epoch = mean, len(self.at.rows)
            save_averaged(self.pair.module, self.folder / WEIGHTS)
        names = [f"validation_dice_{label.name}" for label in self.plan.labels[1:]]
        known = dict(zip(names, dice.tolist(), strict=True))
        return {"validation_dice": mean} | {k: v for k, v in known.items() if v == v}

    def _note(self, found: dict[str, float]) -> None:
        at, rate = self.at, self.pair.optimizers["segmenter"].param_groups[0]["lr"]
        at.seconds = self.elapsed_seconds
        at.rows.append(
            {
                "epoch": len(at.rows),
                "step": at.total,
                "minutes": round(at.seconds / 60, 4),
                "stage": at.stage,
                "learning_rate": rate,
                "loss": at.loss,
                "peak_bytes": self.watch.peak_bytes(self.pair.device),
                "predicted_peak_bytes": self.plan.memory.peak_bytes,
            }
            | found
        )
        write_text_whole(self.folder / METRICS, self._table())

    def _table(self) -> str:
        """The run's metrics as CSV, a line a look; what was not looked at is left out."""
        labels = [f"validation_dice_{label.name}" for label in self.plan.labels[1:]]
        columns = (
            *("epoch", "step", "minutes", "stage", "learning_rate", "loss", "training_voe"),
            *("accuracy", "validation_accuracy", "validation_dice", *labels),
            *("peak_bytes", "predicted_peak_bytes"),
        )
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(self.at.rows)
        return text.getvalue()

    def _keep_something(self) -> None:
        """A run whose length was over before its first look keeps the weights it has."""
        if self.at.best_epoch < 0:
            self._note(self._validated())

    @property
    def elapsed_seconds(self) -> float:
        """Of all that was run, before a stop and since."""
        return self._seconds_before + time.monotonic() - self._resumed_at

    def _is_over(self) -> bool:
        training = self.plan.training
        if training.minutes is not None:
            return self.elapsed_seconds >= 60 * training.minutes
        assert training.epochs is not None
        return self.at.total >= training.epochs * training.steps_per_epoch

    def _tell(self, stage: Stage, loss: float, score: float | None) -> None:
        if self.progress is not None:
            self.progress(
                ContestState(
                    stage=stage.name,
                    step=self.at.step,
                    limit=stage.limit,
                    loss=loss,
                    score=score,
                    criterion=stage.criterion,
                )
            )

    def _save(self) -> None:
        self.at.seconds = self.elapsed_seconds
        save_snapshot(self.snapshot, {"standing": asdict(self.at), "pair": self.pair.state()})
        self.saved(self.at)
