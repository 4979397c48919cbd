"""Slabs of a volume on their way into one file."""

import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np

from effseg.errors import DataError
from effseg.files import written_whole
from effseg.io.journal import Task, Unfinished
from effseg.io.layout import FileLayout
from effseg.io.payload import BLOCK_BYTES
from effseg.io.voxel_stream import Seam, VoxelStream, blocks, planes_a_block
from effseg.types import Array


class FileSlabs:
    """The slabs of a volume, in order, as one file takes them.

    Along z they go straight into the file. Along another axis they are staged first, unpacked, in
    a nameless file of the same folder.

    Args:
        layout: of the file.
        axis: of the grid along which slabs come.
        task: what is being written, where it is to be resumed; None: it is not.
    """

    def __init__(self, layout: FileLayout, *, axis: int, task: Task | None) -> None:
        self._layout = layout
        self._axis = axis
        self._task = task
        self._target = Path(os.path.realpath(layout.path))
        self._unfinished: Unfinished | None = None

    def begin(self, stack: ExitStack) -> int:
        """Open what is written to; how many planes are there already.

        Args:
            stack: closes it, and takes away what is not to be left behind.

        Raises:
            DataError: if an unfinished file is of another task.
            OSError: if the file cannot be begun.
        """
        self._target.parent.mkdir(parents=True, exist_ok=True)
        last = None
        if self._task is not None:
            self._unfinished = Unfinished(self._target, self._task)
            last = self._unfinished.last
            self._file = stack.enter_context(self._unfinished.opened())
        elif self._axis == 0:
            self._partial = stack.enter_context(written_whole(self._target))
            self._file = stack.enter_context(self._partial.open("xb"))
        else:
            staged = TemporaryFile(dir=self._target.parent)  # noqa: SIM115 - the stack closes it
            self._file = stack.enter_context(staged)
        self._stream = self._streamed(self._file, last.seam if last else None)
        return last.stop if last else 0

    def add(self, start: int, stop: int, array: Array) -> None:
        """Write the planes from `start` to `stop`, with those before there already.

        Raises:
            OSError: if they cannot be written.
        """
        for block in blocks(np.moveaxis(array, self._axis, 0), self._layout.dtype):
            self._stream.append(block)
        if self._unfinished is not None:
            self._unfinished.add(start, stop, self._stream.seam())

    def finish(self) -> None:
        """Compare what was written with what was meant, and let it have its name.

        Raises:
            DataError: if it is not what was meant.
            OSError: if it cannot be finished.
        """
        if self._axis != 0:
            self._finish_staged()
            return
        self._stream.end()
        self._file.close()
        if self._unfinished is None:
            self._layout.verify(self._partial, self._stream.checksum)
            return
        try:
            self._layout.verify(self._unfinished.partial, self._stream.checksum)
        except DataError:
            self._unfinished.remove()  # nothing to go on with
            raise
        self._unfinished.put_in_place(self._unfinished.partial)

    def _streamed(self, file: BinaryIO, seam: Seam | None) -> VoxelStream:
        if self._axis == 0:
            return self._layout.stream(file, seamed=self._unfinished is not None, seam=seam)
        return VoxelStream(file, b"", packed="", seam=seam)

    def _finish_staged(self) -> None:
        self._check_stage()
        voxels = self._unstaged()
        if self._unfinished is None:
            self._layout.write(voxels)
            return
        whole = self._target.with_name(f".{self._target.name}.whole")
        try:
            self._layout.write_to(whole, voxels)
            self._file.close()
            self._unfinished.put_in_place(whole)
        finally:
            whole.unlink(missing_ok=True)

    def _check_stage(self) -> None:
        """Read back what was staged, as a file is."""
        self._file.flush()
        self._file.seek(0)
        again = 0
        while block := self._file.read(BLOCK_BYTES):
            again = zlib.crc32(block, again)
        if again != self._stream.checksum:
            if self._unfinished is not None:
                self._unfinished.remove()
            raise DataError(
                f"{self._layout.path}: its staged voxels are not what was written, is the disk "
                "full?"
            )

    def _unstaged(self) -> Iterator[memoryview]:
        """The staged voxels in the order of the file, a block of planes at a time.

        Read, not mapped: of a mapped file the system keeps far more resident than is asked for.
        """
        shape, dtype = self._layout.grid.shape, self._layout.dtype
        row_bytes = shape[3 - self._axis] * dtype.itemsize
        block = np.empty((min(planes_a_block(shape), shape[0]), *shape[1:]), dtype=dtype)
        for first in range(0, shape[0], len(block)):
            planes = block[: shape[0] - first]
            for index, part in enumerate(np.moveaxis(planes, self._axis, 0)):
                self._file.seek((index * shape[0] + first) * row_bytes)
                rows = np.frombuffer(self._file.read(len(planes) * row_bytes), dtype=dtype)
                part[...] = rows.reshape(part.shape)
            yield from blocks(planes, dtype)
