"""A network slid over a volume in overlapping windows, which is finished slab by slab."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from effseg.devices import Precision, present_device
from effseg.errors import DataError, PlanError
from effseg.inference.headless import Blend, choose_blend
from effseg.inference.passes import Passes, mirrors
from effseg.inference.windows import Frontier, PaddedImage
from effseg.io import read_volume, write_volume
from effseg.resample import SLAB_PLANES, Slab, Slabs, logits_to_labels
from effseg.tiling import Sweep, frontier, padded_shape, sweep_axis
from effseg.types import Array, Shape3
from effseg.volume import Grid, Volume

logger = logging.getLogger("effseg")

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


class Predictor:
    """Labels volumes of any size with a network that takes patches.

    Windows overlap and are blended with Gaussian weights in float32; with `tta` each window is
    also seen mirrored along every combination of axes, and the logits are averaged, as they are
    over several networks. What is summed up is the features below the head, where the networks end
    in an affine one that reads fewer channels than it makes, otherwise the logits.

    The windows sweep the volume along one axis. Sums exist for a stretch as long as a window, and
    a slab that no later window touches is handed on: beside the image, memory depends neither on
    the length of the volume nor, with such a head, on the number of classes.

    Args:
        network: takes (N, C, z, y, x), returns logits (N, classes, z, y, x), or a list of logits
            whose first is the finest; or several such networks. They are put into eval mode, on the
            device.
        patch_size: of a window, voxels (z, y, x).
        overlap: the least share of a window that its neighbour covers.
        tta: average over the 8 mirrors.
        device: where the network runs, "cpu", "cuda" or "cuda:1".
        window_batch: windows in one pass.
        precision: autocast type; "float32" switches autocast off.
        skip_constant: run windows of one constant value, such as clipped air, once for all that
            have the same; the result is the same.

    Raises:
        PlanError: if an argument is out of range or the device is not there.
    """

    def __init__(
        self,
        network: nn.Module | Sequence[nn.Module],
        patch_size: Shape3,
        *,
        overlap: float = 0.5,
        tta: bool = False,
        device: str = "cpu",
        window_batch: int = 1,
        precision: Precision = "float32",
        skip_constant: bool = False,
    ) -> None:
        if min(patch_size) < 1 or window_batch < 1:
            raise PlanError(
                f"patch_size {patch_size}, window_batch {window_batch}; expected at least 1 each"
            )
        if not 0 <= overlap < 1:
            raise PlanError(f"overlap {overlap}; expected 0 <= overlap < 1")
        networks = (network,) if isinstance(network, nn.Module) else tuple(network)
        if not networks:
            raise PlanError("no network; expected one or more")
        self.device = present_device(device)
        self.networks = tuple(one.to(self.device).eval() for one in networks)
        self.patch_size = patch_size
        self.overlap = overlap
        self.mirrors = mirrors() if tta else ((),)
        self.window_batch = window_batch
        self.precision = precision
        self.skip_constant = skip_constant
        self._blend: Blend | None = None

    def predict(self, image: Array | Volume | str | Path, out: str | Path | None = None) -> Volume:
        """Label an image as it lies: no resampling, no normalisation.

        Args:
            image: (z, y, x) or (C, z, y, x); an array, a `Volume`, or a file.
            out: also write the label map there.

        Returns:
            The index of the largest logit at each voxel, on the image's grid, in the smallest
            unsigned type that holds the classes.
        """
        if isinstance(image, str | Path):
            image = read_volume(image)
        if not isinstance(image, Volume):
            depth, height, width = image.shape[-3:]
            image = Volume(array=image, grid=Grid(shape=(depth, height, width)))
        array = image.array if image.array.ndim == 4 else image.array[None]
        slabs = self.slabs(np.asarray(array, dtype=np.float32))
        result = logits_to_labels(slabs, image.grid, image.grid)
        if out is not None:
            write_volume(result, out)
        return result

    def logits(
        self, image: npt.NDArray[np.float32], *, progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Blend the network's logits over an image, all at once: classes x voxels.

        Args:
            image: as `slabs` takes it.
            progress: called after each pass.

        Returns:
            (classes, z, y, x) float32.

        Raises:
            DataError: as `slabs`.
        """
        slabs = self.slabs(image, progress=progress)
        return np.concatenate([values for _, values in slabs], axis=1 + slabs.axis)

    def slabs(self, image: npt.NDArray[np.float32], *, progress: Progress | None = None) -> Slabs:
        """Blend over an image and hand on what is finished, from one end to the other.

        Args:
            image: (C, z, y, x), as the network was trained to see it; axes shorter than the
                window are padded with each channel's minimum.
            progress: called after each pass.

        Returns:
            Pairs (start along its axis, logits (classes, z, y, x)), made as they are asked for; or,
            as its parts, what is blended and a head for it.

        Raises:
            DataError: from the slabs, if a value is not finite: no label can be trusted then.
        """
        if self._blend is None:
            self._blend = choose_blend(self.networks, (1, len(image), *self.patch_size))
        padded = PaddedImage(image, self.patch_size)
        plan = Sweep.over(padded.shape, self.patch_size, overlap=self.overlap)
        return Slabs(
            axis=plan.axis,
            shape=(image.shape[1], image.shape[2], image.shape[3]),
            parts=self._parts(padded, plan, self._blend, progress),
            head=self._blend.head,
        )

    @torch.inference_mode()
    def _parts(
        self, image: PaddedImage, plan: Sweep, blend: Blend, progress: Progress | None
    ) -> Iterator[Slab]:
        blended: Frontier | None = None
        passes = Passes(
            blend,
            mirrors=self.mirrors,
            device=self.device,
            precision=self.precision,
            skip_constant=self.skip_constant,
        )
        inside = image.inside[plan.axis]
        done = 0
        for layer in plan.layers:
            for start in range(0, len(layer.windows), self.window_batch):
                boxes = layer.windows[start : start + self.window_batch]
                for box, values in passes.run(image, boxes):
                    if blended is None:
                        blended = Frontier(len(values), plan, device=self.device)
                    blended.add(box, values)
                    del values
                done += len(boxes)
                if progress is not None:
                    progress(done, plan.n_windows)
            assert blended is not None
            low, high = max(layer.start, inside.start), min(layer.stop, inside.stop)
            for first in range(low, high, SLAB_PLANES):
                last = min(high, first + SLAB_PLANES)
                yield first - inside.start, _finite(blended.take(first, last), image, plan.axis)
        if self.skip_constant:
            logger.info("%d of %d windows were constant, and skipped", passes.n_skipped, done)


def blending_bytes(
    shape: Shape3, patch_size: Shape3, *, n_channels: int, n_blended: int, window_batch: int
) -> int:
    """What `Predictor.slabs` takes at most beside the image and a pass of the network.

    Args:
        shape: the image's (z, y, x).
        patch_size: of a window.
        n_channels: the image's.
        n_blended: channels of what is blended, features or logits.
        window_batch: windows in one pass.
    """
    padded = padded_shape(shape, patch_size)
    axis = sweep_axis(padded, patch_size)
    under_way = math.prod(frontier(padded, patch_size, axis))
    window = math.prod(patch_size)
    # the sums, their shares and weights; windows cut and side by side; the sum over mirrors and
    # one more output; the slab where it was blended and on the host
    blended = (n_blended + 1) * under_way + window
    passed = window_batch * window * 2 * (n_channels + n_blended)
    slab = 2 * n_blended * SLAB_PLANES * under_way // patch_size[axis]
    return 4 * (blended + passed + slab)


def _finite(means: Tensor, image: PaddedImage, axis: int) -> npt.NDArray[np.float32]:
    """A finished slab on the host, without what was padded beside it."""
    if not bool(torch.isfinite(means).all()):
        raise DataError(
            "the network gave logits that are not finite; check the image for NaN and absurd "
            "values, or predict in float32"
        )
    inside = list(image.inside)
    inside[axis] = slice(None)
    return means[(slice(None), *inside)].cpu().numpy()
