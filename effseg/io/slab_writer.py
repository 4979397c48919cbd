"""A volume written slab by slab, as it is made."""

import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from effseg.errors import DataError
from effseg.files import written_whole
from effseg.io.journal import Task, Unfinished
from effseg.io.layout import FileLayout
from effseg.io.payload import BLOCK_BYTES
from effseg.io.voxel_stream import Seam, VoxelStream, blocks, planes_a_block
from effseg.io.writing import stored_dtype
from effseg.types import Array
from effseg.volume import Grid


class SlabWriter:
    """Writes a volume of one channel as `write_volume` does, slab by slab and in order.

    ```python
    with SlabWriter("labels.nii.gz", grid, np.uint8) as writer:
        for start, slab in slabs:
            writer.write(start, slab)
    ```

    Takes a few planes beside the caller's slab. The file appears when the block ends well and all
    slabs were there; otherwise nothing is left behind and what was there before stays. Its bytes
    do not depend on how thick the slabs are.

    Slabs along z go straight into the file. Along another axis they are staged first, unpacked,
    in a nameless file of the same folder: the disk has to hold both.

    With `resume`, a writer that is stopped, killed even, leaves hidden files beside the target,
    `.NAME.partial` and `.NAME.journal`, and the next one with `resume` goes on where it ended:
    `done` says where. Each slab is forced to the disk then, and packed without knowledge of those
    before it, so that such a file is a little larger and depends on how thick its slabs are, but
    not on whether and where the writer was stopped.

    Args:
        path: `.nii.gz`, `.nii`, `.nrrd` or `.mha`.
        grid: where all voxels lie.
        dtype: of the slabs. Integers and floats are kept, 64-bit ones too; bool becomes uint8,
            float16 becomes float32.
        axis: of the grid along which slabs come: 0 for z, 1 for y, 2 for x.
        resume: whether to go on where an earlier writer was stopped, and to leave what is finished
            when stopped.
        fingerprint: with `resume`, of whatever the voxels depend on: an unfinished file of another
            fingerprint, grid, type or axis is refused.

    Raises:
        DataError: if the format cannot hold the volume, or the name is that of something that is
            no file; on entering, if the file cannot be begun or an unfinished one is refused; on
            leaving, if slabs are missing, or the file is not what was meant (a full disk).
    """

    def __init__(
        self,
        path: str | Path,
        grid: Grid,
        dtype: npt.DTypeLike,
        *,
        axis: int = 0,
        resume: bool = False,
        fingerprint: str = "",
    ) -> None:
        path = Path(path)
        if axis not in (0, 1, 2):
            raise DataError(f"{path}: slabs along axis {axis}; expected 0 (z), 1 (y) or 2 (x)")
        self._given = np.dtype(dtype)
        self._layout = FileLayout.judged(path, grid, stored_dtype(path, self._given))
        self._axis = axis
        self._target = Path(os.path.realpath(path))
        self._task: Task | None = None
        self._left = "nothing was left behind"
        if resume:
            self._task = Task.of(
                self._target, grid, dtype=self._given.str, axis=axis, fingerprint=fingerprint
            )
            self._left = "finished slabs were kept: go on with resume"
        self._unfinished: Unfinished | None = None
        self._open: tuple[BinaryIO, VoxelStream] | None = None
        self._stack = ExitStack()
        self._done = 0

    @property
    def done(self) -> int:
        """How many planes are written: where the next slab has to start."""
        return self._done

    def __enter__(self) -> Self:
        with self._layout.explained(self._left), ExitStack() as stack:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            last = None
            if self._task is not None:
                self._unfinished = Unfinished(self._target, self._task)
                last = self._unfinished.last
                file = stack.enter_context(self._unfinished.opened())
            elif self._axis == 0:
                self._partial = stack.enter_context(written_whole(self._target))
                file = stack.enter_context(self._partial.open("xb"))
            else:
                file = stack.enter_context(TemporaryFile(dir=self._target.parent))
            self._open = file, self._stream(file, last.seam if last else None)
            self._done = last.stop if last else 0
            self._stack = stack.pop_all()
        return self

    def write(self, start: int, array: Array) -> None:
        """Write the slab that starts at plane `start`.

        Raises:
            DataError: if it is not the next, has another shape or type, or cannot be written.
        """
        if self._open is None:
            raise DataError(f"{self._layout.path}: not open; write inside of a with block")
        _, stream = self._open
        stop = self._checked_stop(start, array)
        with self._layout.explained(self._left):
            for block in blocks(np.moveaxis(array, self._axis, 0), self._layout.dtype):
                stream.append(block)
            if self._unfinished is not None:
                self._unfinished.add(start, stop, stream.seam())
        self._done = stop

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        opened, self._open = self._open, None
        if kind is None and opened is not None:
            with self._layout.explained(self._left), self._stack:
                self._finish(*opened)
        else:
            with suppress(OSError):  # of closing a file that the disk has no room for
                self._stack.__exit__(kind, error, trace)

    def _stream(self, file: BinaryIO, seam: Seam | None) -> VoxelStream:
        if self._axis == 0:
            return self._layout.stream(file, seamed=self._unfinished is not None, seam=seam)
        return VoxelStream(file, b"", packed="", seam=seam)

    def _checked_stop(self, start: int, array: Array) -> int:
        """The plane after the slab's last, if it is the next slab and of the right kind."""
        path, shape = self._layout.path, self._layout.grid.shape
        if start != self._done:
            raise DataError(
                f"{path}: a slab from plane {start}; expected the next, from {self._done}"
            )
        if array.dtype.newbyteorder("=") != self._given.newbyteorder("="):
            raise DataError(f"{path}: a slab of {array.dtype}; expected {self._given}")
        thickness = array.shape[self._axis] if array.ndim == 3 else 0
        most = shape[self._axis] - start
        fits = (*shape[: self._axis], thickness, *shape[self._axis + 1 :])
        if not (array.shape == fits and 1 <= thickness <= most):
            raise DataError(
                f"{path}: a slab of shape {array.shape} from plane {start}; expected 1 to {most} "
                f"planes along axis {self._axis} of {shape} voxels (z, y, x)"
            )
        return start + thickness

    def _finish(self, file: BinaryIO, stream: VoxelStream) -> None:
        path, n_planes = self._layout.path, self._layout.grid.shape[self._axis]
        if self._done != n_planes:
            raise DataError(
                f"{path}: {self._done} of {n_planes} planes along axis {self._axis} were written; "
                f"expected all; {self._left}"
            )
        if self._axis != 0:
            self._finish_staged(file, stream)
            return
        stream.end()
        file.close()
        if self._unfinished is None:
            self._layout.verify(self._partial, stream.checksum)
            return
        try:
            self._layout.verify(self._unfinished.partial, stream.checksum)
        except DataError:
            self._unfinished.remove()  # nothing to go on with
            raise
        self._unfinished.put_in_place(self._unfinished.partial)

    def _finish_staged(self, file: BinaryIO, stream: VoxelStream) -> None:
        self._check_stage(file, stream)
        voxels = self._unstaged(file)
        if self._unfinished is None:
            self._layout.write(voxels)
            return
        whole = self._target.with_name(f".{self._target.name}.whole")
        try:
            self._layout.write_to(whole, voxels)
            file.close()
            self._unfinished.put_in_place(whole)
        finally:
            whole.unlink(missing_ok=True)

    def _check_stage(self, file: BinaryIO, stream: VoxelStream) -> None:
        """Read back what was staged, as a file is."""
        file.flush()
        file.seek(0)
        again = 0
        while block := file.read(BLOCK_BYTES):
            again = zlib.crc32(block, again)
        if again != stream.checksum:
            if self._unfinished is not None:
                self._unfinished.remove()
            raise DataError(
                f"{self._layout.path}: its staged voxels are not what was written, is the disk "
                "full?"
            )

    def _unstaged(self, file: BinaryIO) -> Iterator[memoryview]:
        """The staged voxels in the order of the file, a block of planes at a time.

        Read, not mapped: of a mapped file the system keeps far more resident than is asked for.
        """
        shape, dtype = self._layout.grid.shape, self._layout.dtype
        row_bytes = shape[3 - self._axis] * dtype.itemsize
        block = np.empty((min(planes_a_block(shape), shape[0]), *shape[1:]), dtype=dtype)
        for first in range(0, shape[0], len(block)):
            planes = block[: shape[0] - first]
            for index, part in enumerate(np.moveaxis(planes, self._axis, 0)):
                file.seek((index * shape[0] + first) * row_bytes)
                rows = np.frombuffer(file.read(len(planes) * row_bytes), dtype=dtype)
                part[...] = rows.reshape(part.shape)
            yield from blocks(planes, dtype)
