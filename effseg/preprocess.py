"""One image to what the network sees: canonical axes, the plan's spacing, normalised channels."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effseg.errors import DataError
from effseg.plans import Channel, Plan
from effseg.resample import Slabs, logits_to_labels, resample_to_spacing
from effseg.types import Array
from effseg.volume import Grid, Volume


@dataclass(frozen=True)
class Prepared:
    """An image as the network sees it.

    Attributes:
        image: float32, (channels, z, y, x), on `grid`.
        grid: canonical axes, the plan's spacing.
        native: the grid the image came on.
    """

    image: npt.NDArray[np.float32]
    grid: Grid
    native: Grid


def prepare_image(image: Volume, plan: Plan) -> Prepared:
    """Reorder, resample and normalise an image.

    Raises:
        DataError: if it has another number of channels than the plan.
    """
    if image.n_channels != len(plan.channels):
        names = ", ".join(channel.name for channel in plan.channels)
        raise DataError(
            f"image with {image.n_channels} channels; the plan expects "
            f"{len(plan.channels)} ({names})"
        )
    native = image.grid
    image = image.reordered(native.canonical_axes())
    if image.array.ndim == 3:
        image = Volume(array=image.array[None], grid=image.grid)
    image = resample_to_spacing(image, plan.spacing)
    array = np.empty(image.array.shape, dtype=np.float32)
    for i, channel in enumerate(plan.channels):
        array[i] = normalise(image.array[i], channel)
    return Prepared(image=array, grid=image.grid, native=native)


def prepare_label(label: Volume, plan: Plan) -> Volume:
    """Reorder and resample a label map onto the grid that its image is prepared on."""
    canonical = label.reordered(label.grid.canonical_axes())
    return resample_to_spacing(canonical, plan.spacing, label=True)


def normalise(array: Array, channel: Channel) -> npt.NDArray[np.float32]:
    """One channel's intensities to about zero mean and unit deviation, float32.

    CT: clipped and scaled by the data set's foreground statistics. Else: by the mean and deviation
    of the image's voxels above its minimum, which is what surrounds the body; a constant image
    becomes zero.
    """
    out = np.array(array, dtype=np.float32)
    numbers = channel.normalisation
    if numbers.kind == "ct":
        assert numbers.mean is not None
        assert numbers.std is not None
        np.clip(out, numbers.low, numbers.high, out=out)
        out -= numbers.mean
        out /= numbers.std
        return out
    body = out[out > out.min()]
    if body.size == 0:
        return np.zeros_like(out)
    mean, deviation = float(body.mean(dtype=np.float64)), float(body.std(dtype=np.float64))
    out -= mean
    out /= max(deviation, 1e-8)
    return out


def restore_labels(logits: Array | Slabs, prepared: Prepared, plan: Plan) -> Volume:
    """Logits on the prepared grid to a label map on the image's own grid.

    The logits are resampled, so the label map is that of interpolated logits, not interpolated
    labels; logits of all classes exist for a few voxels at a time.

    Args:
        logits: (classes, z, y, x) on `prepared.grid`, or what comes slab by slab.
        prepared: what the logits were computed from.
        plan: names the label values.

    Returns:
        The smallest unsigned type that holds the plan's label values, on `prepared.native`.
    """
    values = [label.value for label in plan.labels]
    return logits_to_labels(logits, prepared.grid, prepared.native, values=values)
