"""A label map to its file, slab by slab as it is made."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effseg.errors import DataError
from effseg.io import SlabReader, SlabWriter, StoredVolume, library_bytes, writing_bytes
from effseg.plans import PostprocessConfig
from effseg.postprocess import ComponentStream, Removal, describe
from effseg.resample import SLAB_PLANES, LabelSlab
from effseg.sources import ImageArray, ImageFiles
from effseg.volume import Grid, Volume

logger = logging.getLogger("effseg")

Pieces = Callable[[int], Iterator[LabelSlab]]
"""The slabs of a label map, and of maps beside it, behind so many finished planes."""


@dataclass(frozen=True)
class LabelFile:
    """A label map that is to be written, slabs of it following one another along an axis.

    Attributes:
        path: its suffix names the format.
        grid: where it lies.
        dtype: of its voxels.
        axis: along which slabs come.
        rule: which components are taken out; None: none is.
        resume: whether to leave what is finished when stopped, and to go on with what was left.
        fingerprint: with `resume`, of whatever the labels depend on.
        maps: files of the maps that come with the slabs, float32.
    """

    path: Path
    grid: Grid
    dtype: "np.dtype[np.generic]"
    axis: int
    rule: PostprocessConfig | None = None
    resume: bool = False
    fingerprint: str = ""
    maps: tuple[Path, ...] = ()

    def write(self, pieces: Pieces) -> StoredVolume:
        """Write it; its name appears when it is complete.

        Raises:
            DataError: if it cannot be written, or what was left is of another map.
        """
        if self.rule is None or not removes(self.rule):
            self._stream(self.path, pieces)
        elif self.resume:
            self._write_in_two(pieces, self.rule)
        else:
            self._writer(self.path, labels=True)  # what cannot be written is refused now
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._components(self.rule) as stream:
                with ExitStack() as stack:
                    maps = [stack.enter_context(self._writer(path)) for path in self.maps]
                    for box, labels, made in pieces(0):
                        stream.add(np.moveaxis(labels, self.axis, 0))
                        for writer, array in zip(maps, made, strict=True):
                            writer.write(box[self.axis].start, array)
                self._write_cleaned(stream, self.axis)
        return StoredVolume(self.path)

    def _writer(self, path: Path, *, labels: bool = False) -> SlabWriter:
        return SlabWriter(
            path,
            self.grid,
            self.dtype if labels else np.float32,
            axis=self.axis,
            resume=self.resume,
            fingerprint=self.fingerprint if self.resume else "",
        )

    def _stream(self, path: Path, pieces: Pieces) -> None:
        with ExitStack() as stack:
            # the labels' name appears last: once it is there, so are the maps
            writers = [stack.enter_context(self._writer(path, labels=True))]
            writers += [stack.enter_context(self._writer(one)) for one in self.maps]
            done, n_planes = min(writer.done for writer in writers), self.grid.shape[self.axis]
            if done:
                logger.info("%s: %d of %d planes were there; going on", self.path, done, n_planes)
            if done == n_planes:
                return
            for box, labels, made in pieces(done):
                for writer, array in zip(writers, (labels, *made), strict=True):
                    start, stop = max(box[self.axis].start, writer.done), box[self.axis].stop
                    if start < stop:  # one may have got further than another
                        turned = np.moveaxis(array, self.axis, 0)[start - stop :]
                        writer.write(start, np.moveaxis(turned, 0, self.axis))

    def _write_in_two(self, pieces: Pieces, rule: PostprocessConfig) -> None:
        """First with all components, into a hidden file that a later call can go on with."""
        self._writer(self.path, labels=True)  # what cannot be written is refused now
        stem = f".{self.path.name}.components-"
        before = self.path.parent / f"{stem}{self.fingerprint[:12]}.nii"
        if self.path.parent.is_dir():
            # the part that the writer hides has one more dot in front
            for found in sorted(self.path.parent.glob(f"*{stem}*")):
                if before.name not in found.name:
                    raise DataError(
                        f"{found}: begun with another run, image or option; remove it to begin anew"
                    )
        if not before.exists():
            self._stream(before, pieces)
        with self._components(rule) as stream:
            for _, labels in SlabReader(before).slabs(SLAB_PLANES):
                stream.add(labels)
            self._write_cleaned(stream, 0)
        before.unlink()

    def _components(self, rule: PostprocessConfig) -> ComponentStream:
        return ComponentStream(self.grid.voxel_mm3, rule, folder=self.path.parent)

    def _write_cleaned(self, stream: ComponentStream, axis: int) -> None:
        assert self.rule is not None
        removals: tuple[Removal, ...] = stream.finish()
        logger.info("%s", describe(self.rule, removals))
        with SlabWriter(self.path, self.grid, self.dtype, axis=axis) as writer:
            for labels in stream.cleaned():
                writer.write(writer.done, np.moveaxis(labels, 0, axis))


def collect_labels(
    pieces: Pieces,
    grid: Grid,
    dtype: "np.dtype[np.generic]",
    *,
    axis: int,
    rule: PostprocessConfig | None = None,
) -> Volume:
    """The label map in memory; arguments as of `LabelFile`."""
    result = np.empty(grid.shape, dtype=dtype)
    if rule is None or not removes(rule):
        for box, labels, _ in pieces(0):
            result[box] = labels
        return Volume(array=result, grid=grid)
    with ComponentStream(grid.voxel_mm3, rule) as stream:
        for box, labels, _ in pieces(0):
            result[box] = labels
            stream.add(np.moveaxis(labels, axis, 0))
        removals = stream.finish()
        logger.info("%s", describe(rule, removals))
        if removals:
            turned, done = np.moveaxis(result, axis, 0), 0
            for labels in stream.cleaned():
                turned[done : done + len(labels)] = labels
                done += len(labels)
    return Volume(array=result, grid=grid)


def files_bytes(
    given: ImageFiles | ImageArray, out: str | Path | None, label_bytes: int, n_maps: int = 0
) -> int:
    """What reading an image and writing its label map take beside what is read and written.

    Args:
        given: the image.
        out: where the label map goes; None: it is not written.
        label_bytes: of one label.
        n_maps: how many maps of float32 are written beside it.
    """
    names = given.paths if isinstance(given, ImageFiles) else ()
    written = 0
    if out is not None:
        names = (*names, out)
        written = writing_bytes(out, given.grid, label_bytes)
        written += n_maps * writing_bytes(out, given.grid, 4)
    return library_bytes(*names) + given.held_bytes + written


def removes(rule: PostprocessConfig) -> bool:
    """Whether a rule can take anything out."""
    return rule.fraction_of_largest is not None or rule.minimum_mm3 > 0
