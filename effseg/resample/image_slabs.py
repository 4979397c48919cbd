"""An image that comes slab by slab onto a grid along the same axes."""

import math
from collections.abc import Iterator

import numpy as np

from effseg.resample.axis import Float32Array
from effseg.resample.boxes import IMAGE, target_boxes
from effseg.resample.image import interpolate_image
from effseg.resample.mapping import Passage, SeparableMapping
from effseg.resample.slabs import SLAB_PLANES, Slab, planes
from effseg.volume import Grid

_LIMIT_BYTES = 4 << 20  # of working memory: as in `resample_like`


def resample_slabs(
    slabs: Iterator[Slab], source: Grid, target: Grid, *, axis: int, start: int = 0
) -> Iterator[Slab]:
    """The voxels of `resample_like`, a few planes at a time, each as soon as all it needs has come.

    Args:
        slabs: (channels, z, y, x) of real numbers, in order along `axis`, from `first_needed` on.
        source: where their voxels lie.
        target: where the result's shall lie, its axes along those of `source`; beyond the source's
            field of view they are 0.
        axis: along which slabs come and go.
        start: the first plane that is wanted.

    Yields:
        (start, float32 (channels, z, y, x)), at most `SLAB_PLANES` planes.

    Raises:
        DataError: if a voxel is NaN or infinite.
    """
    mapping = parallel(source, target)
    weights = mapping.axes[axis]
    held: Float32Array | None = None
    first, done = 0, start
    for at, part in slabs:
        if held is None:
            held, first = part, at
        else:
            held = np.concatenate((held, part), axis=1 + axis)
        read = at + part.shape[1 + axis]
        del part  # or it would be held while the next is read
        ready = weights.ready(read)
        while done < ready:
            stop = min(ready, done + SLAB_PLANES)
            yield done, _resampled(held, first, mapping, axis=axis, part=(done, stop))
            done = stop
        needed = read
        if done < weights.inside[1]:
            needed = min(needed, int(weights.lows[done]))
        if needed > first:
            # a copy, so that the planes no longer needed are let go
            held = planes(held, axis, slice(needed - first, None)).copy()
            first = needed


def resampling_bytes(source: Grid, target: Grid, *, axis: int, n_channels: int) -> int:
    """What `resample_slabs` takes at most, slabs of `SLAB_PLANES` that it is given included."""
    mapping = parallel(source, target)
    held = min(mapping.axes[axis].n_source, SLAB_PLANES + mapping.axes[axis].taps.shape[1])
    given = (2 * held + SLAB_PLANES) * (source.n_voxels // source.shape[axis])
    made = min(SLAB_PLANES, target.shape[axis]) * (target.n_voxels // target.shape[axis])
    return _LIMIT_BYTES + 4 * n_channels * int(given + made)


def parallel(source: Grid, target: Grid) -> SeparableMapping:
    """The mapping between two grids whose axes run along each other's, in their own order."""
    passage = Passage.along(source, target)
    assert isinstance(passage.mapping, SeparableMapping)
    assert passage.target_axes.order == (0, 1, 2)
    assert not any(passage.target_axes.flips)
    return passage.mapping


def _resampled(
    held: Float32Array, first: int, mapping: SeparableMapping, *, axis: int, part: tuple[int, int]
) -> Float32Array:
    shape = list(mapping.shape)
    shape[axis] = part[1] - part[0]
    result = np.zeros((len(held), *shape), dtype=np.float32)
    within = list(mapping.inside)
    low, high = max(part[0], within[axis].start), min(part[1], within[axis].stop)
    within[axis] = slice(low, max(low, high))
    if math.prod(b.stop - b.start for b in within) == 0:
        return result
    for box in target_boxes(
        (within[0], within[1], within[2]),
        mapping,
        IMAGE.work,
        voxel_bytes=held.itemsize,
        limit_bytes=_LIMIT_BYTES,
    ):
        given = mapping.source_box(box)
        lies, target = list(given), list(box)
        lies[axis] = slice(given[axis].start - first, given[axis].stop - first)
        target[axis] = slice(box[axis].start - part[0], box[axis].stop - part[0])
        for channel, into in zip(held, result, strict=True):
            voxels = np.ascontiguousarray(channel[tuple(lies)])
            into[tuple(target)] = interpolate_image(
                voxels, mapping=mapping, given=given, wanted=box
            )
    return result
