"""A sweep of windows over an image, which hands on what no later window touches."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from effseg.errors import DataError
from effseg.inference.frontier import Frontier
from effseg.inference.pace import Pace
from effseg.inference.passes import Passes
from effseg.inference.windows import SweptImage, inside_padded
from effseg.memory import heap_of
from effseg.plans import Heap
from effseg.resample import SLAB_PLANES, Slab
from effseg.sources import ImageSource
from effseg.tiling import Sweep
from effseg.types import Slices3

logger = logging.getLogger("effseg")

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""

Needed = Callable[[Slices3], bool]
"""Called with a window's box of the image, whether it is to be passed."""


@dataclass(frozen=True, eq=False)
class SweepUnderWay:
    """Windows on their way over an image.

    Attributes:
        source: the image.
        sweep: over the padded image.
        passes: makes what passes the windows of a sweep, or of what is left of it.
        window_batch: windows in one pass, at most.
        pace: tells how many of them are fastest; None: that many.
        n_blended: tells how many channels are blended; asked only where no window may be needed.
        start: the first position of the image along the swept axis that is wanted.
        needed: which windows to pass; None: all.
        progress: called after each pass; None: nothing is.
        heap: what becomes of the host's memory that is freed meanwhile.
    """

    source: ImageSource
    sweep: Sweep
    passes: Callable[[Sweep], Passes]
    window_batch: int
    pace: Pace | None
    n_blended: Callable[[], int]
    start: int
    needed: Needed | None
    progress: Progress | None
    heap: Heap

    def finished(self) -> Generator[Slab, None, None]:
        """The slabs, each with where it starts, once no later window touches them.

        Raises:
            DataError: if a value is not finite.
        """
        source, start, needed = self.source, self.start, self.needed
        sweep, axis = self.sweep, self.sweep.axis
        sweep = sweep.reaching(inside_padded(source.shape, sweep)[axis].start + start)
        image = SweptImage(source, sweep)
        inside = image.inside[axis]
        n_blended = None if needed is None else self.n_blended()
        passes = self.passes(sweep)
        with closing(passes), heap_of(self.heap):
            done = 0
            for layer in sweep.layers:
                image.load(layer.start + sweep.window[axis])
                boxes = [box for box in layer.windows if needed is None or needed(image.given(box))]
                passes.n_needless += len(layer.windows) - len(boxes)
                while boxes:
                    n = self._pass(passes, image, boxes)
                    boxes, done = boxes[n:], done + n
                    if self.progress is not None:
                        self.progress(done + passes.n_needless, sweep.n_windows)
                low, high = max(layer.start, inside.start + start), min(layer.stop, inside.stop)
                if low > layer.start and passes.blended is not None:
                    passes.blended.drop(layer.start, min(low, layer.stop))
                for first in range(low, high, SLAB_PLANES):
                    last = min(high, first + SLAB_PLANES)
                    yield first - inside.start, _taken(passes.sums(n_blended), first, last, image)
        if passes.skip_constant:
            logger.info("%d of %d windows were constant, and skipped", passes.n_skipped, done)
        if needed is not None:
            logger.info("%d of %d windows were needed", done, sweep.n_windows)

    def _pass(self, passes: Passes, image: SweptImage, boxes: Sequence[Slices3]) -> int:
        """Pass the next windows of a layer; how many they are."""
        if self.pace is None:
            batch = boxes[: self.window_batch]
            passes.run(image, batch)
        else:
            # no pass is larger than a layer: a size that never fills could not be timed
            batch = boxes[: self.pace.windows(min(self.window_batch, len(boxes)))]
            self.pace.run(lambda: passes.run(image, batch), len(batch), wait=passes.wait)
        return len(batch)


@torch.inference_mode()
def _taken(blended: Frontier, start: int, stop: int, image: SweptImage) -> npt.NDArray[np.float32]:
    """A finished slab on the host, without what was padded beside it."""
    means = blended.take(start, stop)
    if not bool(torch.isfinite(means.sum())):  # a sum takes no memory of the slab's size
        raise DataError(
            "the network gave logits that are not finite; check the image for NaN and absurd "
            "values, or predict in float32"
        )
    inside = list(image.inside)
    inside[blended.axis] = slice(None)
    return means[(slice(None), *inside)].cpu().numpy()
