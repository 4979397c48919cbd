"""Runs on their way over an image: in memory that is known before."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from effseg.devices import device_kind, present_device
from effseg.inference.budget import Demand, Forecast, choose, forecasts, most_windows
from effseg.inference.output import removes
from effseg.inference.predictor import Predictor
from effseg.inference.region import Region
from effseg.inference.run import Run, mirrored_axes
from effseg.inference.tracing import pass_beside_others, weight_bytes_of
from effseg.inference.under_way import Progress
from effseg.plans import PostprocessConfig
from effseg.postprocess import ComponentStream
from effseg.preprocess import Frame, PreparedSlabs, check_channels
from effseg.resample import LabelSlab, Maps, first_needed, label_slabs
from effseg.sources import ImageArray, ImageFiles
from effseg.volume import Grid

logger = logging.getLogger("effseg")


@dataclass(frozen=True)
class RunSweep:
    """Runs on their way over an image."""

    frame: Frame
    source: PreparedSlabs
    predictor: Predictor
    way: Forecast
    values: Sequence[int]
    maps: Maps
    region: Region | None
    cuts: Sequence[float]

    def pieces(self, done: int, progress: Progress | None) -> Iterator[LabelSlab]:
        """The labels behind so many finished planes."""
        frame, region = self.frame, self.region
        slabs = self.predictor.slabs(
            self.source,
            axis=frame.axis,
            backwards=frame.backwards,
            start=first_needed(frame.grid, frame.native, axis=frame.axis, start=done),
            needed=None if region is None else region.needed(frame.grid, frame.native),
            window_batch=self.way.window_batch,
            sums=self.way.sums,
            heap=self.way.heap,
            progress=progress,
        )
        for box, labels, made in label_slabs(
            slabs,
            frame.grid,
            frame.native,
            values=self.values,
            start=done,
            maps=self.maps,
            cuts=self.cuts,
        ):
            if region is not None:
                outside = region.outside(box)
                labels[outside] = self.values[0]
                made[:, outside] = self.maps.outside[:, None]
            yield box, labels, made


@dataclass(frozen=True)
class Task:
    """An image, and what holds for every run that labels it."""

    given: ImageFiles | ImageArray
    files_bytes: int
    budget_bytes: int | None
    tta: bool
    device: str | None
    skip_constant: bool
    scratch: Path | None

    def sweep(
        self,
        runs: Sequence[Run],
        rule: PostprocessConfig,
        *,
        writes: bool,
        maps: Maps,
        region: Region | None,
        cuts: Sequence[float] | None = None,
    ) -> RunSweep:
        """Choose the way that fits, and get everything ready; `cuts` in place of the plan's."""
        plan, given = runs[0].plan, self.given
        check_channels(given.n_channels, plan)
        along = mirrored_axes(runs) if self.tta else ()
        device = self.device or runs[0].device
        present_device(device)  # one that is not here is refused before the image is read
        demand = demand_of(
            runs,
            given.grid,
            device=device,
            mirrored=len(along) > 0,
            rule=rule,
            writes=writes,
            file_voxel_bytes=given.voxel_bytes,
            n_maps=maps.n,
            files_bytes=self.files_bytes,
        )
        way = choose(
            forecasts(demand, keeping=True),
            budget_bytes=self.budget_bytes,
            free_bytes=torch.cuda.mem_get_info(device)[0] if demand.kind == "cuda" else None,
            room_bytes=plan.memory.budget_bytes,
        )
        predictor = Predictor(
            [one.headless or one.network for one in runs],
            plan.patch_size,
            weights=[one.turns for one in runs],
            overlap=plan.inference.overlap,
            tta=along,
            device=device,
            window_batch=plan.inference.window_batch,
            precision=plan.precision,
            skip_constant=self.skip_constant,
            scratch=self.scratch,
        )
        predictor.pace = runs[0].pace(device, manner=(along, sum(one.n_models for one in runs)))
        image = given.opened(whole=way.reading == "whole")
        return RunSweep(
            frame=way.frame,
            source=PreparedSlabs(image, way.frame, plan),
            predictor=predictor,
            way=way,
            values=[label.value for label in plan.labels],
            maps=maps,
            region=region,
            cuts=plan.inference.cuts if cuts is None else cuts,
        )


def found_by(runs: Sequence[Run], task: Task, *, margin_mm: float) -> Region:
    """The box around what a coarse run finds, its noise removed."""
    rule, grid = runs[0].plan.inference.postprocess, task.given.grid
    sweep = task.sweep(runs, rule, writes=True, maps=Maps(), region=None)
    axis = sweep.frame.native_axis
    with ComponentStream(grid.voxel_mm3, rule) as stream:
        for _, labels, _ in sweep.pieces(0, None):
            stream.add(np.moveaxis(labels, axis, 0))
        boxes = []
        for component in stream.kept:
            box = list(component.box[1:])
            box.insert(axis, component.box[0])
            boxes.append((box[0], box[1], box[2]))
    region = Region.around(boxes, grid, margin_mm=margin_mm)
    lengths = " x ".join(str(part.stop - part.start) for part in region.box)
    logger.info("the coarse run found something in %s voxels of %s", lengths, grid.shape)
    return region


def demand_of(
    runs: Sequence[Run],
    grid: Grid,
    *,
    device: str,
    mirrored: bool,
    rule: PostprocessConfig,
    writes: bool,
    file_voxel_bytes: int,
    files_bytes: int,
    n_maps: int = 0,
) -> Demand:
    """What memory depends on when some runs label an image on this grid."""
    plan, kind = runs[0].plan, device_kind(device)
    weight_bytes = weight_bytes_of([one.network for one in runs])
    n_blended = n_blended_of(runs)

    def pass_bytes(window_batch: int) -> int:
        passes = [one.window_bytes(kind, window_batch) for one in runs]
        return pass_beside_others(passes, weight_bytes)

    return Demand(
        frame=lambda axis: Frame.of(grid, plan, axis=axis),
        is_file=file_voxel_bytes > 0,
        lies_ready=False,
        voxel_bytes=file_voxel_bytes,
        n_channels=len(plan.channels),
        n_blended=n_blended,
        patch_size=plan.patch_size,
        overlap=plan.inference.overlap,
        window_batch=most_windows(plan.inference.window_batch, plan.patch_size, kind),
        mirrored=mirrored,
        label_bytes=np.min_scalar_type(max(label.value for label in plan.labels)).itemsize,
        keeps_labels=not writes,
        n_maps=n_maps,
        files_bytes=files_bytes,
        has_rule=removes(rule),
        kind=kind,
        pass_bytes=pass_bytes,
        weight_bytes=weight_bytes,
    )


def n_blended_of(runs: Sequence[Run]) -> int:
    """How many channels are blended of several runs."""
    features = sum(
        one.headless.conv.in_channels * one.n_models for one in runs if one.headless is not None
    )
    n_classes = len(runs[0].plan.labels)
    every = all(one.headless is not None for one in runs)
    return features if every and features < n_classes else n_classes
