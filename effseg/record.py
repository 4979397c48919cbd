"""What a run leaves in its folder: the names of the files, and the record among them."""

from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from effseg.errors import CheckpointError
from effseg.files import load_model, write_text_whole

PLAN = "plan.json"
RECORD = "run.json"
SPLIT = "split.json"
"""What was held out, where a split says so and not a fold."""
METRICS = "metrics.csv"
RATES = "learning_rates.csv"
"""Of the learning-rate range test, where there was one."""
WEIGHTS = "model.safetensors"
STOP = "stop"
"""A file that a person makes: the run ends after the step in hand."""
SNAPSHOTS = "snapshots"
"""The folder of weights from the course of the training, where the plan asked for some."""
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
VALIDATION = "validation"
"""The folder of the predictions of the cases that were held out."""
TEST = "test"
"""The folder of the predictions of cases that neither training nor any choice has seen."""
SCORES = "metrics.json"
"""In each folder of predictions."""


class Facts(BaseModel):
    """Frozen; what a newer version adds to a record is passed over, not refused."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class RunMemory(Facts):
    """The budget of a run, what its plan predicted, and what it took."""

    budget_bytes: int = Field(ge=1)
    predicted_peak_bytes: int = Field(ge=0)
    measured_peak_bytes: int | None = Field(None, ge=0)
    measured: str = Field("", description="what was measured, in words")


class RunEvent(Facts):
    """A step that ran out of memory, and how the run went on."""

    epoch: int = Field(ge=0, description="from 0")
    step: int = Field(ge=0, description="from 0")
    when: datetime
    asked: str = Field(description="what was refused, as the system says it")
    changed: str = Field(description="from that step on, in words")


class RunChange(Facts):
    """What a run did otherwise from some step on, as planned or because of how it went."""

    epoch: int = Field(ge=0, description="from 0")
    step: int = Field(ge=0, description="from 0")
    when: datetime
    what: str = Field(description="in words")


class RunRecord(Facts):
    """`run.json`: who trained what, when, for how long, and how it ended."""

    format: Literal[1]
    effseg: str
    torch: str = ""
    lightning: str | None = None
    monai: str | None = None
    python: str = ""
    dataset: str
    fold: int | None = None
    train: tuple[str, ...]
    validation: tuple[str, ...]
    started: datetime | None = None
    minutes: float | None = Field(None, ge=0)
    epochs: int | None = Field(None, ge=0)
    steps: int | None = Field(None, ge=0)
    best_epoch: int | None = None
    best_score: float | None = None
    stopped_by: str = ""
    device: str = ""
    n_devices: int | None = None
    n_threads: int | None = None
    n_parameters: int | None = None
    seed: int | None = None
    memory: RunMemory | None = None
    events: tuple[RunEvent, ...] = ()
    changes: tuple[RunChange, ...] = ()
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON; the file appears whole or not at all.

        Raises:
            DataError: if it cannot be written.
        """
        return write_text_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record.

        Raises:
            CheckpointError: if the file is missing, is no JSON, or says something impossible.
        """
        hint = "`effseg train` writes one after each epoch"
        return load_model(cls, path, error=CheckpointError, what="record", hint=hint)
