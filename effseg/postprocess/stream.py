"""The components of a label map that arrives slab after slab and is never whole."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from effseg.errors import DataError
from effseg.plans import PostprocessConfig
from effseg.postprocess.blocks import numbered_runs, tabulate
from effseg.postprocess.components import check_labels
from effseg.postprocess.rules import Removal, judge
from effseg.postprocess.runs import Runs
from effseg.postprocess.seams import Seams
from effseg.postprocess.table import Component, ComponentTable
from effseg.types import Array

BLOCK_VOXELS = 1 << 21
"""Worked on at once: what a block takes does not grow with the slabs, and stays near the cache."""

COMPONENT_BYTES = 48 << 20
"""What a stream works with in all: a block of planes, and packed runs up to their limit."""
KEPT_IN_MEMORY_BYTES = 16 << 20
"""Of packed runs, before they move to a file: more than a torso with a hundred organs takes."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Planes with foreground, and where their runs are kept."""

    start: int  # first plane in its slab
    n_planes: int
    first_id: int  # of the component numbered 1
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class _Verdict:
    table: ComponentTable  # of all components, ordered by first voxel
    drop: Array  # a bool for each row
    removals: tuple[Removal, ...]


class ComponentStream:
    """Components of a label map from its slabs, and the cleaned slabs once all have been seen.

    The slabs follow one another along axis 0; how thick they are changes nothing. What is found
    and what is removed is what `label_components` and `remove_components` give for the whole,
    voxel for voxel and in the same order.

    Of the voxels only their runs are kept, packed, in memory first and then in a temporary file.
    Beside that it holds the block of planes it works on and about 250 bytes a component.

    ```
    with ComponentStream(grid.voxel_mm3, rule) as stream:
        for slab in slabs:
            stream.add(slab)
        removals = stream.finish()
        for slab in stream.cleaned():
            ...
    ```
    """

    def __init__(
        self,
        voxel_mm3: float,
        config: PostprocessConfig,
        *,
        folder: Path | None = None,
        memory_bytes: int = KEPT_IN_MEMORY_BYTES,
    ) -> None:
        """Start with no slab.

        Args:
            voxel_mm3: the volume of one voxel.
            config: the rules; with neither set nothing is removed.
            folder: where the temporary file goes; None: where the system has them.
            memory_bytes: how much of the packed runs stays in memory.

        Raises:
            DataError: if there is no such folder.
        """
        if folder is not None and not folder.is_dir():
            raise DataError(f"{folder}: no such folder for the runs of a label map; make it first")
        self._voxel_mm3 = voxel_mm3
        self._config = config
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - open until `close`
            max_size=max(memory_bytes, 1),  # 0 would set no limit
            dir=None if folder is None else str(folder),
        )
        self._seams = Seams()
        self._slabs: list[tuple[int, list[_Block]]] = []
        self._like: Array = np.zeros((0, 0, 0), np.uint8)  # no plane, of the slabs' kind
        self._with_probability = False
        self._verdict: _Verdict | None = None
        self.stored_bytes = 0
        """What the runs take, packed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the runs: there are no cleaned slabs any more. What was found stays."""
        self._file.close()

    def add(self, labels: Array, probability: Array | None = None) -> None:
        """Take the next slab.

        Args:
            labels: integer or bool, (z, y, x); not modified. Every slab has the same type and
                the same lengths along y and x; it may have any number of planes.
            probability: of each voxel's own label, in the labels' shape; for every slab or none.

        Raises:
            DataError: if the slab is no label map or does not fit those before it, if the stream
                was finished, or if the temporary file cannot be written.
        """
        self._check(labels, probability)
        blocks: list[_Block] = []
        self._slabs.append((len(labels), blocks))
        thickness = max(1, BLOCK_VOXELS // max(1, labels.shape[1] * labels.shape[2]))
        for start in range(0, len(labels), thickness):
            planes = slice(start, start + thickness)
            block = labels[planes]
            if block.any():
                shares = None if probability is None else probability[planes]
                blocks.append(self._add_block(block, shares, start=start))
            else:
                self._seams.skip(len(block))

    @property
    def components(self) -> tuple[Component, ...]:
        """Those that are finished, ordered by first voxel: they do not touch the last plane.

        No further slab can change them. Once the stream is finished: all.
        """
        return self._seams.closed().components(self._voxel_mm3)

    @property
    def kept(self) -> tuple[Component, ...]:
        """Those that are left in the cleaned slabs, ordered by first voxel; finishes the stream."""
        verdict = self._judge()
        return verdict.table.rows(~verdict.drop).components(self._voxel_mm3)

    def finish(self) -> tuple[Removal, ...]:
        """Decide, now that every slab was added; a second time gives the same.

        Returns:
            What each rule took, ordered by label.
        """
        return self._judge().removals

    def cleaned(self) -> Iterator[Array]:
        """The slabs as they were added, without the components that were removed.

        Finishes the stream. Holds one slab and one block at a time.
        """
        verdict = self._judge()
        left = np.where(verdict.drop, 0, verdict.table.labels)
        yield from self._painted(left.astype(self._like.dtype))

    def numbered(self) -> Iterator[Array]:
        """The component map, slab by slab: i + 1 where `components[i]` lies; uint32.

        Nothing is removed from it. Finishes the stream. Holds one slab and one block at a time.
        """
        yield from self._painted(np.arange(1, len(self._judge().table) + 1, dtype=np.uint32))

    def _painted(self, values: Array) -> Iterator[Array]:
        """Slabs with one value in each component, as ordered in the table of all."""
        by_id = np.zeros(self._seams.n_ids, dtype=values.dtype)
        by_id[self._judge().table.ids] = values
        by_id = by_id[self._seams.roots()]
        for n_planes, blocks in self._slabs:
            slab = np.zeros((n_planes, *self._like.shape[1:]), dtype=values.dtype)
            for block in blocks:
                self._file.seek(block.offset)
                runs = Runs.unpacked(self._file.read(block.n_bytes))
                inside = by_id[block.first_id + runs.rows]
                if inside.any():
                    planes = slab[block.start : block.start + block.n_planes]
                    planes[...] = runs.painted(inside, planes.size).reshape(planes.shape)
            yield slab

    def _check(self, labels: Array, probability: Array | None) -> None:
        check_labels(labels)
        if self._verdict is not None:
            raise DataError("a slab after the last one; add every slab before finishing the stream")
        if not self._slabs:
            self._like = labels[:0].copy()
            self._with_probability = probability is not None
        here = f"slab {len(self._slabs)}"
        if labels.dtype != self._like.dtype or labels.shape[1:] != self._like.shape[1:]:
            raise DataError(
                f"{here} has type {labels.dtype} and planes of {labels.shape[1:]} voxels; "
                f"expected {self._like.dtype} and {self._like.shape[1:]} as slab 0 has"
            )
        if (probability is not None) != self._with_probability:
            raise DataError(f"{here}: give probabilities with every slab or with none")
        if probability is not None and probability.shape != labels.shape:
            raise DataError(
                f"{here}: probabilities of shape {probability.shape}; expected that of the "
                f"labels, {labels.shape}"
            )

    def _add_block(self, block: Array, probability: Array | None, *, start: int) -> _Block:
        labels = np.require(block, block.dtype.newbyteorder("="), requirements=["C"])
        runs = numbered_runs(labels)
        first_id = self._seams.n_ids
        table = tabulate(runs, labels, probability, first_id=first_id)
        self._seams.add(
            table.shifted((self._seams.n_planes, 0, 0)),
            runs,
            n_planes=len(labels),
            plane=(labels.shape[1], labels.shape[2]),
        )
        packed = runs.packed()
        place = _Block(start, len(labels), first_id, self.stored_bytes, len(packed))
        try:
            self._file.write(packed)
        except OSError as error:
            raise DataError(
                f"the runs of a label map cannot be written ({error.strerror or error}); "
                "name a folder with more room, or keep more in memory"
            ) from error
        self.stored_bytes += len(packed)
        return place

    def _judge(self) -> _Verdict:
        if self._verdict is None:
            self._seams.close_all()
            table = self._seams.closed()
            drop, removals = judge(
                table.labels, table.n_voxels, voxel_mm3=self._voxel_mm3, config=self._config
            )
            self._verdict = _Verdict(table, drop, removals)
        return self._verdict
