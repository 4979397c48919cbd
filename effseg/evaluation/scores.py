"""What an evaluation found, as frozen records that save to and load from JSON.

Undefined numbers are None, never NaN: JSON has no NaN, and None cannot slip into a mean.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from effseg.errors import DataError
from effseg.files import load_model, write_text_whole
from effseg.plans import Config

Metric = Literal[
    "dice",
    "iou",
    "voe",
    "surface_dice",
    "hd_mm",
    "hd95_mm",
    "assd_mm",
    "relative_volume_difference",
]

METRICS: tuple[Metric, ...] = (
    "dice",
    "iou",
    "voe",
    "surface_dice",
    "hd_mm",
    "hd95_mm",
    "assd_mm",
    "relative_volume_difference",
)

Row = dict[str, str | int | float | None]
"""One line of a table: column name to cell."""


class LabelScore(Config):
    """One label of one case. None: undefined, because one or both masks are empty."""

    label: int
    name: str
    dice: float | None = Field(description="2 |P and R| / (|P| + |R|)")
    iou: float | None = Field(description="|P and R| / |P or R|")
    voe: float | None = Field(description="volumetric overlap error, 1 - iou")
    surface_dice: float | None = Field(description="share of both surfaces within the tolerance")
    hd_mm: float | None = Field(description="Hausdorff distance: the largest surface distance")
    hd95_mm: float | None = Field(description="larger of the directed 95th percentiles")
    assd_mm: float | None = Field(description="mean over both surfaces' distances")
    relative_volume_difference: float | None = Field(description="(|P| - |R|) / |R|, signed")
    reference_mm3: float = Field(ge=0, description="without ignored voxels")
    prediction_mm3: float = Field(ge=0, description="without ignored voxels")


class Lesion(Config):
    """One component of the reference."""

    label: int
    volume_mm3: float = Field(gt=0)
    centroid_mm: tuple[float, float, float] = Field(description="world (z, y, x)")
    detected: bool = Field(description="a voxel or more of it is predicted as its label")
    found_mm3: float = Field(
        ge=0, description="volume of the largest predicted component that overlaps it"
    )
    dice: float = Field(description="against the predicted components that overlap it")


class LesionScore(Config):
    """The lesions of one label of one case."""

    label: int
    n_reference: int = Field(ge=0)
    n_detected: int = Field(ge=0)
    n_false_positives: int = Field(ge=0)
    lesions: tuple[Lesion, ...]


class CaseScore(Config):
    """One case; the paths are None where volumes were compared in memory."""

    case: str
    prediction: str | None = None
    reference: str | None = None
    image: str | None = None
    labels: tuple[LabelScore, ...]
    lesions: tuple[LesionScore, ...]

    def mean(self, metric: Metric) -> float | None:
        """Mean of a metric over the labels where it is defined; None where it is for none."""
        return _mean(getattr(score, metric) for score in self.labels)


class Scores(Config):
    """All cases of an evaluation and what they come to."""

    format: Literal[1] = Field(1, description="of this file")
    tolerance_mm: float = Field(ge=0, description="of surface_dice")
    ignore_label: int | None
    conventions: str = Field(description="how surfaces, distances and lesions are defined")
    cases: tuple[CaseScore, ...]

    def mean(self, metric: Metric, label: int | None = None) -> float | None:
        """Mean over cases of one label's metric; without a label, of each case's mean over labels.

        Undefined values are left out; None where nothing is defined. `n_defined` counts the rest.
        """
        if label is None:
            return _mean(case.mean(metric) for case in self.cases)
        return _mean(getattr(score, metric) for score in self._of(label))

    def n_defined(self, metric: Metric, label: int | None = None) -> int:
        """How many cases `mean` with the same arguments is taken over."""
        if label is None:
            return sum(case.mean(metric) is not None for case in self.cases)
        return sum(getattr(score, metric) is not None for score in self._of(label))

    @property
    def mean_dice(self) -> float | None:
        """Foreground Dice: mean over labels, then over cases, where defined."""
        return self.mean("dice")

    @property
    def sensitivity(self) -> float | None:
        """Share of all reference lesions that were detected; None without lesions."""
        return _sensitivity(self._lesion_scores(None))

    @property
    def false_positives_per_case(self) -> float | None:
        """False positive components of all labels, per case; None without cases."""
        return self._false_positives_per_case(None)

    @property
    def mean_lesion_dice(self) -> float | None:
        """Mean Dice over all reference lesions, missed ones 0; None without lesions."""
        return _mean_lesion_dice(self._lesion_scores(None))

    def table(self) -> list[Row]:
        """One row per case and label: case, label, name, every metric, volumes, lesion counts."""
        rows: list[Row] = []
        for case in self.cases:
            lesions = {score.label: score for score in case.lesions}
            for score in case.labels:
                row: Row = {"case": case.case, **score.model_dump()}
                if score.label in lesions:
                    found = lesions[score.label]
                    row["n_lesions"] = found.n_reference
                    row["n_detected"] = found.n_detected
                    row["n_false_positives"] = found.n_false_positives
                rows.append(row)
        return rows

    def summary(self) -> list[Row]:
        """One row per label, then one over all: means over cases, and lesions taken together.

        Columns: label (None in the last row), name, n_cases, n_defined (cases with a defined Dice),
        every metric, sensitivity, false_positives_per_case, mean_lesion_dice.
        """
        names = {score.label: score.name for case in self.cases for score in case.labels}
        rows: list[Row] = []
        for label, name in [*sorted(names.items()), (None, "all")]:
            lesions = self._lesion_scores(label)
            row: Row = {
                "label": label,
                "name": name,
                "n_cases": len(self.cases),
                "n_defined": self.n_defined("dice", label),
            }
            row |= {metric: self.mean(metric, label) for metric in METRICS}
            row["sensitivity"] = _sensitivity(lesions)
            row["false_positives_per_case"] = self._false_positives_per_case(label)
            row["mean_lesion_dice"] = _mean_lesion_dice(lesions)
            rows.append(row)
        return rows

    def save(self, path: str | Path) -> Path:
        """Write the scores as JSON; the file appears whole or not at all.

        Raises:
            DataError: if it cannot be written.
        """
        return write_text_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read scores.

        Raises:
            DataError: if the file is missing, is no JSON, or says something impossible.
        """
        hint = "`effseg evaluate` writes them"
        return load_model(cls, path, error=DataError, what="scores", hint=hint)

    def _of(self, label: int) -> list[LabelScore]:
        return [score for case in self.cases for score in case.labels if score.label == label]

    def _lesion_scores(self, label: int | None) -> list[LesionScore]:
        return [
            score
            for case in self.cases
            for score in case.lesions
            if label is None or score.label == label
        ]

    def _false_positives_per_case(self, label: int | None) -> float | None:
        if not self.cases:
            return None
        return sum(score.n_false_positives for score in self._lesion_scores(label)) / len(
            self.cases
        )


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _sensitivity(scores: list[LesionScore]) -> float | None:
    n = sum(score.n_reference for score in scores)
    return sum(score.n_detected for score in scores) / n if n else None


def _mean_lesion_dice(scores: list[LesionScore]) -> float | None:
    return _mean(lesion.dice for score in scores for lesion in score.lesions)
