"""Components in columns: sums and extremes that parts of one component can be joined by."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from effseg.types import Array, FloatArray, Slices3


@dataclass(frozen=True)
class Component:
    """One 26-connected region of one label.

    Attributes:
        label: the label map's value in it.
        n_voxels: its size.
        volume_mm3: its volume.
        box: the smallest box around it, (z, y, x).
        centroid_index: mean voxel index (z, y, x) of its voxels, fractional.
        mean_probability: over its voxels; None where no probabilities were given.
    """

    label: int
    n_voxels: int
    volume_mm3: float
    box: Slices3
    centroid_index: tuple[float, float, float]
    mean_probability: float | None = None


@dataclass(frozen=True)
class ComponentTable:
    """One row a component, or a part of one.

    Everything is a count, a sum or an extreme, so the row of a whole follows from the rows of its
    parts, in any order; sums of indices are whole numbers, so exactly.

    Attributes:
        ids: (n,) whole numbers; of parts the lowest stands for the whole.
        labels: (n,) of the label map's type.
        n_voxels: (n,)
        starts: (n, 3) the lowest index along (z, y, x).
        stops: (n, 3) one past the highest.
        index_sums: (n, 3) over the voxels.
        probability_sums: (n,) over the voxels; None where no probabilities were given.
    """

    ids: Array
    labels: Array
    n_voxels: Array
    starts: Array
    stops: Array
    index_sums: Array
    probability_sums: FloatArray | None

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def empty(cls) -> Self:
        """No row."""
        none, triples = np.zeros(0, dtype=np.int64), np.zeros((0, 3), dtype=np.int64)
        return cls(none, none, none, triples, triples, triples, None)

    @classmethod
    def concatenated(cls, tables: Sequence[Self]) -> Self:
        """The rows of at least one table, one below the other; all with probabilities or none."""
        sums = [table.probability_sums for table in tables if table.probability_sums is not None]
        return cls(
            ids=np.concatenate([table.ids for table in tables]),
            labels=np.concatenate([table.labels for table in tables]),
            n_voxels=np.concatenate([table.n_voxels for table in tables]),
            starts=np.concatenate([table.starts for table in tables]),
            stops=np.concatenate([table.stops for table in tables]),
            index_sums=np.concatenate([table.index_sums for table in tables]),
            probability_sums=np.concatenate(sums) if sums else None,
        )

    def rows(self, which: Array) -> Self:
        """Some rows: indices, or one bool a row."""
        sums = self.probability_sums
        return replace(
            self,
            ids=self.ids[which],
            labels=self.labels[which],
            n_voxels=self.n_voxels[which],
            starts=self.starts[which],
            stops=self.stops[which],
            index_sums=self.index_sums[which],
            probability_sums=None if sums is None else sums[which],
        )

    def joined(self, groups: Array) -> Self:
        """One row for each group of rows.

        Args:
            groups: (n,) the number of each row's group; the numbers from 0 to the highest all
                occur. Rows of one group have one label.

        Returns:
            Row g stands for group g.
        """
        rows = self.rows(np.argsort(groups, kind="stable"))
        firsts = np.cumsum(np.bincount(groups)) - np.bincount(groups)
        sums = rows.probability_sums
        return replace(
            rows,
            ids=np.minimum.reduceat(rows.ids, firsts),
            labels=rows.labels[firsts],
            n_voxels=np.add.reduceat(rows.n_voxels, firsts),
            starts=np.minimum.reduceat(rows.starts, firsts),
            stops=np.maximum.reduceat(rows.stops, firsts),
            index_sums=np.add.reduceat(rows.index_sums, firsts),
            probability_sums=None if sums is None else np.add.reduceat(sums, firsts),
        )

    def shifted(self, corner: tuple[int, int, int]) -> Self:
        """The same components in a larger array, in which theirs begins at `corner`."""
        return replace(
            self,
            starts=self.starts + corner,
            stops=self.stops + corner,
            index_sums=self.index_sums + self.n_voxels[:, None] * np.array(corner),
        )

    def components(self, voxel_mm3: float) -> tuple[Component, ...]:
        """The rows as components, given the volume of one voxel."""
        centroids = self.index_sums / self.n_voxels[:, None]
        means = (
            [None] * len(self)
            if self.probability_sums is None
            else (self.probability_sums / self.n_voxels).tolist()
        )
        columns = (self.labels, self.n_voxels, self.starts, self.stops, centroids)
        return tuple(
            Component(
                label=int(label),
                n_voxels=n,
                volume_mm3=n * voxel_mm3,
                box=(slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2])),
                centroid_index=(centroid[0], centroid[1], centroid[2]),
                mean_probability=mean,
            )
            for label, n, start, stop, centroid, mean in zip(
                *(column.tolist() for column in columns), means, strict=True
            )
        )
