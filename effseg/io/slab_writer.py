"""A volume written slab by slab, as it is made."""

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from effseg.errors import DataError
from effseg.io.file_slabs import FileSlabs
from effseg.io.formats import is_store_name
from effseg.io.journal import Task
from effseg.io.layout import FileLayout, explained
from effseg.io.store_layout import StoreLayout
from effseg.io.store_slabs import StoreSlabs
from effseg.io.writing import stored_dtype
from effseg.types import Array
from effseg.volume import Grid


class _Slabs(Protocol):
    """What takes slabs, into one file or into a folder of chunks."""

    def begin(self, stack: ExitStack, /) -> int: ...

    def add(self, start: int, stop: int, array: Array, /) -> None: ...

    def finish(self) -> None: ...


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

    Slabs along z go straight into a file. Along another axis they are staged first, unpacked, in a
    nameless file of the same folder: the disk has to hold both. A Zarr store takes them along any
    axis, a row of chunks at a time.

    With `resume`, a writer that is stopped, killed even, leaves what is hidden beside the target,
    `.NAME.partial` and `.NAME.journal`, and the next one with `resume` goes on where it ended:
    `done` says where. Each slab is forced to the disk then, of a store each row of chunks; in a
    file it is packed without knowledge of those before it, so that such a file is a little larger
    and depends on how thick its slabs are, but not on whether and where the writer was stopped.

    Args:
        path: `.nii.gz`, `.nii`, `.nrrd`, `.mha` or `.zarr`.
        grid: where all voxels lie.
        dtype: of the slabs. Integers and floats are kept, 64-bit ones too; bool becomes uint8,
            float16 becomes float32.
        axis: of the grid along which slabs come: 0 for z, 1 for y, 2 for x.
        resume: whether to go on where an earlier writer was stopped, and to leave what is finished
            when stopped.
        fingerprint: with `resume`, of whatever the voxels depend on: an unfinished file of another
            fingerprint, grid, type or axis is refused.

    Raises:
        DataError: if the format cannot hold the volume, or the name is that of something else that
            would be lost; on entering, if the file cannot be begun or an unfinished one is refused;
            on leaving, if slabs are missing, or the file is not what was meant (a full disk).
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
        self._path, self._shape, self._axis = path, grid.shape, axis
        self._given = np.dtype(dtype)
        stored = stored_dtype(path, self._given)
        self._n_bytes = grid.n_voxels * stored.itemsize
        task: Task | None = None
        self._left = "nothing was left behind"
        if resume:
            target = Path(os.path.realpath(path))
            task = Task.of(target, grid, dtype=self._given.str, axis=axis, fingerprint=fingerprint)
            self._left = "finished slabs were kept: go on with resume"
        self._slabs: _Slabs
        if is_store_name(path):
            store = StoreLayout.judged(path, grid, stored)
            self._slabs = StoreSlabs(store, axis=axis, task=task)
        else:
            self._slabs = FileSlabs(FileLayout.judged(path, grid, stored), axis=axis, task=task)
        self._is_open = False
        self._stack = ExitStack()
        self._done = 0

    @property
    def done(self) -> int:
        """How many planes are written: where the next slab has to start."""
        return self._done

    def __enter__(self) -> Self:
        with explained(self._path, self._n_bytes, self._left), ExitStack() as stack:
            self._done = self._slabs.begin(stack)
            self._stack = stack.pop_all()
        self._is_open = True
        return self

    def write(self, start: int, array: Array) -> None:
        """Write the slab that starts at plane `start`.

        Raises:
            DataError: if it is not the next, has another shape or type, or cannot be written.
        """
        if not self._is_open:
            raise DataError(f"{self._path}: not open; write inside of a with block")
        stop = self._checked_stop(start, array)
        with explained(self._path, self._n_bytes, self._left):
            self._slabs.add(start, stop, array)
        self._done = stop

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        was_open, self._is_open = self._is_open, False
        if kind is None and was_open:
            with explained(self._path, self._n_bytes, self._left), self._stack:
                self._check_all_there()
                self._slabs.finish()
        else:
            with suppress(OSError):  # of closing a file that the disk has no room for
                self._stack.__exit__(kind, error, trace)

    def _checked_stop(self, start: int, array: Array) -> int:
        """The plane after the slab's last, if it is the next slab and of the right kind."""
        path, shape = self._path, self._shape
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

    def _check_all_there(self) -> None:
        n_planes = self._shape[self._axis]
        if self._done != n_planes:
            raise DataError(
                f"{self._path}: {self._done} of {n_planes} planes along axis {self._axis} were "
                f"written; expected all; {self._left}"
            )
