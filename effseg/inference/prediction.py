"""From a run and an image to a label map on the image's own grid."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effseg.dataset import Case, read_image
from effseg.devices import device_kind, present_device
from effseg.errors import MemoryBudgetError
from effseg.inference.predictor import Predictor, Progress, blending_bytes
from effseg.inference.run import Run, load_run
from effseg.io import read_grid, read_volume, write_volume
from effseg.plans import PostprocessConfig, format_bytes, parse_bytes
from effseg.postprocess import describe, remove_components
from effseg.preprocess import prepare_image, restore_labels
from effseg.resample import labelling_bytes
from effseg.tiling import padded_shape, sweep_axis
from effseg.volume import Grid, Volume

logger = logging.getLogger("effseg")


@dataclass(frozen=True)
class Forecast:
    """What labelling one image takes at most, in bytes, the network's weights included.

    Attributes:
        reading_bytes: the image as read and as prepared.
        sweeping_bytes: the prepared image, one pass of the network, the sums of the windows that
            are under way, the slab that is made into labels, and the label map.
        cleaning_bytes: the label map, its components, and the cleaned copy.
    """

    reading_bytes: int
    sweeping_bytes: int
    cleaning_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The largest of the three stages."""
        return max(self.reading_bytes, self.sweeping_bytes, self.cleaning_bytes)


def predict(
    run: str | Path | Run,
    image: str | Path | Volume | Case,
    *,
    out: str | Path | None = None,
    memory: str | int | None = None,
    tta: bool = False,
    device: str | None = None,
    postprocess: PostprocessConfig | None = None,
    progress: Progress | None = None,
) -> Volume:
    """Label an image with a trained run.

    The image is brought to canonical axes and the plan's spacing and normalisation, and the network
    sweeps over it. Each slab that is finished is resampled to the image's own grid and made into
    labels at once. Components that the plan's rule calls noise are removed.

    Args:
        run: a run's folder, or a loaded `Run`.
        image: a file, a DICOM folder or zip, a `Volume`, or a `Case` whose files are the channels.
        out: also write the label map there; its suffix names the format.
        memory: a budget such as "4GiB" for what this call takes; None: no limit.
        tta: average the logits over the 8 mirrors.
        device: "cpu" or "cuda"; None: the plan's, or the CPU, with a warning, where that is not
            here.
        postprocess: a rule in place of the plan's.
        progress: called with (windows done, windows in all).

    Returns:
        A label map on the image's grid, in the smallest unsigned type.

    Raises:
        MemoryBudgetError: before anything large is allocated, if the budget is too small.
        DataError: if the image cannot be read or has another number of channels.
        CheckpointError: if the run cannot be loaded.
        PlanError: if the device asked for is not here.
    """
    if not isinstance(run, Run):
        run = load_run(run)
    plan = run.plan
    grid = image.grid if isinstance(image, Volume) else read_grid(_first_file(image))[0]
    device = device or run.device
    present_device(device)  # one that is not here is refused before the image is read
    expected = forecast(run, grid, device=device)
    logger.info("predicting at most %s for this image", format_bytes(expected.peak_bytes))
    if memory is not None and expected.peak_bytes > parse_bytes(memory):
        raise MemoryBudgetError(
            f"an image of {grid.shape} voxels takes {format_bytes(expected.peak_bytes)}, "
            f"the budget is {format_bytes(parse_bytes(memory))}; "
            f"--memory {-(-expected.peak_bytes // 2**20)}MiB would do"
        )
    if isinstance(image, Case):
        volume = read_image(image)
    else:
        volume = image if isinstance(image, Volume) else read_volume(image)
    prepared = prepare_image(volume, plan)
    del volume
    predictor = Predictor(
        run.headless or run.network,
        plan.patch_size,
        overlap=plan.inference.overlap,
        tta=tta,
        device=device,
        window_batch=plan.inference.window_batch,
        precision=plan.precision,
    )
    labels = restore_labels(predictor.slabs(prepared.image, progress=progress), prepared, plan)
    del prepared
    rule = postprocess or plan.inference.postprocess
    cleaned, removals = remove_components(labels.array, labels.grid.voxel_mm3, rule)
    logger.info("%s", describe(rule, removals))
    result = Volume(array=cleaned, grid=labels.grid)
    if out is not None:
        write_volume(result, out)
    return result


def forecast(run: Run, grid: Grid, *, device: str | None = None) -> Forecast:
    """Predict the memory of labelling an image on this grid, before anything is allocated.

    Args:
        run: a loaded run.
        grid: the image's.
        device: as `predict` takes it.
    """
    plan = run.plan
    n_channels = len(plan.channels)
    canonical = grid.reordered(grid.canonical_axes())
    inner = canonical.with_spacing(plan.spacing)
    axis = sweep_axis(padded_shape(inner.shape, plan.patch_size), plan.patch_size)
    weights = sum(p.numel() * p.element_size() for p in run.network.parameters())
    native = grid.n_voxels
    image = 4 * n_channels * inner.n_voxels
    label_bytes = np.min_scalar_type(max(label.value for label in plan.labels)).itemsize
    return Forecast(
        # as read (float32 at worst), resampled, normalised
        reading_bytes=weights + 4 * n_channels * native + 2 * image,
        sweeping_bytes=image
        + run.window_bytes(device_kind(device or run.device))
        + blending_bytes(
            inner.shape,
            plan.patch_size,
            n_channels=n_channels,
            n_blended=run.n_blended,
            window_batch=plan.inference.window_batch,
        )
        + labelling_bytes(inner, grid, n_channels=run.n_blended, label_bytes=label_bytes, axis=axis)
        + native * label_bytes,
        # labels, their cleaned copy, and of the box around the foreground a copy and components
        cleaning_bytes=weights + native * (3 * label_bytes + 4),
    )


def _first_file(image: str | Path | Case) -> str | Path:
    return image.images[0] if isinstance(image, Case) else image
