"""A network slid over a volume in overlapping windows."""

from collections.abc import Callable, Iterator
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from effseg.devices import AUTOCAST, Precision, present_device
from effseg.errors import DataError, PlanError
from effseg.io import read_volume, write_volume
from effseg.tiling import gaussian_weights, padding, windows
from effseg.types import Array, Shape3, Slices3
from effseg.volume import Grid, Volume

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


class Predictor:
    """Labels volumes of any size with a network that takes patches.

    Windows overlap and are blended with Gaussian weights in float32; with `tta` each window is
    also seen mirrored along every combination of axes, and the logits are averaged.

    Args:
        network: takes (N, C, z, y, x), returns logits (N, classes, z, y, x), or a list of logits
            whose first is the finest. It is put into eval mode, on the device.
        patch_size: of a window, voxels (z, y, x).
        overlap: the least share of a window that its neighbour covers.
        tta: average over the 8 mirrors.
        device: where the network runs, "cpu", "cuda" or "cuda:1".
        window_batch: windows in one pass.
        precision: autocast type; "float32" switches autocast off.

    Raises:
        PlanError: if an argument is out of range or the device is not there.
    """

    def __init__(
        self,
        network: nn.Module,
        patch_size: Shape3,
        *,
        overlap: float = 0.5,
        tta: bool = False,
        device: str = "cpu",
        window_batch: int = 1,
        precision: Precision = "float32",
    ) -> None:
        if min(patch_size) < 1 or window_batch < 1:
            raise PlanError(
                f"patch_size {patch_size}, window_batch {window_batch}; expected at least 1 each"
            )
        if not 0 <= overlap < 1:
            raise PlanError(f"overlap {overlap}; expected 0 <= overlap < 1")
        self.device = present_device(device)
        self.network = network.to(self.device).eval()
        self.patch_size = patch_size
        self.overlap = overlap
        self.mirrors = mirrors() if tta else ((),)
        self.window_batch = window_batch
        self.precision = precision

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
        logits = self.logits(np.asarray(array, dtype=np.float32))
        labels = logits.argmax(axis=0).astype(np.min_scalar_type(len(logits) - 1))
        result = Volume(array=labels, grid=image.grid)
        if out is not None:
            write_volume(result, out)
        return result

    @torch.inference_mode()
    def logits(
        self, image: npt.NDArray[np.float32], *, progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Blend the network's logits over an image.

        Args:
            image: (C, z, y, x), as the network was trained to see it; axes shorter than the
                window are padded with each channel's minimum.
            progress: called after each pass.

        Returns:
            (classes, z, y, x) float32.

        Raises:
            DataError: if a logit is not finite: no label can be trusted then.
        """
        shape: Shape3 = (image.shape[1], image.shape[2], image.shape[3])
        pads = padding(shape, self.patch_size)
        padded = _padded(image, pads)
        size: Shape3 = (padded.shape[1], padded.shape[2], padded.shape[3])
        boxes = windows(size, self.patch_size, overlap=self.overlap)
        weights = torch.from_numpy(gaussian_weights(self.patch_size)).to(self.device)
        total: Tensor | None = None
        share = torch.zeros(size, device=self.device)
        done = 0
        for batch in _batches(boxes, self.window_batch):
            passed = self._windows(padded, batch)
            if total is None:
                total = torch.zeros((passed.shape[1], *size), device=self.device)
            for box, window in zip(batch, passed, strict=True):
                total[(slice(None), *box)] += window.mul_(weights)
                share[box] += weights
            done += len(batch)
            if progress is not None:
                progress(done, len(boxes))
        assert total is not None
        total.div_(share)
        if not bool(torch.isfinite(total).all()):
            raise DataError(
                "the network gave logits that are not finite; check the image for NaN and absurd "
                "values, or predict in float32"
            )
        inner = tuple(slice(before, before + n) for (before, _), n in zip(pads, shape, strict=True))
        return total[(slice(None), *inner)].cpu().numpy()

    def _windows(self, image: npt.NDArray[np.float32], boxes: tuple[Slices3, ...]) -> Tensor:
        """Logits of some windows, float32, on the device."""
        host = torch.from_numpy(np.stack([image[(slice(None), *box)] for box in boxes]))
        if self.device.type == "cuda":
            host = host.pin_memory()
        batch = host.to(self.device, non_blocking=True)
        mean: Tensor | None = None
        for axes in self.mirrors:
            with self._autocast():
                output = self.network(batch.flip(axes) if axes else batch)
            logits = output[0] if isinstance(output, list | tuple) else output
            logits = (logits.flip(axes) if axes else logits).float()
            mean = logits.clone() if mean is None else mean.add_(logits)
        assert mean is not None
        return mean.div_(len(self.mirrors))

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def mirrors() -> tuple[tuple[int, ...], ...]:
    """The axes of (N, C, z, y, x) to flip for each of the 8 mirrors, the unchanged one first."""
    axes = (2, 3, 4)
    return tuple(chain.from_iterable(combinations(axes, n) for n in range(4)))


def _padded(
    image: npt.NDArray[np.float32], pads: tuple[tuple[int, int], ...]
) -> npt.NDArray[np.float32]:
    if not any(before or after for before, after in pads):
        return image
    return np.stack([np.pad(plane, pads, constant_values=plane.min()) for plane in image])


def _batches(boxes: tuple[Slices3, ...], size: int) -> Iterator[tuple[Slices3, ...]]:
    for start in range(0, len(boxes), size):
        yield boxes[start : start + size]
