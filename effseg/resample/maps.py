"""What can be made of logits beside labels: probabilities, and how sure they are."""

from dataclasses import dataclass

import numpy as np

from effseg.resample.axis import Float32Array


@dataclass(frozen=True)
class Maps:
    """The maps that are wanted, in their order.

    Attributes:
        classes: whose probabilities, by index; the softmax of the interpolated logits.
        entropy: whether, behind these, the entropy of all classes' probabilities, in nats.
        confidence: whether, behind that, the probability of the most probable class.
        margin: whether, last, how far the largest logit but the first class's is above that one;
            minus infinity outside the source's field of view.
    """

    classes: tuple[int, ...] = ()
    entropy: bool = False
    confidence: bool = False
    margin: bool = False

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


class RunningSoftmax:
    """The same where logits come class by class; all arrays are of one shape.

    Sums are kept relative to the largest logit so far, as in Milakov and Gimelshein, "Online
    normalizer calculation for softmax" (2018).
    """

    def __init__(self, first: Float32Array, wanted: Maps) -> None:
        """Start with the first class."""
        self._wanted = wanted
        self._first = first.copy() if wanted.margin else None
        self._rival: Float32Array | None = None  # the largest but the first
        self._largest = first.copy()
        self._total = np.ones_like(first)
        self._weighted = np.zeros_like(first)  # of shares and their distance from the largest
        self._kept = {0: first.copy()} if 0 in wanted.classes else {}
        self._n = 1

    def add(self, logits: Float32Array) -> None:
        """Take the next class."""
        if self._first is not None:
            self._rival = logits.copy() if self._rival is None else np.maximum(self._rival, logits)
        largest = np.maximum(self._largest, logits)
        gap = self._largest - largest
        before, share = np.exp(gap), np.exp(logits - largest)
        if self._wanted.entropy:
            self._weighted = before * (self._weighted + gap * self._total)
            self._weighted += share * (logits - largest)
        self._total = before * self._total + share
        self._largest = largest
        if self._n in self._wanted.classes:
            self._kept[self._n] = logits.copy()
        self._n += 1

    def maps(self) -> Float32Array:
        """The maps, (maps, *shape)."""
        result = np.empty((self._wanted.n, *self._total.shape), dtype=np.float32)
        for row, index in zip(result, self._wanted.classes, strict=False):
            np.divide(np.exp(self._kept[index] - self._largest), self._total, out=row)
        if self._wanted.entropy:
            entropy = np.log(self._total) - self._weighted / self._total
            np.maximum(entropy, 0, out=result[len(self._wanted.classes)])
        if self._wanted.confidence:
            row = result[len(self._wanted.classes) + self._wanted.entropy]
            np.reciprocal(self._total, out=row)
        if self._first is not None and self._rival is not None:
            np.subtract(self._rival, self._first, out=result[-1])
        return result
