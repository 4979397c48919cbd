"""One block of planes: its runs, and the table of its components."""

import numpy as np

from effseg.postprocess.components import number_components
from effseg.postprocess.runs import Runs, find_runs
from effseg.postprocess.table import ComponentTable
from effseg.types import Array, FloatArray

RUNS_AT_ONCE = 1 << 16
"""A run takes over 100 bytes as a row, and noise has a run every few voxels."""


def numbered_runs(labels: Array) -> Runs:
    """The runs of a block with foreground, numbered by component."""
    starts, lengths = find_runs(labels)
    z, y, x = np.unravel_index(starts, labels.shape)
    corner = (int(z[0]), int(y.min()), int(x.min()))
    box = (
        slice(corner[0], int(z[-1]) + 1),
        slice(corner[1], int(y.max()) + 1),
        slice(corner[2], int((x + lengths).max())),
    )
    numbers = number_components(labels[box])
    return Runs(starts, lengths, numbers[z - corner[0], y - corner[1], x - corner[2]])


def tabulate(
    runs: Runs, labels: Array, probability: Array | None, *, first_id: int
) -> ComponentTable:
    """The components of a block, from its runs; ids from `first_id` on."""
    inside = None if probability is None else probability[labels != 0].astype(np.float64)
    n_before = 0
    tables = []
    for first in range(0, len(runs), RUNS_AT_ONCE):
        some = runs.part(slice(first, first + RUNS_AT_ONCE))
        sums = None
        if inside is not None:
            offsets = n_before + np.cumsum(some.lengths) - some.lengths
            n_before += int(some.lengths.sum())
            sums = np.add.reduceat(inside[:n_before], offsets)
        tables.append(_summed(some, labels, sums, first_id=first_id))
    if len(tables) == 1:
        return tables[0]
    parts = ComponentTable.concatenated(tables)
    return parts.joined(parts.ids - first_id)


def _summed(
    runs: Runs, labels: Array, probability_sums: FloatArray | None, *, first_id: int
) -> ComponentTable:
    """A row for each component that some runs belong to; nothing is sorted."""
    z, y, x = np.unravel_index(runs.starts, labels.shape)
    lengths, numbers = runs.lengths, runs.rows
    present = np.flatnonzero(np.bincount(numbers))  # a part may lack some of the block's
    places = np.zeros(present[-1] + 1, dtype=np.int64)
    places[present] = np.arange(present.size)
    group = places[numbers]

    def total(values: Array) -> FloatArray:
        sums = np.bincount(group, weights=values, minlength=present.size)
        return np.asarray(sums, dtype=np.float64)

    def whole(values: Array) -> Array:
        return total(values).astype(np.int64)  # exact: far below 2^53

    labels_of = np.empty(present.size, dtype=labels.dtype)
    labels_of[group] = labels.reshape(-1)[runs.starts]
    starts = np.full((3, present.size), np.iinfo(np.int64).max)
    stops = np.zeros((3, present.size), dtype=np.int64)
    for low, high, first, last in zip(
        starts, stops, (z, y, x), (z, y, x + lengths - 1), strict=True
    ):
        np.minimum.at(low, group, first)
        np.maximum.at(high, group, last + 1)
    # along x the mean of the first and the last index, which is whole or a half
    means = (z * lengths, y * lengths, (2 * x + lengths - 1) * lengths // 2)
    return ComponentTable(
        ids=first_id + present,
        labels=labels_of,
        n_voxels=whole(lengths),
        starts=starts.T,
        stops=stops.T,
        index_sums=np.stack([whole(sums) for sums in means], axis=1),
        probability_sums=None if probability_sums is None else total(probability_sums),
    )
