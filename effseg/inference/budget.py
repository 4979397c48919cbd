"""What labelling an image takes in memory, known before; and the way that fits a budget."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from effseg.devices import DeviceKind
from effseg.errors import MemoryBudgetError
from effseg.inference.pace import MOST_WINDOWS
from effseg.memory import KEPT_WORST, parse_budget
from effseg.plans import Heap, format_bytes
from effseg.postprocess import COMPONENT_BYTES
from effseg.preprocess import Frame, preparing_bytes
from effseg.resample import SLAB_PLANES, labelling_bytes
from effseg.tiling import frontier, padded_shape, sweep_axis, window_starts
from effseg.types import Shape3

logger = logging.getLogger("effseg")

RUNTIME_BYTES = 12 << 20
"""What libraries keep of their own once they were used: threads, kernels, heaps in pieces."""

USUAL_VOXELS = 64**3
"""Of a window. On a CPU torch convolves one window of at most 20480 channels x planes x rows by
other kernels than several: 16^3 voxels of 16 channels took three times as long a window."""

Sums = Literal["device", "host", "disk"]
Reading = Literal["given", "whole", "streamed"]


@dataclass(frozen=True)
class Demand:
    """What is to be labelled, as far as memory depends on it.

    Attributes:
        frame: the image's frame for an axis to sweep along.
        is_file: whether the image lies in files, which are read whole or streamed.
        lies_ready: whether windows are cut from it where it lies, as float32 in memory.
        voxel_bytes: of a channel of a voxel once read whole.
        n_channels: of the image.
        n_blended: channels of what is blended, features or logits.
        patch_size: of a window.
        overlap: of two windows, a share.
        window_batch: windows in one pass, at most.
        mirrored: whether windows are also seen mirrored.
        label_bytes: of one label.
        keeps_labels: whether the label map is returned in memory.
        n_maps: how many maps are made beside the labels.
        files_bytes: what reading and writing take beside the stretch and the slabs.
        has_rule: whether components are looked for.
        kind: of the device.
        pass_bytes: what a pass over so many windows takes on the device, weights included.
        weight_bytes: of the weights alone.
    """

    frame: Callable[[int], Frame]
    is_file: bool
    lies_ready: bool
    voxel_bytes: int
    n_channels: int
    n_blended: int
    patch_size: Shape3
    overlap: float
    window_batch: int
    mirrored: bool
    label_bytes: int
    keeps_labels: bool
    n_maps: int
    files_bytes: int
    has_rule: bool
    kind: DeviceKind
    pass_bytes: Callable[[int], int]
    weight_bytes: int


def most_windows(window_batch: int | None, patch_size: Shape3, kind: DeviceKind) -> int:
    """How many windows a pass may take, where there is memory for them.

    Args:
        window_batch: as a plan says; None: what is fastest, told by timing. On a CPU no more are
            tried than are together as large as one of usual size: more take memory and no less
            time.
        patch_size: of a window.
        kind: of the device.
    """
    if window_batch is not None:
        return window_batch
    most = MOST_WINDOWS[kind]
    while kind == "cpu" and most > 1 and most * math.prod(patch_size) > USUAL_VOXELS:
        most //= 2
    return most


@dataclass(frozen=True)
class Forecast:
    """A way to label an image, and what it takes at most, in bytes.

    Attributes:
        frame: how the image is swept.
        reading: whether the image is in memory already, is read whole, or streamed.
        window_batch: windows in one pass, at most.
        sums: where windows are summed up.
        parts: what takes how much host memory; those named "pass" and "slab" not at once.
        device_bytes: on the device; 0 where that is the host.
        heap: "kept" where freed memory is kept, which is faster and takes up to `KEPT_WORST` times
            as much; "mapped": it is given back.
    """

    frame: Frame
    reading: Reading
    window_batch: int
    sums: Sums
    parts: dict[str, int]
    device_bytes: int
    heap: Heap = "mapped"

    @property
    def host_bytes(self) -> int:
        """What it takes of the host's memory."""
        either = ("pass", "slab")
        both = sum(n for name, n in self.parts.items() if name not in either)
        given_back = both + max(self.parts[name] for name in either)
        return math.ceil(KEPT_WORST * given_back) if self.heap == "kept" else given_back

    @property
    def peak_bytes(self) -> int:
        """The budget that would do: the larger of what it takes of the host and of the device."""
        return max(self.host_bytes, self.device_bytes)

    def __str__(self) -> str:
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        words = ", ".join(f"{name} {format_bytes(n)}" for name, n in largest)
        device = (
            f" and {format_bytes(self.device_bytes)} of the device" if self.device_bytes else ""
        )
        image = {"given": "as it is given", "whole": "read whole", "streamed": "read in stretches"}
        return (
            f"at most {format_bytes(self.host_bytes)} of memory{device} ({words}): "
            f"image {image[self.reading]}, swept along {'zyx'[self.frame.axis]}, "
            f"up to {self.window_batch} windows a pass, sums on the {self.sums}"
            + (", freed memory kept for speed" if self.heap == "kept" else "")
        )


def budget_of(memory: str | int | None, device: str) -> int | None:
    """The bytes that a prediction may take of the host's memory, and of the device's.

    Args:
        memory: as a user gives it; None: no limit.
        device: where the network runs.

    Raises:
        PlanError: if it is no budget.
        MemoryBudgetError: if it is "auto" and nothing is free.
    """
    if memory is None:
        return None
    n_bytes, why = parse_budget(memory, "cpu", *([] if device == "cpu" else [device]))
    logger.info("a budget of %s: %s", format_bytes(n_bytes), why)
    return n_bytes


def forecasts(demand: Demand, *, keeping: bool = False) -> Iterator[Forecast]:
    """The ways to label an image, the fastest first.

    Args:
        demand: what is to be labelled.
        keeping: also those that keep what a CPU frees; sums that need not go to the disk count for
            more than that, and that for more than windows a pass.
    """
    shape = padded_shape(demand.frame(0).grid.shape, demand.patch_size)
    best = demand.frame(sweep_axis(shape, demand.patch_size))
    along_file = next(f for f in map(demand.frame, range(3)) if f.native_axis == 0)
    ways: list[tuple[Reading, Frame]] = [("given", best)]
    if demand.is_file and best.native_axis == 0:
        ways = [("streamed", best)]
    elif demand.is_file:
        ways = [("whole", best), ("streamed", along_file)]
    sums: list[Sums] = ["device", "host", "disk"] if demand.kind == "cuda" else ["host", "disk"]
    batches = [min(demand.window_batch, max(_layer(demand, frame) for _, frame in ways))]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    heaps: list[Heap] = ["kept", "mapped"] if keeping and demand.kind == "cpu" else ["mapped"]
    for where, heap, batch, (reading, frame) in product(sums, heaps, batches, ways):
        way = _forecast(demand, frame, reading=reading, window_batch=batch, sums=where)
        yield replace(way, heap=heap)


def choose(
    ways: Iterable[Forecast],
    *,
    budget_bytes: int | None,
    free_bytes: int | None,
    room_bytes: int = 0,
) -> Forecast:
    """The first way that fits.

    Args:
        ways: the fastest first.
        budget_bytes: of the host's memory, and of the device's; None: any.
        free_bytes: of the device; None: any.
        room_bytes: of the host's memory, for keeping what is freed, where there is no budget.

    Raises:
        MemoryBudgetError: if none fits; the message names the smallest budget that would do.
    """
    tried = []
    for way in ways:
        bound = room_bytes if budget_bytes is None and way.heap == "kept" else budget_bytes
        fits = bound is None or way.peak_bytes <= bound
        if fits and (free_bytes is None or way.device_bytes <= free_bytes):
            logger.info("%s", way)
            return way
        tried.append(way)
    least = min(tried, key=lambda way: way.peak_bytes)
    shape = least.frame.native.shape
    if budget_bytes is None or least.peak_bytes <= budget_bytes:
        raise MemoryBudgetError(
            f"an image of {shape} voxels takes {format_bytes(least.device_bytes)} of the device, "
            f"of which {format_bytes(free_bytes or 0)} are free; predict on the CPU"
        )
    raise MemoryBudgetError(
        f"an image of {shape} voxels takes {format_bytes(least.peak_bytes)}, "
        f"the budget is {format_bytes(budget_bytes)}; "
        f"--memory {-(-least.peak_bytes // 2**20)}MiB would do"
    )


def _layer(demand: Demand, frame: Frame) -> int:
    """How many windows start at one place of the axis they are swept along: a pass' most."""
    shape = padded_shape(frame.grid.shape, demand.patch_size)
    counts = [
        len(window_starts(n, window, overlap=demand.overlap))
        for n, window in zip(shape, demand.patch_size, strict=True)
    ]
    return math.prod(counts) // counts[frame.axis]


def _forecast(
    demand: Demand, frame: Frame, *, reading: Reading, window_batch: int, sums: Sums
) -> Forecast:
    n_channels, n_blended = demand.n_channels, demand.n_blended
    shape, native = frame.grid.shape, frame.native.n_voxels
    padded = padded_shape(shape, demand.patch_size)
    under_way = math.prod(frontier(padded, demand.patch_size, frame.axis))
    window = math.prod(demand.patch_size)
    plane = under_way // demand.patch_size[frame.axis]
    ring = n_channels * min(demand.patch_size[frame.axis], shape[frame.axis])
    total, share = 4 * n_blended * under_way, 4 * (under_way + window)
    on_host = demand.kind == "cpu"
    # windows cut, beside those that lie side by side; one seen mirrored; one output's channel
    cut = 4 * n_channels * window * (window_batch * (3 if demand.mirrored else 1))
    passing = demand.pass_bytes(window_batch)
    slab = 4 * n_blended * SLAB_PLANES * plane
    labelling = labelling_bytes(
        frame.grid,
        frame.native,
        axis=frame.axis,
        n_channels=n_blended,
        label_bytes=demand.label_bytes,
        n_maps=demand.n_maps,
    )
    host_sums = {"device": total + share if on_host else 0, "host": total + share, "disk": share}
    if sums == "disk":
        host_sums["disk"] += 4 * under_way  # the channel that is mapped
    parts = {
        "weights": demand.weight_bytes,
        "image": native * n_channels * demand.voxel_bytes if reading == "whole" else 0,
        "stretch": 0
        if demand.lies_ready
        else 4 * ring * plane + preparing_bytes(frame, n_channels=n_channels),
        "sums": host_sums[sums],
        "pass": cut + (passing - demand.weight_bytes + 4 * window if on_host else 0),
        # on a device the next is made while one is made into labels
        "slab": slab * (1 if on_host else 2) + labelling,
        "labels": native * demand.label_bytes if demand.keeps_labels else 0,
        "files": demand.files_bytes,
        "components": COMPONENT_BYTES if demand.has_rule else 0,
        "runtime": RUNTIME_BYTES,
    }
    device = 0 if on_host else passing + cut
    if sums == "device" and not on_host:
        device += total + share + slab
    return Forecast(
        frame=frame,
        reading=reading,
        window_batch=window_batch,
        sums=sums,
        parts=parts,
        device_bytes=device,
    )
