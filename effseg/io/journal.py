"""The unfinished file of a writer that can be stopped, and the journal that says how far it is."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from effseg.errors import DataError
from effseg.files import name_places, put_in_place, remove
from effseg.io.voxel_stream import Seam
from effseg.types import Shape3, Spacing
from effseg.volume import Grid, Matrix3


class Task(BaseModel):
    """What is being written; a line of JSON, the first of a journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="of the file")
    shape: Shape3 = Field(description="voxels of its grid (z, y, x)")
    spacing: Spacing = Field(description="of its grid, mm (z, y, x)")
    origin: Spacing = Field(description="of its grid, mm (z, y, x)")
    direction: Matrix3 = Field(description="of its grid")
    dtype: str = Field(description="of its voxels")
    axis: int = Field(ge=0, le=2, description="along which slabs come")
    fingerprint: str = Field(description="the caller's, of whatever the voxels depend on")

    @classmethod
    def of(cls, path: Path, grid: Grid, *, dtype: str, axis: int, fingerprint: str) -> Self:
        """The task of writing a file."""
        return cls.model_validate(
            {
                "name": path.name,
                "shape": [int(n) for n in grid.shape],
                "spacing": grid.spacing,
                "origin": grid.origin,
                "direction": grid.direction,
                "dtype": dtype,
                "axis": axis,
                "fingerprint": fingerprint,
            }
        )


class FinishedSlab(BaseModel):
    """A slab that is on the disk; a line of JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int = Field(ge=0, description="its first plane")
    stop: int = Field(ge=1, description="the plane after its last")
    n_bytes: int = Field(ge=1, description="of the unfinished file, or of its voxels, so far")
    n_plain: int = Field(ge=1, description="the same before packing")
    checksum: int = Field(ge=0, description="of what was packed up to its end (CRC-32)")

    @property
    def seam(self) -> Seam:
        """Where the next slab begins."""
        return Seam(self.n_bytes, self.n_plain, self.checksum)


class Unfinished:
    """The two hidden files that lie beside a file while it is being written; or a folder and one.

    The journal grows by a line for each slab, after the slab is on the disk: however the writer
    ends, what the journal names is there. A last line that was cut does not count, nor does what
    lies in the file behind the last slab that is named.

    Args:
        target: the file, links resolved.
        task: what is being written.

    Raises:
        DataError: if the journal that lies there is of another task.
        OSError: if a file cannot be read or written.
    """

    def __init__(self, target: Path, task: Task) -> None:
        self.partial = target.with_name(f".{target.name}.partial")
        self._target = target
        self._journal = target.with_name(f".{target.name}.journal")
        self._slabs: list[FinishedSlab] = []
        if self._journal.exists():
            self._read(task)
        if not self._slabs:
            self._note(task, mode="wb")

    @property
    def last(self) -> FinishedSlab | None:
        """The last slab that is finished."""
        return self._slabs[-1] if self._slabs else None

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The partial file, cut behind the last finished slab."""
        with self.partial.open("r+b" if self.last else "w+b") as file:
            file.truncate(self.last.n_bytes if self.last else 0)
            file.seek(0, os.SEEK_END)
            yield file

    def add(self, start: int, stop: int, seam: Seam) -> None:
        """Note a slab that is on the disk."""
        slab = FinishedSlab(
            start=start,
            stop=stop,
            n_bytes=seam.n_bytes,
            n_plain=seam.n_plain,
            checksum=seam.checksum,
        )
        self._slabs.append(slab)
        self._note(slab, mode="ab")

    def put_in_place(self, finished: Path) -> None:
        """Give a finished file the target's name, and take all else away."""
        put_in_place(finished, self._target)
        self.remove()

    def remove(self) -> None:
        """Take both files away; the journal last, for without it the other has no meaning."""
        remove(self.partial)
        self._journal.unlink(missing_ok=True)

    def _note(self, line: BaseModel, *, mode: Literal["ab", "wb"]) -> None:
        with self._journal.open(mode) as file:
            file.write(line.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, task: Task) -> None:
        """Take over the slabs of an earlier writer that are there, and forget the others."""
        first, *rest = self._journal.read_bytes().split(b"\n")
        if not rest:  # it was stopped before its first line was there
            return
        try:
            self._compare(Task.model_validate_json(first), task)
            slabs = [FinishedSlab.model_validate_json(line) for line in rest[:-1]]
        except ValidationError as error:
            raise DataError(
                f"{self._journal}: not a journal of slabs: {name_places(error, what='line')}; "
                "remove it to begin anew"
            ) from error
        n_bytes = float(self.partial.stat().st_size) if self.partial.exists() else 0
        if self.partial.is_dir():  # of chunks, each forced to the disk before it was named
            n_bytes = math.inf
        self._slabs = [slab for slab in slabs if slab.n_bytes <= n_bytes]
        lines = (first, *rest[: len(self._slabs)])
        os.truncate(self._journal, sum(len(line) + 1 for line in lines))

    def _compare(self, found: Task, task: Task) -> None:
        for name in Task.model_fields:
            theirs, ours = getattr(found, name), getattr(task, name)
            if theirs != ours:
                raise DataError(
                    f"{self._journal}: begun with another {name}, {theirs!r} vs {ours!r}; remove "
                    "it to begin anew"
                )
