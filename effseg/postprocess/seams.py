"""What becomes one component where two blocks of planes meet."""

from array import array

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from effseg.postprocess.runs import Runs, touching
from effseg.postprocess.table import ComponentTable
from effseg.types import Array


class Seams:
    """Joins the components of blocks of planes that follow one another.

    Each component of a block gets an id when it comes. Where two of one label touch across a seam
    they become one row of a table, under the lower id; ids rise in raster order, so that is the
    one that holds the first voxel. A component that touches the last plane is open; every other is
    closed and never looked at again.
    """

    def __init__(self) -> None:
        self.n_planes = 0
        self.n_ids = 0
        self._parents = array("q")  # of each id, the one it first came under
        self._moved: list[tuple[Array, Array]] = []  # ids that later came under a lower one
        self._open: tuple[ComponentTable, Runs] | None = None  # the runs' numbers count rows from 1
        self._closed: list[ComponentTable] = []

    def add(
        self, table: ComponentTable, runs: Runs, *, n_planes: int, plane: tuple[int, int]
    ) -> None:
        """Take the next block.

        Args:
            table: its components, at their place in the whole and with ids from `n_ids` on.
            runs: its runs, numbered by the table's rows from 1.
            n_planes: its own.
            plane: voxels along (y, x).
        """
        plane_voxels, width = plane[0] * plane[1], plane[1]
        n_new = len(table)
        rows, groups = table, np.arange(n_new)
        if self._open is not None:
            earlier, frontier = self._open
            first_plane = runs.plane(0, plane_voxels)
            before, after = touching(frontier, first_plane, width)
            old, new = frontier.rows[before], first_plane.rows[after]
            same = earlier.labels[old] == table.labels[new]
            rows = ComponentTable.concatenated([earlier, table])
            groups = _groups(old[same], new[same] + len(earlier), n=len(rows))
        joined = rows.joined(groups)
        parents = joined.ids[groups]
        n_old = len(rows) - n_new
        under_lower = np.flatnonzero(parents[:n_old] != rows.ids[:n_old])
        if under_lower.size:
            self._moved.append((rows.ids[under_lower], parents[under_lower]))
        self._parents.frombytes(parents[n_old:].tobytes())
        self.n_ids += n_new
        self.n_planes += n_planes

        is_open = joined.stops[:, 0] == self.n_planes
        self._close(joined.rows(~is_open))
        self._open = None
        if is_open.any():
            last_plane = runs.plane(n_planes - 1, plane_voxels)
            numbers = np.cumsum(is_open)[groups[n_old:]]
            self._open = (
                joined.rows(is_open),
                last_plane.renumbered(numbers[last_plane.rows]),
            )

    def skip(self, n_planes: int) -> None:
        """Take planes without foreground."""
        self.close_all()
        self.n_planes += n_planes

    def close_all(self) -> None:
        """Nothing that is open will grow."""
        if self._open is not None:
            self._close(self._open[0])
            self._open = None

    def closed(self) -> ComponentTable:
        """What will not grow, ordered by first voxel."""
        if not self._closed:
            return ComponentTable.empty()
        table = ComponentTable.concatenated(self._closed)
        table = table.rows(np.argsort(table.ids))
        self._closed = [table]
        return table

    def roots(self) -> Array:
        """For each id the one that its component has in the table."""
        roots = np.array(self._parents, dtype=np.int64)
        for ids, lower in self._moved:
            roots[ids] = lower
        while True:  # halves the way each time
            further = roots[roots]
            if np.array_equal(further, roots):
                return roots
            roots = further

    def _close(self, table: ComponentTable) -> None:
        if len(table):
            self._closed.append(table)
        # Few tables and few copies of a row, the logarithm of how many rows there are of each.
        while len(self._closed) > 1 and len(self._closed[-2]) <= len(self._closed[-1]):
            self._closed[-2:] = [ComponentTable.concatenated(self._closed[-2:])]


def _groups(first: Array, second: Array, *, n: int) -> Array:
    """Number the groups into which pairs of n things bind them, from 0."""
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(n, n))
    groups: Array = connected_components(graph, directed=False)[1]
    return groups
