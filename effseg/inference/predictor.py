"""A network slid over a volume in overlapping windows, which is finished slab by slab."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from effseg.devices import AUTOCAST, Precision, device_kind, present_device
from effseg.errors import PlanError
from effseg.inference.ahead import ahead
from effseg.inference.blending import Blending
from effseg.inference.budget import (
    Demand,
    Forecast,
    Sums,
    budget_of,
    choose,
    forecasts,
    most_windows,
)
from effseg.inference.fingerprints import fingerprint, voxels_of, weights_of
from effseg.inference.frontier import Frontier
from effseg.inference.headless import Blend
from effseg.inference.output import LabelFile, collect_labels, files_bytes
from effseg.inference.pace import Pace
from effseg.inference.passes import Passes, mirrors
from effseg.inference.tracing import weight_bytes_of
from effseg.inference.under_way import Needed, Progress, SweepUnderWay
from effseg.networks import WeightsFile
from effseg.plans import Heap
from effseg.preprocess import Frame
from effseg.resample import LabelSlab, Slabs, label_slabs
from effseg.sources import ArraySource, ChunkedArray, ImageArray, ImageFiles, ImageSource
from effseg.tiling import Sweep, padded_shape
from effseg.types import Array, Shape3
from effseg.volume import Volume


class Predictor:
    """Labels volumes of any size with a network that takes patches.

    Windows overlap and are blended with Gaussian weights in float32; with `tta` each window is
    also seen mirrored along every combination of its axes, and the logits are averaged, as they are
    over several networks, and over the several `weights` of one, which take turns in it: of them
    only one is ever in memory. What is summed up is the features below the head, where the
    networks end in an affine one that reads fewer channels than it makes, otherwise the logits.

    The windows sweep the volume along one axis. Sums exist for a stretch as long as a window, and
    a slab that no later window touches is handed on: memory depends neither on the length of the
    volume nor, with such a head, on the number of classes. An image need not be in memory either.

    Args:
        network: takes (N, C, z, y, x), returns logits (N, classes, z, y, x), or a list of logits
            whose first is the finest; or several such networks. They are put into eval mode, on the
            device.
        weights: of each network, files that are read into it in turn, once a pass; its own weights
            are then lost. None or, for a network, no file: it is run as it is.
        patch_size: of a window, voxels (z, y, x).
        overlap: the least share of a window that its neighbour covers.
        tta: axes of (z, y, x), by number: average over the mirrors along them. True: all three, 8
            mirrors; a network that was not trained on mirrored images takes them for others.
        device: where the network runs, "cpu", "cuda" or "cuda:1".
        window_batch: windows in one pass; None: as many as are fastest, told by timing 1, 2, 4, ...
            as far as `memory` has room; on a CPU 2 or 4 that are together at most 64^3, else 1.
        precision: autocast type; "float32" switches autocast off.
        skip_constant: run windows of one constant value, such as clipped air, once for all that
            have the same; the result is the same.
        memory: a budget such as "4GiB" for what `predict` takes of the host's memory, and of the
            device's; "auto": what is free of both now; None: no limit. Smaller passes, and sums on
            the host or the disk, are taken to keep it; where it is roomy, freed memory is kept,
            which makes a CPU about twice as fast.
        scratch: folder of files that sums go to where memory is short; None: where the system has
            its temporary ones.

    Attributes:
        pace: what was found of how many windows a pass should take.

    Raises:
        PlanError: if an argument is out of range or the device is not there.
    """

    def __init__(
        self,
        network: nn.Module | Sequence[nn.Module],
        patch_size: Shape3,
        *,
        weights: Sequence[Sequence[WeightsFile]] | None = None,
        overlap: float = 0.5,
        tta: bool | Sequence[int] = False,
        device: str = "cpu",
        window_batch: int | None = None,
        precision: Precision = "float32",
        skip_constant: bool = False,
        memory: str | int | None = None,
        scratch: str | Path | None = None,
    ) -> None:
        for name, least in (("patch_size", min(patch_size)), ("window_batch", window_batch)):
            if least is not None and least < 1:
                raise PlanError(f"{name} {least}; expected at least 1")
        if not 0 <= overlap < 1:
            raise PlanError(f"overlap {overlap}; expected 0 <= overlap < 1")
        networks = (network,) if isinstance(network, nn.Module) else tuple(network)
        if not networks:
            raise PlanError("no network; expected one or more")
        if weights is not None and len(weights) != len(networks):
            raise PlanError(
                f"weights of {len(weights)} networks for {len(networks)}; expected as many"
            )
        self.device = present_device(device)
        self.networks = tuple(one.to(self.device).eval() for one in networks)
        self.weights = tuple(tuple(files) for files in weights or [()] * len(networks))
        self.patch_size = patch_size
        self.overlap = overlap
        along = ((), (0, 1, 2))[tta] if isinstance(tta, bool) else tuple(tta)
        if not {0, 1, 2}.issuperset(along):
            raise PlanError(f"tta {along}; expected axes of (z, y, x): 0, 1 or 2")
        self.mirrors = mirrors(along)
        self.window_batch = window_batch
        self.precision = precision
        self.skip_constant = skip_constant
        self.memory = budget_of(memory, device)
        self.scratch = Path(tempfile.gettempdir() if scratch is None else scratch)
        self.pace = Pace(device_kind(self.device.type))
        self._blending = Blending(self.networks, patch_size, self.device, weights=self.weights)

    def predict(
        self,
        image: Array | ChunkedArray | Volume | str | Path,
        out: str | Path | None = None,
        *,
        resume: bool = False,
    ) -> Volume:
        """Label an image as it lies: no resampling, no normalisation.

        Args:
            image: (z, y, x) or (C, z, y, x): an array, in memory or not, such as a memory map, a
                Zarr array or an HDF5 data set, of which a stretch is read at a time; a `Volume` of
                one; or a file.
            out: write the label map there, slab by slab; its suffix names the format.
            resume: go on with `out` where an earlier call with the same arguments was stopped.

        Returns:
            The index of the largest logit at each voxel, on the image's grid, in the smallest
            unsigned type that holds the classes. With `out` its voxels are read from there when
            they are first asked for.
        """
        given: ImageFiles | ImageArray
        if isinstance(image, str | Path):
            given = ImageFiles.judged([image], name=str(image))
        else:
            given = ImageArray.given(image)
        way = self._way(given, out)
        frame = way.frame
        source = given.opened(whole=way.reading == "whole")

        def pieces(start: int) -> Iterator[LabelSlab]:
            slabs = self.slabs(
                source,
                axis=frame.axis,
                start=start,
                window_batch=way.window_batch,
                sums=way.sums,
                heap=way.heap,
            )
            return label_slabs(slabs, frame.grid, frame.native, start=start)

        dtype = np.min_scalar_type(self._blending.n_classes(source.n_channels) - 1)
        if out is None:
            return collect_labels(pieces, frame.native, dtype, axis=frame.axis)
        file = LabelFile(
            path=Path(out),
            grid=frame.native,
            dtype=dtype,
            axis=frame.axis,
            resume=resume,
            fingerprint=self._fingerprint(source, frame.axis) if resume else "",
        )
        return file.write(pieces)

    def _way(self, given: ImageFiles | ImageArray, out: str | Path | None) -> Forecast:
        """How to label an image so that it fits the budget."""
        kind = device_kind(self.device.type)
        weight_bytes = weight_bytes_of(self.networks)
        n_classes = self._blending.n_classes(given.n_channels)
        label_bytes = np.min_scalar_type(n_classes - 1).itemsize
        demand = Demand(
            frame=lambda axis: Frame.as_it_lies(given.grid, axis=axis),
            is_file=isinstance(given, ImageFiles),
            lies_ready=isinstance(given, ImageArray) and ArraySource(given.array).whole is not None,
            voxel_bytes=given.voxel_bytes,
            n_channels=given.n_channels,
            n_blended=self._blending.n_blended(given.n_channels),
            patch_size=self.patch_size,
            overlap=self.overlap,
            window_batch=most_windows(self.window_batch, self.patch_size, kind),
            mirrored=len(self.mirrors) > 1,
            label_bytes=label_bytes,
            keeps_labels=out is None,
            n_maps=0,
            files_bytes=files_bytes(given, out, label_bytes),
            has_rule=False,
            kind=kind,
            pass_bytes=self._blending.pass_bytes(
                given.n_channels,
                autocast=AUTOCAST[self.precision],
                kind=kind,
                weight_bytes=weight_bytes,
            ),
            weight_bytes=weight_bytes,
        )
        if self.memory is None:  # then nothing needs to be traced, which not every network can be
            demand = replace(demand, pass_bytes=lambda _: 0)
            return next(forecasts(demand))
        free = torch.cuda.mem_get_info(self.device)[0] if kind == "cuda" else None
        ways = forecasts(demand, keeping=True)
        return choose(ways, budget_bytes=self.memory, free_bytes=free)

    def logits(self, image: Array, *, progress: Progress | None = None) -> npt.NDArray[np.float32]:
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

    def slabs(
        self,
        image: Array | ChunkedArray | ImageSource,
        *,
        axis: int | None = None,
        backwards: bool = False,
        start: int = 0,
        needed: Needed | None = None,
        progress: Progress | None = None,
        window_batch: int | None = None,
        sums: Sums = "device",
        heap: Heap = "mapped",
    ) -> Slabs:
        """Blend over an image and hand on what is finished, from one end to the other.

        Args:
            image: (C, z, y, x), as the network was trained to see it; axes shorter than the
                window are padded with each channel's minimum.
            axis: to sweep along; None: where the stretch under way is smallest.
            backwards: the image is given from the end of that axis to its start. Windows are placed
                and seen as in the image the right way round.
            start: the first position along the axis that is wanted.
            needed: which windows to pass; None: all. Where none was, logits or features are 0.
            progress: called after each pass.
            window_batch: windows in one pass, at most; None: as the predictor has them.
            sums: where windows are summed up.
            heap: "kept" keeps what the host frees while the windows pass, which is faster and takes
                more; "mapped" gives it back.

        Returns:
            Pairs (start along its axis, logits (classes, z, y, x)), made as they are asked for; or,
            as its parts, what is blended and a head for it.

        Raises:
            DataError: from the slabs, if a value is not finite: no label can be trusted then.
        """
        source = image if isinstance(image, ImageSource) else ArraySource(image)
        kind = device_kind(self.device.type)
        blend = self._blending.of(source.n_channels)
        sweep = Sweep.over(
            padded_shape(source.shape, self.patch_size),
            self.patch_size,
            overlap=self.overlap,
            axis=axis,
            backwards=backwards,
        )
        parts = SweepUnderWay(
            source=source,
            sweep=sweep,
            passes=partial(self._passes, blend, sums=sums),
            window_batch=window_batch or most_windows(self.window_batch, self.patch_size, kind),
            pace=self.pace if self.window_batch is None else None,
            n_blended=lambda: self._blending.n_blended(source.n_channels),
            start=start,
            needed=needed,
            progress=progress,
            heap=heap,
        ).finished()
        return Slabs(
            axis=sweep.axis,
            shape=source.shape,
            # a device goes on while slabs are made into labels and written
            parts=ahead(parts) if self.device.type == "cuda" else parts,
            head=blend.head,
        )

    def _fingerprint(self, source: ImageSource, axis: int) -> str:
        options = (self.patch_size, self.overlap, self.mirrors, self.precision)
        weights = weights_of(self.networks, self.weights)
        return fingerprint(options, weights, voxels_of(source, axis))

    def _passes(self, blend: Blend, sweep: Sweep, *, sums: Sums) -> Passes:
        n_passes = len(self.mirrors) * (1 if blend.head else len(blend.networks))
        return Passes(
            blend,
            mirrors=self.mirrors,
            backwards=sweep.axis if sweep.backwards else None,
            frontier=lambda n: Frontier(
                n,
                sweep,
                n_passes=n_passes,
                device=self.device if sums == "device" else torch.device("cpu"),
                folder=self.scratch if sums == "disk" else None,
            ),
            device=self.device,
            precision=self.precision,
            skip_constant=self.skip_constant,
        )
