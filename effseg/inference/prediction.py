"""From a run and an image to a label map on the image's own grid."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from effseg.dataset import Case
from effseg.errors import PlanError
from effseg.inference.budget import Forecast, budget_of, forecasts
from effseg.inference.fingerprints import files_of, fingerprint, voxels_of, weights_of
from effseg.inference.output import LabelFile, collect_labels, files_bytes
from effseg.inference.region import Region
from effseg.inference.run import Runs, load_runs, mirrored_axes
from effseg.inference.task import Task, demand_of, found_by
from effseg.inference.under_way import Progress
from effseg.plans import Plan, PostprocessConfig
from effseg.resample import LabelSlab, Maps
from effseg.sources import ImageArray, ImageFiles
from effseg.types import Slices3
from effseg.volume import Grid, Volume

MARGIN_MM = 20.0
"""Around what a coarse run finds: an organ's neighbourhood, more than its own errors."""


def predict(
    run: Runs,
    image: str | Path | Volume | Case | ImageFiles,
    *,
    out: str | Path | None = None,
    memory: str | int | None = None,
    tta: bool = False,
    device: str | None = None,
    postprocess: PostprocessConfig | None = None,
    resume: bool = False,
    skip_constant: bool = False,
    region: Slices3 | Volume | None = None,
    coarse: Runs | None = None,
    margin_mm: float = MARGIN_MM,
    probabilities: Sequence[int] = (),
    entropy: bool = False,
    confidence: bool = False,
    progress: Progress | None = None,
) -> Volume:
    """Label an image with a trained run, or with several whose logits are averaged.

    The image is brought to canonical axes and the plan's spacing and normalisation, and the network
    sweeps over it. Each slab that is finished is resampled to the image's own grid and made into
    labels at once. Components that the plan's rule calls noise are removed. Image, logits and, with
    `out`, labels are in memory only for the stretch under way, where that is no slower or the
    budget asks for it.

    Args:
        run: a run's folder, or a loaded `Run`; or several of one plan's patch, spacing, channels
            and labels, such as folds. Thresholds and rule are the first one's.
        image: a file, a DICOM folder or zip, a `Volume`, or a `Case` whose files are the channels,
            or such files judged already.
        out: write the label map there, slab by slab; its suffix names the format. The name appears
            when the map is complete.
        memory: a budget such as "4GiB" for what this call takes of the host's memory, and of the
            device's; "auto": what is free of both; None: no limit. Where it is roomy a CPU keeps
            what is freed, which makes it about twice as fast; without a limit, where the budget
            that the run was planned for is.
        tta: average the logits over the image's mirrors along the axes that training flipped
            (`mirrored_axes`): up to 8.
        device: "cpu" or "cuda"; None: the plan's, or the CPU, with a warning, where that is not
            here.
        postprocess: a rule in place of the plan's.
        resume: go on with `out` where an earlier call with the same run, image and options was
            stopped.
        skip_constant: pass windows of one constant value once for all that have the same.
        region: a box of the image's voxels, or a mask on its grid. Inside, labels are those of the
            whole image; outside they are background, and windows that only it has a part in are
            skipped.
        coarse: a run of a larger spacing that labels the image first. `run` labels the box around
            what that finds, outside of which all is background.
        margin_mm: how much larger that box is, on each side.
        probabilities: labels whose probabilities are written too, beside `out`, as
            `probability_VALUE/NAME`; float32. The softmax of the logits, or their sigmoids where
            the plan's loss is `one_vs_rest`.
        entropy: write the entropy of all labels' probabilities too, in nats, as `entropy/NAME`; of
            sigmoids the sum of each label's.
        confidence: write the probability of the most probable label too, as `confidence/NAME`.
        progress: called with (windows done, windows in all).

    Returns:
        A label map on the image's grid, in the smallest unsigned type. With `out` its voxels are
        read from there when they are first asked for.

    Raises:
        MemoryBudgetError: before anything large is allocated, if the budget is too small.
        DataError: if the image cannot be read or has another number of channels, the region lies on
            another grid, or the map cannot be written.
        CheckpointError: if a run cannot be loaded, or several do not belong together.
        PlanError: if the budget is none, the device asked for is not here, or a label or map cannot
            be had.
    """
    runs = load_runs(run)
    plan = runs[0].plan
    values = [label.value for label in plan.labels]
    maps = _maps(plan, probabilities, entropy=entropy, confidence=confidence, out=out)
    rule = postprocess or plan.inference.postprocess
    given, dtype = _given(image), np.min_scalar_type(max(values))
    task = Task(
        given=given,
        files_bytes=files_bytes(given, out, dtype.itemsize, maps.n),
        budget_bytes=budget_of(memory, device or runs[0].device),
        tta=tta,
        device=device,
        skip_constant=skip_constant,
        scratch=None if out is None else Path(out).parent,
    )
    grid = given.grid
    wanted = None if region is None else Region.of(region, grid)
    if coarse is not None:
        box = found_by(load_runs(coarse), task, margin_mm=margin_mm)
        wanted = box if wanted is None else wanted.within(box.box)
    sweep = task.sweep(runs, rule, writes=out is not None, maps=maps, region=wanted)
    axis = sweep.frame.native_axis

    def pieces(done: int) -> Iterator[LabelSlab]:
        return sweep.pieces(done, progress)

    if out is None:
        return collect_labels(pieces, grid, dtype, axis=axis, rule=rule)
    out = Path(out)
    names = [f"probability_{value}" for value in probabilities] + ["entropy"] * entropy
    names += ["confidence"] * confidence
    chosen = plan.inference
    mirrors = sweep.predictor.mirrors
    facts = (
        *(plan.patch_size, chosen.overlap, plan.precision),
        *(mirrors, rule, sweep.frame, sweep.cuts),
    )
    return LabelFile(
        path=out,
        grid=grid,
        dtype=dtype,
        axis=axis,
        rule=rule,
        resume=resume,
        fingerprint=fingerprint(
            facts,
            values,
            None if wanted is None else wanted.facts,
            weights_of([one.network for one in runs], [one.turns for one in runs]),
            files_of(given.paths)
            if isinstance(given, ImageFiles)
            else voxels_of(sweep.source, sweep.frame.axis),
        )
        if resume
        else "",
        maps=tuple(out.parent / name / out.name for name in names),
    ).write(pieces)


def _maps(
    plan: Plan,
    probabilities: Sequence[int],
    *,
    entropy: bool,
    confidence: bool,
    out: str | Path | None,
) -> Maps:
    values = [label.value for label in plan.labels]
    for value in probabilities:
        if value not in values:
            raise PlanError(f"no label {value} to give probabilities of; expected some of {values}")
    if (probabilities or entropy or confidence) and out is None:
        raise PlanError("probabilities and entropy are written beside `out`; name it")
    return Maps(
        classes=tuple(values.index(value) for value in probabilities),
        entropy=entropy,
        confidence=confidence,
        one_vs_rest=plan.training.loss.one_vs_rest,
    )


def forecast(
    run: Runs,
    grid: Grid,
    *,
    device: str | None = None,
    tta: bool = False,
    writes: bool = False,
    file_voxel_bytes: int = 0,
    files_bytes: int = 0,
) -> Forecast:
    """Predict the memory of labelling an image on this grid, before anything is allocated.

    Args:
        run: as `predict` takes it.
        grid: the image's.
        device: as `predict` takes it.
        tta: as `predict` takes it.
        writes: whether the label map goes to a file.
        file_voxel_bytes: of a voxel of the image's files; 0: the image is in memory already.
        files_bytes: what reading and writing take beside what is read and written, which is much
            for Zarr stores alone.

    Returns:
        The fastest way that gives freed memory back, and what it takes; `predict` keeps it where
        there is room.
    """
    runs = load_runs(run)
    demand = demand_of(
        runs,
        grid,
        device=device or runs[0].device,
        mirrored=tta and len(mirrored_axes(runs)) > 0,
        rule=runs[0].plan.inference.postprocess,
        writes=writes,
        file_voxel_bytes=file_voxel_bytes,
        files_bytes=files_bytes,
    )
    return next(forecasts(demand))


def _given(image: str | Path | Volume | Case | ImageFiles) -> ImageFiles | ImageArray:
    if isinstance(image, ImageFiles):
        return image
    if isinstance(image, Volume):
        return ImageArray.given(image)
    if isinstance(image, Case):
        return ImageFiles.judged(image.images, name=image.name)
    return ImageFiles.judged([image], name=str(image))
