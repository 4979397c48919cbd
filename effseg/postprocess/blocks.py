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
        table = _rows(some, labels, sums, first_id=first_id)
        # a part may lack some of the block's components: number those it has
        tables.append(table.joined(np.unique(some.numbers, return_inverse=True)[1]))
    if len(tables) == 1:
        return tables[0]
    parts = ComponentTable.concatenated(tables)
    return parts.joined(parts.ids - first_id)


def _rows(
    runs: Runs, labels: Array, probability_sums: FloatArray | None, *, first_id: int
) -> ComponentTable:
    """Each run as a row."""
    lengths = runs.lengths
    z, y, x = np.unravel_index(runs.starts, labels.shape)
    return ComponentTable(
        ids=first_id + runs.rows,
        labels=labels.reshape(-1)[runs.starts],
        n_voxels=lengths,
        starts=np.stack([z, y, x], axis=1),
        stops=np.stack([z + 1, y + 1, x + lengths], axis=1),
        # along x the mean of the first and the last index, which is whole or a half
        index_sums=np.stack(
            [z * lengths, y * lengths, (2 * x + lengths - 1) * lengths // 2], axis=1
        ),
        probability_sums=probability_sums,
    )
