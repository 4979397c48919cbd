"""What can be made of logits beside labels: probabilities, and how sure they are."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from effseg.resample.axis import Float32Array


@dataclass(frozen=True)
class Maps:
    """The maps that are wanted, in their order.

    Attributes:
        classes: whose probabilities, by index; the softmax of the interpolated logits, or each
            one's sigmoid.
        entropy: whether, behind these, the entropy of all classes' probabilities, in nats; of
            sigmoids the sum of each class's.
        confidence: whether, behind that, the probability of the most probable class.
        margin: whether, last, how far the largest logit but the first class's is above that one;
            minus infinity outside the source's field of view.
        one_vs_rest: whether each class has a sigmoid of its own.
    """

    classes: tuple[int, ...] = ()
    entropy: bool = False
    confidence: bool = False
    margin: bool = False
    one_vs_rest: bool = False

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.classes) + self.entropy + self.confidence + self.margin

    @property
    def outside(self) -> Float32Array:
        """What each is where nothing was seen: surely the first class."""
        sure = [
            *(index == 0 for index in self.classes),
            *[0] * self.entropy,
            *[1] * self.confidence,
        ]
        return np.array([*sure, *[-np.inf] * self.margin], dtype=np.float32)

    def of(self, logits: Float32Array) -> Float32Array:
        """The maps (maps, voxels) of logits (voxels, classes)."""
        result = np.empty((self.n, len(logits)), dtype=np.float32)
        if self.margin:
            np.subtract(logits[:, 1:].max(axis=1), logits[:, 0], out=result[-1])
        if not (self.classes or self.entropy or self.confidence):
            return result
        if self.one_vs_rest:
            return self._of_sigmoids(logits, result)
        shifted = logits - logits.max(axis=1, keepdims=True)
        shares = np.exp(shifted)
        total = shares.sum(axis=1)
        for row, index in zip(result, self.classes, strict=False):
            np.divide(shares[:, index], total, out=row)
        if self.entropy:
            shifted *= shares
            row = result[len(self.classes)]
            np.subtract(np.log(total), shifted.sum(axis=1) / total, out=row)
            np.maximum(row, 0, out=row)
        if self.confidence:  # shares are relative to that of the most probable class
            np.reciprocal(total, out=result[len(self.classes) + self.entropy])
        return result

    def _of_sigmoids(self, logits: Float32Array, result: Float32Array) -> Float32Array:
        for row, index in zip(result, self.classes, strict=False):
            expit(logits[:, index], out=row)
        if self.entropy:
            result[len(self.classes)] = binary_entropy(logits).sum(axis=1)
        if self.confidence:
            expit(logits.max(axis=1), out=result[len(self.classes) + self.entropy])
        return result

    def running(self, first: Float32Array) -> "RunningMaps":
        """The same maps where logits come class by class, from the first class's on."""
        kind = RunningSigmoids if self.one_vs_rest else RunningSoftmax
        return kind(first, self)


def binary_entropy(logits: Float32Array) -> Float32Array:
    """Of the sigmoid of each logit, in nats: log(1 + e^-|z|) + |z| / (1 + e^|z|)."""
    size = np.abs(logits)
    entropy: Float32Array = np.log1p(np.exp(-size))
    entropy += size * expit(-size)
    return entropy


class RunningMaps(ABC):
    """Maps of logits that come class by class; all arrays are of one shape."""

    def __init__(self, first: Float32Array, wanted: Maps) -> None:
        """Start with the first class."""
        self._wanted = wanted
        self._first = first.copy() if wanted.margin else None
        self._rival: Float32Array | None = None  # the largest but the first
        self._largest = first.copy()
        self._kept = {0: first.copy()} if 0 in wanted.classes else {}
        self._n = 1

    def add(self, logits: Float32Array) -> None:
        """Take the next class."""
        if self._first is not None:
            self._rival = logits.copy() if self._rival is None else np.maximum(self._rival, logits)
        self._sum_up(logits)
        if self._n in self._wanted.classes:
            self._kept[self._n] = logits.copy()
        self._n += 1

    def maps(self) -> Float32Array:
        """The maps, (maps, *shape)."""
        result = np.empty((self._wanted.n, *self._largest.shape), dtype=np.float32)
        for row, index in zip(result, self._wanted.classes, strict=False):
            self._probability(self._kept[index], out=row)
        if self._wanted.entropy:
            np.maximum(self._entropy(), 0, out=result[len(self._wanted.classes)])
        if self._wanted.confidence:
            row = result[len(self._wanted.classes) + self._wanted.entropy]
            self._probability(self._largest, out=row)
        if self._first is not None and self._rival is not None:
            np.subtract(self._rival, self._first, out=result[-1])
        return result

    @abstractmethod
    def _sum_up(self, logits: Float32Array) -> None:
        """Take the next class into the largest logit and the sums."""

    @abstractmethod
    def _probability(self, logits: Float32Array, *, out: Float32Array) -> None:
        """Of the class that has these logits."""

    @abstractmethod
    def _entropy(self) -> Float32Array:
        """Of all classes."""


class RunningSoftmax(RunningMaps):
    """Probabilities that sum to one.

    Sums are kept relative to the largest logit so far, as in Milakov and Gimelshein, "Online
    normalizer calculation for softmax" (2018).
    """

    def __init__(self, first: Float32Array, wanted: Maps) -> None:
        """Start with the first class."""
        super().__init__(first, wanted)
        self._total = np.ones_like(first)
        self._weighted = np.zeros_like(first)  # of shares and their distance from the largest

    def _sum_up(self, logits: Float32Array) -> None:
        largest = np.maximum(self._largest, logits)
        gap = self._largest - largest
        before, share = np.exp(gap), np.exp(logits - largest)
        if self._wanted.entropy:
            self._weighted = before * (self._weighted + gap * self._total)
            self._weighted += share * (logits - largest)
        self._total = before * self._total + share
        self._largest = largest

    def _probability(self, logits: Float32Array, *, out: Float32Array) -> None:
        np.divide(np.exp(logits - self._largest), self._total, out=out)

    def _entropy(self) -> Float32Array:
        entropy: Float32Array = np.log(self._total) - self._weighted / self._total
        return entropy


class RunningSigmoids(RunningMaps):
    """A sigmoid for each class."""

    def __init__(self, first: Float32Array, wanted: Maps) -> None:
        """Start with the first class."""
        super().__init__(first, wanted)
        self._summed = binary_entropy(first) if wanted.entropy else first

    def _sum_up(self, logits: Float32Array) -> None:
        np.maximum(self._largest, logits, out=self._largest)
        if self._wanted.entropy:
            self._summed += binary_entropy(logits)

    def _probability(self, logits: Float32Array, *, out: Float32Array) -> None:
        expit(logits, out=out)

    def _entropy(self) -> Float32Array:
        return self._summed
