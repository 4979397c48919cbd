"""Logits on one grid to a label map on another, slab by slab.

The label map is that of interpolated logits, not of interpolated labels. Logits of all classes
exist only for a box of the target at a time, and of the source only what the slabs have brought
and the target still needs.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from effseg.errors import DataError
from effseg.resample.axis import Float32Array
from effseg.resample.boxes import Work, target_boxes
from effseg.resample.mapping import Mapping, ObliqueMapping, Passage, SeparableMapping
from effseg.resample.maps import Maps
from effseg.resample.slabs import SLAB_PLANES, AffineHead, Slabs, planes
from effseg.types import Array, Shape3, Slices3
from effseg.volume import AxisOrder, Grid, Volume

logger = logging.getLogger("effseg")

LabelSlab: TypeAlias = tuple[Slices3, Array, Float32Array]
"""Where a slab lies, its labels, and the maps that were asked for, (maps, z, y, x)."""

_LEAST_BYTES = 2 << 20  # of working memory: as in `resample_like`
_CHANNEL_BYTES = 128 << 10  # and more for many channels, so that boxes do not shrink to their halo
_HEAD_VALUES = 1 << 16  # logits made at once: 256 KiB, which stay in the processor's cache


def logits_to_labels(
    logits: Array | Slabs, source: Grid, target: Grid, *, values: Sequence[int] | None = None
) -> Volume:
    """Resample logits onto a grid and take the class with the largest at each voxel.

    Args:
        logits: (classes, z, y, x) on `source`, or what comes slab by slab.
        source: where they lie.
        target: where the labels shall lie: any spacing, axis order and direction. Beyond the
            source's field of view they are the first class.
        values: the classes' labels; None: 0, 1, 2, ...

    Returns:
        A label map on `target`, in the smallest unsigned type that holds the labels. Of equal
        logits the first class has the voxel.

    Raises:
        DataError: if the logits are not on `source`, not finite, or not as many as `values`.
    """
    slabs = logits if isinstance(logits, Slabs) else Slabs.cut(logits)
    result: Array | None = None
    for box, labels, _ in label_slabs(slabs, source, target, values=values):
        if result is None:
            result = np.empty(target.shape, dtype=labels.dtype)
        result[box] = labels
    assert result is not None
    return Volume(array=result, grid=target)


def label_slabs(
    slabs: Slabs,
    source: Grid,
    target: Grid,
    *,
    values: Sequence[int] | None = None,
    start: int = 0,
    maps: Maps | None = None,
    cuts: Sequence[float] = (),
) -> Iterator[LabelSlab]:
    """The label map of `logits_to_labels` in slabs, each as soon as all it needs has come.

    Where the two grids' axes are not parallel, a slab of the target may need all of the source:
    then everything is waited for, and the log says so.

    Args:
        slabs: as of `logits_to_labels`; with `start`, from `first_needed` on.
        source: where they lie.
        target: where the labels shall lie.
        values: the classes' labels; None: 0, 1, 2, ...
        start: how many planes of the target are made already, along its axis that runs with the
            slabs' and in their direction.
        maps: what else is made of the logits; None: nothing.
        cuts: of each class but the first: the one with the largest logit of these has a voxel where
            that is further than its own cut above the first class's. Empty: 0 for each, which is
            the largest logit of all.

    Yields:
        Box of `target`, labels in it, and maps; the boxes tile the target along one of its axes,
        from either end.
    """
    if slabs.shape != source.shape:
        raise DataError(f"logits of {slabs.shape} voxels on a grid of {source.shape}")
    passage = Passage.along(source, target)
    if isinstance(passage.mapping, ObliqueMapping):
        logger.info(
            "the two grids are turned against each other: labels are made once all logits are there"
        )
        pieces = _at_once(slabs, passage.mapping, values, maps, cuts)
    else:
        pieces = _as_they_come(slabs, passage.mapping, values, start, maps, cuts)
    stored = passage.target_axes.inverse()
    for start, labels, made in pieces:
        box = [slice(0, n) for n in passage.mapping.shape]
        box[slabs.axis] = slice(start, start + labels.shape[slabs.axis])
        native = _native_box((box[0], box[1], box[2]), passage.mapping.shape, passage.target_axes)
        yield native, np.ascontiguousarray(stored.apply(labels)), stored.apply(made)
        del labels, made


def first_needed(source: Grid, target: Grid, *, axis: int, start: int) -> int:
    """Which plane of the source, along the slabs' axis, `label_slabs` needs first for `start`."""
    mapping = Passage.along(source, target).mapping
    if isinstance(mapping, ObliqueMapping) or start < mapping.axes[axis].inside[0]:
        return 0
    weights = mapping.axes[axis]
    if start >= weights.inside[1]:
        return weights.n_source - 1
    return int(weights.lows[start])


def needs(source: Grid, target: Grid) -> Callable[[Slices3], Slices3]:
    """Tells of a box of the source the box of the target, as stored, that it has a part in."""
    passage = Passage.along(source, target)

    def box_of_target(box: Slices3) -> Slices3:
        reached = passage.mapping.target_box(box)
        return _native_box(reached, passage.mapping.shape, passage.target_axes)

    return box_of_target


def labelling_bytes(
    source: Grid, target: Grid, *, axis: int, n_channels: int, label_bytes: int, n_maps: int = 0
) -> int:
    """What `label_slabs` takes at most, the slabs it is given and yields included.

    Args:
        source: where the logits lie.
        target: where the labels shall lie.
        axis: along which slabs come, of at most `SLAB_PLANES`.
        n_channels: of a slab.
        label_bytes: of one label.
        n_maps: beside the labels.
    """
    mapping = Passage.along(source, target).mapping
    working = _limit_bytes(n_channels) + 3 * 4 * _HEAD_VALUES
    given, made = source.shape[axis], mapping.shape[axis]
    if isinstance(mapping, SeparableMapping):
        weights = mapping.axes[axis]
        stops = [*range(SLAB_PLANES, weights.n_source, SLAB_PLANES), weights.n_source]
        ready = [0, *(weights.ready(stop) for stop in stops)]
        made = int(np.diff(ready).max()) + math.ceil(1 / weights.step)
        given = min(given, SLAB_PLANES + weights.taps.shape[1])
    # slabs held side by side while a copy is made of them; labels in both axis orders
    held = 2 * 4 * n_channels * given * source.n_voxels // source.shape[axis]
    labels = (2 * label_bytes + 4 * n_maps) * int(made) * target.n_voxels // mapping.shape[axis]
    return working + held + labels


def _at_once(
    slabs: Slabs,
    mapping: Mapping,
    values: Sequence[int] | None,
    maps: Maps | None,
    cuts: Sequence[float],
) -> Iterator[tuple[int, Array, Float32Array]]:
    whole = slabs.whole()
    labeller = _Labeller(mapping, slabs, len(whole), values, maps, cuts)
    yield 0, *labeller.labels(whole, 0, (0, mapping.shape[slabs.axis]))


def _as_they_come(
    slabs: Slabs,
    mapping: SeparableMapping,
    values: Sequence[int] | None,
    done: int,
    maps: Maps | None,
    cuts: Sequence[float],
) -> Iterator[tuple[int, Array, Float32Array]]:
    weights = mapping.axes[slabs.axis]
    labeller: _Labeller | None = None
    held: Float32Array | None = None
    first = 0  # of what is held
    for start, part in slabs.parts:
        if labeller is None:
            labeller, first = _Labeller(mapping, slabs, len(part), values, maps, cuts), start
        held = part if held is None else np.concatenate((held, part), axis=1 + slabs.axis)
        stop = start + part.shape[1 + slabs.axis]
        del part  # or it would be held while the next is made
        ready = weights.ready(stop)
        if ready > done:
            yield done, *labeller.labels(held, first, (done, ready))
            done = ready
        needed = stop if done >= weights.inside[1] else min(stop, int(weights.lows[done]))
        if needed > first:
            # a copy, so that the planes no longer needed are let go
            held = planes(held, slabs.axis, slice(needed - first, None)).copy()
            first = needed


class _Labeller:
    """Makes slabs of the label map, box by box.

    Args:
        mapping: from the source's voxels to the target's, both in the source's axis order.
        slabs: which axis they come along, and their head.
        n_channels: in a slab.
        values: the classes' labels.
        maps: what else is wanted.
        cuts: as `label_slabs` takes them.
    """

    def __init__(
        self,
        mapping: Mapping,
        slabs: Slabs,
        n_channels: int,
        values: Sequence[int] | None,
        maps: Maps | None,
        cuts: Sequence[float],
    ) -> None:
        n_classes = n_channels if slabs.head is None else slabs.head.n_classes
        self.values = tuple(range(n_classes)) if values is None else tuple(values)
        if len(self.values) != n_classes:
            raise DataError(f"{n_classes} logits a voxel; expected {len(self.values)}, one a label")
        if len(cuts) not in (0, n_classes - 1):
            raise DataError(f"{len(cuts)} cuts for {n_classes} classes; expected one less")
        self.mapping = mapping
        self.axis = slabs.axis
        self.head = slabs.head
        self.table = np.asarray(self.values, dtype=np.min_scalar_type(max(self.values)))
        # One channel's copy of the source and what its first axis leaves of it; two copies for the
        # other axes; then the largest logit, a rival and where it is larger, or all features.
        kept = 9 if slabs.head is None else 4 * n_channels + 1
        self.maps = maps or Maps()
        self.cuts = np.asarray(cuts, dtype=np.float32)
        kept += 4 * (self.maps.n + 4 + 2 * self.maps.margin) if self.maps.n else 0
        # of the first class, the margin over it, and the classes that have a cut each
        kept += 4 + 4 + 8 if self.cuts.size else 0
        self.work = Work(source_voxel_bytes=8, target_voxel_bytes=8 + kept)
        self.limit_bytes = _limit_bytes(n_channels)

    def labels(
        self, held: Float32Array, first: int, part: tuple[int, int]
    ) -> tuple[Array, Float32Array]:
        """One slab of the label map, and its maps.

        Args:
            held: (channels, z, y, x), all of the source that the slab needs.
            first: where along the slabs' axis `held` starts.
            part: target voxels along the slabs' axis.
        """
        shape = list(self.mapping.shape)
        shape[self.axis] = part[1] - part[0]
        result = np.full(shape, self.table[0], dtype=self.table.dtype)
        made = np.empty((self.maps.n, *shape), dtype=np.float32)
        made[...] = self.maps.outside[:, None, None, None]
        within = list(self.mapping.inside)
        inside = within[self.axis]
        low, high = max(part[0], inside.start), min(part[1], inside.stop)
        within[self.axis] = slice(low, max(low, high))
        for box in target_boxes(
            (within[0], within[1], within[2]),
            self.mapping,
            self.work,
            voxel_bytes=held.itemsize,
            limit_bytes=self.limit_bytes,
        ):
            lies = _from(box, self.axis, part[0])
            self._box(held, first, box, result[lies], made[(slice(None), *lies)])
        return result, made

    def _box(
        self, held: Float32Array, first: int, wanted: Slices3, result: Array, made: Float32Array
    ) -> None:
        outside = self.mapping.outside(wanted) if isinstance(self.mapping, ObliqueMapping) else None
        given = self.mapping.source_box(wanted)
        lies = _from(given, self.axis, first)
        channels = (
            self.mapping.apply(np.ascontiguousarray(plane[lies]), given=given, wanted=wanted)
            for plane in held
        )
        if self.head is None:
            labels, maps = self._largest(channels)
        else:
            features = np.empty((len(held), *(b.stop - b.start for b in wanted)), dtype=np.float32)
            for feature, channel in zip(features, channels, strict=True):
                feature[...] = channel
            labels, maps = self._classified(features, self.head)
        inside = True if outside is None else ~outside
        np.copyto(result, labels, where=inside)
        np.copyto(made, maps, where=inside)

    def _largest(self, channels: Iterator[Float32Array]) -> tuple[Array, Float32Array]:
        """Class by class with a running maximum."""
        best = np.array(next(channels))
        first = best.copy() if self.cuts.size else None
        labels = np.full(best.shape, self.table[0], dtype=self.table.dtype)
        chosen = np.zeros(best.shape, dtype=np.intp) if self.cuts.size else None
        running = self.maps.running(best) if self.maps.n else None
        for index, (value, rival) in enumerate(zip(self.table[1:], channels, strict=True)):
            if running is not None:
                running.add(rival)
            if chosen is not None and index == 0:
                labels[...], best[...] = value, rival  # the first class waits for the end
                continue
            larger = rival > best
            np.copyto(labels, value, where=larger)
            if chosen is not None:
                np.copyto(chosen, index, where=larger)
            np.maximum(best, rival, out=best)
        if first is not None and chosen is not None:
            np.subtract(best, first, out=first)
            labels[first <= self.cuts[chosen]] = self.table[0]
        if running is None:
            return labels, np.zeros((0, *best.shape), dtype=np.float32)
        return labels, running.maps()

    def _classified(self, features: Float32Array, head: AffineHead) -> tuple[Array, Float32Array]:
        """The head over a few voxels at a time."""
        rows = features.reshape(len(features), -1)
        labels = np.empty(rows.shape[1], dtype=self.table.dtype)
        maps = np.empty((self.maps.n, rows.shape[1]), dtype=np.float32)
        step = max(1, _HEAD_VALUES // head.n_classes)
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            logits = head.logits(rows[:, part])
            labels[part] = self.table[self._winners(logits)]
            if self.maps.n:
                maps[:, part] = self.maps.of(logits)
        shape = features.shape[1:]
        return labels.reshape(shape), maps.reshape(-1, *shape)

    def _winners(self, logits: Float32Array) -> Array:
        """The class that has a voxel, of logits (voxels, classes)."""
        if not self.cuts.size:
            largest: Array = logits.argmax(axis=1)
            return largest
        chosen = logits[:, 1:].argmax(axis=1)
        best = np.take_along_axis(logits[:, 1:], chosen[:, None], axis=1)[:, 0]
        return np.where(best - logits[:, 0] > self.cuts[chosen], chosen + 1, 0)


def _limit_bytes(n_channels: int) -> int:
    return max(_LEAST_BYTES, n_channels * _CHANNEL_BYTES)


def _from(box: Slices3, axis: int, start: int) -> Slices3:
    """The box counted from a place along an axis."""
    z, y, x = (
        slice(b.start - start, b.stop - start) if i == axis else b for i, b in enumerate(box)
    )
    return (z, y, x)


def _native_box(box: Slices3, shape: Shape3, axes: AxisOrder) -> Slices3:
    """Where a box of a volume in an axis order lies in the volume as it is stored."""
    native = [slice(0)] * 3
    for part, n, axis, flip in zip(box, shape, axes.order, axes.flips, strict=True):
        native[axis] = slice(n - part.stop, n - part.start) if flip else part
    return (native[0], native[1], native[2])
