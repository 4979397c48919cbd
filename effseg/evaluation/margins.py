"""Where to cut: the Dice of every threshold at once, from counts by how sure a prediction is.

A voxel's *margin* is the logit of its likeliest foreground label less that of the background. A
label is taken where the margin is above its cut, log(t / (1 - t)) for a threshold t on its
probability against the background's; so what is predicted of a label depends on its own threshold
alone, and counts of voxels by label and margin say all that Dice asks for. They are taken slab by
slab: no map of probabilities is ever whole in memory.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effseg.types import Array

N_BINS = 256
LARGEST = 8.0
"""Of the margins that are told apart: a probability of 0.9997."""
EDGES: npt.NDArray[np.float64] = np.linspace(-LARGEST, LARGEST, N_BINS, endpoint=False)[1:]
"""Between the bins of margins: the cuts to choose among. One of them is 0."""
NEUTRAL = N_BINS // 2 - 1
"""Its place among them: the largest logit is taken."""

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def bins_of(margins: Array) -> npt.NDArray[np.uint8]:
    """The bin of each margin, 0 to 255; of one on an edge the upper."""
    scaled = np.floor((np.asarray(margins, np.float32) + LARGEST) * (N_BINS / (2 * LARGEST)))
    result: npt.NDArray[np.uint8] = np.clip(scaled, 0, N_BINS - 1).astype(np.uint8)
    return result


def threshold_of(cut: int) -> float:
    """The probability that a cut, by its place among the edges, stands for."""
    return float(1 / (1 + np.exp(-EDGES[cut])))


@dataclass(frozen=True)
class MarginCounts:
    """What thresholds can be judged by of one case; labels by their index, background 0.

    Attributes:
        likeliest: voxels by likeliest label and bin, (labels, bins).
        hits: of these, the voxels whose reference is that label.
        reference: voxels of each label in the reference, (labels,).
    """

    likeliest: Counts
    hits: Counts
    reference: Counts

    @classmethod
    def none(cls, n_labels: int) -> "MarginCounts":
        """Of a case without a voxel."""
        shape = (n_labels, N_BINS)
        return cls(
            likeliest=np.zeros(shape, np.int64),
            hits=np.zeros(shape, np.int64),
            reference=np.zeros(n_labels, np.int64),
        )

    def add(self, codes: Array, reference: Array) -> None:
        """Count some planes.

        Args:
            codes: 256 times the likeliest label, and the margin's bin.
            reference: of the same shape, labels; other values, such as an ignore label's, mark
                voxels that do not count.
        """
        n_labels = len(self.reference)
        for plane, true in zip(codes, reference, strict=True):  # bincount takes 8 bytes a voxel
            counted = (true >= 0) & (true < n_labels)
            these, labels = plane[counted], true[counted]
            hit = these // N_BINS == labels
            for into, given in ((self.likeliest, these), (self.hits, these[hit])):
                into += np.bincount(given, minlength=into.size).reshape(into.shape)
            self.reference[:] += np.bincount(labels, minlength=n_labels)

    def dice(self) -> Floats:
        """Of each foreground label at each cut, (labels - 1, cuts).

        NaN where neither prediction nor reference has the label.
        """
        predicted, hits = (_above(counts[1:]) for counts in (self.likeliest, self.hits))
        either = predicted + self.reference[1:, None]
        dice: Floats = np.where(either > 0, 2 * hits / np.maximum(either, 1), np.nan)
        return dice


def _above(counts: Counts) -> Counts:
    """Of counts by bin, (labels, bins), how many are above each edge, (labels, edges)."""
    result: Counts = counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    return result


def labels_at(codes: Array, cuts: tuple[int, ...]) -> Array:
    """The labels, by index, that codes stand for at a cut for each foreground label."""
    index, bins = codes // N_BINS, codes % N_BINS
    least = np.array([0, *(cut + 1 for cut in cuts)], dtype=codes.dtype)
    labels = np.where(bins >= least[index], index, 0)
    return labels.astype(np.min_scalar_type(len(cuts)))


def best_cuts(dice: Floats) -> tuple[int, ...]:
    """The cut of each label with the largest mean Dice over cases.

    Of equal ones that which is nearest to the largest logit's; that one too where no case has a
    label.

    Args:
        dice: of each case, as `MarginCounts.dice` gives it, (cases, labels, cuts).
    """
    return tuple(_best(dice[:, label]) for label in range(dice.shape[1]))


def _best(dice: Floats) -> int:
    means = mean_defined(dice)
    if np.isnan(means).all():
        return NEUTRAL
    winners = np.flatnonzero(means >= np.nanmax(means) - 1e-12)
    return int(winners[np.abs(winners - NEUTRAL).argmin()])


def mean_defined(values: Floats) -> Floats:
    """The mean over the first axis of what is no NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis=0)
    n = known.sum(axis=0)
    means: Floats = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    return means
