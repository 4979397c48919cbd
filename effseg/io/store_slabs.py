"""Slabs of a volume on their way into a Zarr store, a row of whole chunks at a time."""

import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from effseg.errors import DataError
from effseg.files import sync, written_whole
from effseg.io.journal import Task, Unfinished
from effseg.io.ome import LEVEL
from effseg.io.store import import_zarr
from effseg.io.store_layout import ROW_PLANES, StoreLayout, rows
from effseg.io.voxel_stream import Seam
from effseg.types import Array
from effseg.volume import Grid


class StoreSlabs:
    """The slabs of a volume, in order, as a Zarr store takes them.

    Args:
        layout: of the store, without an axis of channels.
        axis: of the grid along which slabs come.
        task: what is being written, where it is to be resumed; None: it is not.
    """

    def __init__(self, layout: StoreLayout, *, axis: int, task: Task | None) -> None:
        self._layout = layout
        self._axis = axis
        self._task = task
        self._target = Path(os.path.realpath(layout.path))
        self._unfinished: Unfinished | None = None

    def begin(self, stack: ExitStack) -> int:
        """Open what is written to; how many planes are there already, whole rows of chunks.

        Args:
            stack: takes away what is not to be left behind.

        Raises:
            DataError: if an unfinished store is of another task, or cannot be read.
            OSError: if the store cannot be begun.
        """
        self._target.parent.mkdir(parents=True, exist_ok=True)
        last = None
        if self._task is None:
            self._partial = stack.enter_context(written_whole(self._target))
        else:
            self._unfinished = Unfinished(self._target, self._task)
            self._partial, last = self._unfinished.partial, self._unfinished.last
        if last is None:
            array = self._layout.create(self._partial, axis=self._axis)
            if self._unfinished is not None:
                for path in (*self._partial.rglob("zarr.json"), self._partial):
                    sync(path)
        else:
            array = _reopened(self._partial)
        seam = Seam(0, 0, 0) if last is None else last.seam
        start = 0 if last is None else last.stop
        self._rows = _Rows(array, (), axis=self._axis, start=start, seam=seam)
        return start

    def add(self, start: int, stop: int, array: Array) -> None:  # noqa: ARG002 - as of `FileSlabs`
        """Take the planes from `start` to `stop`; what fills a row of chunks is written.

        Raises:
            OSError: if it cannot be.
        """
        for first, last in self._rows.add(array):
            if self._unfinished is not None:
                self._sync(first // ROW_PLANES)
                self._unfinished.add(first, last, self._rows.seam)

    def finish(self) -> None:
        """Compare what was written with what was meant, and let it have its name.

        Raises:
            DataError: if it is not what was meant.
            OSError: if it cannot be finished.
        """
        checksum = self._rows.seam.checksum
        try:
            self._layout.verify(self._partial, checksum, axis=self._axis)
        except DataError:
            if self._unfinished is not None:
                self._unfinished.remove()  # nothing to go on with
            raise
        if self._unfinished is not None:
            self._unfinished.put_in_place(self._partial)

    def _sync(self, row: int) -> None:
        """Bring the chunks of a row to the disk; those that hold zeros alone have no file."""
        parts = ["*", "*", "*"]
        parts[self._axis] = str(row)
        chunks = self._partial / LEVEL / "c"
        files = list(chunks.glob("/".join(parts)))
        folders = {path.parent for path in files}
        folders |= {path.parent for path in folders} | {chunks, chunks.parent}
        for path in (*files, *folders):
            sync(path)


class _Rows:
    """Planes gathered into rows of chunks.

    Args:
        array: zarr's.
        lead: where in it they go, before (z, y, x).
        axis: of (z, y, x) along which they come.
        start: the first.
        seam: what was there before; its `n_bytes` and `n_plain` are the same.
    """

    def __init__(
        self, array: Any, lead: tuple[int, ...], *, axis: int, start: int, seam: Seam
    ) -> None:
        self.seam = seam
        self._array = array
        self._lead = lead
        self._axis = axis
        shape = list(array.shape[-3:])
        self._n_planes = shape.pop(axis)
        self._row = np.empty((min(ROW_PLANES, self._n_planes), *shape), dtype=array.dtype)
        self._start, self._n = start, 0

    def add(self, planes: Array) -> Iterator[tuple[int, int]]:
        """Take planes; each row that is written by that, from where to where."""
        turned, taken = np.moveaxis(planes, self._axis, 0), 0
        while taken < len(turned):
            n = min(len(turned) - taken, len(self._row) - self._n)
            self._row[self._n : self._n + n] = turned[taken : taken + n]
            self._n, taken = self._n + n, taken + n
            stop = self._start + self._n
            if self._n == len(self._row) or stop == self._n_planes:
                first, row = self._start, self._row[: self._n]
                part = (slice(None),) * self._axis + (slice(first, stop),)
                self._array[(*self._lead, *part)] = np.moveaxis(row, 0, self._axis)
                checksum = zlib.crc32(row.reshape(-1).view(np.uint8).data, self.seam.checksum)
                n_bytes = self.seam.n_plain + row.nbytes
                self.seam = Seam(n_bytes, n_bytes, checksum)
                self._start, self._n = stop, 0
                yield first, stop


def write_store(layout: StoreLayout, array: Array) -> None:
    """Write an array, (z, y, x) or (C, z, y, x), as `StoreSlabs` does.

    Raises:
        DataError: if it is not what was meant; what was there before stays then.
        OSError: if it cannot be written; likewise.
    """
    with written_whole(layout.path) as partial:
        stored, seam = layout.create(partial, axis=0), Seam(0, 0, 0)
        for channel in range(layout.n_channels or 1):
            lead = () if layout.n_channels is None else (channel,)
            gathered = _Rows(stored, lead, axis=0, start=0, seam=seam)
            for part in rows(layout.grid, 0):
                for _ in gathered.add(array[(*lead, *part)]):
                    pass
            seam = gathered.seam
        layout.verify(partial, seam.checksum, axis=0)


def store_bytes(grid: Grid, itemsize: int) -> int:
    """What `StoreSlabs` takes beside the slabs, along whichever axis they come."""
    plane = grid.n_voxels // min(grid.shape)
    # a row, its chunks and what they are packed into; or, read back, the same and a row turned
    return 4 * min(ROW_PLANES, max(grid.shape)) * plane * itemsize


def _reopened(partial: Path) -> Any:
    """The array of an unfinished store, to write on."""
    zarr = import_zarr(partial)
    try:
        return zarr.open_group(partial, mode="r+")[LEVEL]
    except Exception as error:  # whatever zarr finds wrong with it
        raise DataError(
            f"{partial}: cannot be gone on with ({error}); remove it and its journal to begin anew"
        ) from error
