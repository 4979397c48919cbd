"""What the data of a training take of the host's memory: patches, their queue, whole cases.

Patches are drawn and augmented between the steps, in the training process or in workers. Between
steps no activation lives, so that without workers the two peaks do not meet: a training holds the
larger of a step, and of what rests between steps with `loader_bytes`. Workers go on meanwhile, and
theirs are added to the step.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from effseg.devices import AUTOCAST, device_kind
from effseg.memory import MemoryReport, trace_forward
from effseg.networks import build_network
from effseg.optimizers import numbers_kept
from effseg.planner.step import TRAINER_BYTES, beside_training, predicted_peak
from effseg.planner.teachers import teacher_bytes
from effseg.plans import AugmentConfig, Plan
from effseg.postprocess import COMPONENT_BYTES
from effseg.preprocess import Frame, preparing_bytes
from effseg.types import Shape3

FLOAT = 4
MOST_AHEAD = 2
"""Batches a worker makes ahead: one that waits and one that is made keep a step from waiting."""
WORKER_BYTES = 20 * 2**20
"""Of a worker beyond its patches: what it writes to of the pages that a fork shares (14 to 17 MiB
measured). A system that spawns processes instead takes the imports anew for each."""
WHOLE_BYTES = 64 * 2**20
"""Images up to this size are read whole when a case is prepared: one that is normalised by itself
is gone through twice, and so inflated once."""
SLAB_VOXELS = 2**20
"""Of a label map, made into class indices and searched for components at once."""
SCORING_BYTES, COUNTING_BYTES = 27, 52
"""A voxel, of what a validation patch is scored with: image, label and masks beside the logits; and
where there are few of these, the 64-bit indices of its guesses. Measured at 3 to 118 classes."""
RESAMPLING_BYTES = 4 * 2**20
"""What `resample_like` works with beside a map and its result."""


@dataclass(frozen=True)
class Queue:
    """How batches are made ahead.

    Attributes:
        workers: processes that make them; 0: the training process does, when it needs one.
        ahead: batches that each makes before the first of them is taken.
    """

    workers: int
    ahead: int


def batch_bytes(patch: Shape3, n_channels: int, batch: int, *, label_itemsize: int) -> int:
    """Images in float32 and labels of a batch."""
    return batch * math.prod(patch) * (FLOAT * n_channels + label_itemsize)


def queue_of(n_bytes: int, *, workers: int, queue_bytes: int) -> Queue:
    """The queue of batches of so many bytes: fewer workers where not even one each fits.

    Args:
        n_bytes: of a batch.
        workers: that are wanted.
        queue_bytes: most bytes of batches that wait.
    """
    workers = min(workers, queue_bytes // n_bytes)
    if workers == 0:
        return Queue(workers=0, ahead=0)
    return Queue(workers=workers, ahead=min(MOST_AHEAD, queue_bytes // (workers * n_bytes)))


def loader_bytes(
    patch: Shape3,
    n_channels: int,
    batch: int,
    *,
    workers: int,
    queue_bytes: int,
    label_itemsize: int,
    augment: AugmentConfig,
) -> int:
    """The most that drawing, augmenting and queueing patches takes of the host's memory.

    Within `mapped_blocks`, which workers enter of themselves; a heap that keeps what is freed takes
    more.

    Args:
        patch: voxels.
        n_channels: of the image.
        batch: samples.
        workers: as planned; fewer where `queue_bytes` asks for it.
        queue_bytes: most bytes of batches that wait.
        label_itemsize: bytes of a label's voxel.
        augment: what may happen to a patch.
    """
    whole = batch_bytes(patch, n_channels, batch, label_itemsize=label_itemsize)
    queue = queue_of(whole, workers=workers, queue_bytes=queue_bytes)
    per_voxel = augmenting_bytes(n_channels, label_itemsize=label_itemsize, augment=augment)
    # the last sample of a batch is made beside the others; then all are put side by side
    made = (batch - 1) * (whole // batch) + math.prod(patch) * per_voxel
    if queue.workers == 0:
        return max(made, 2 * whole)
    # what is put side by side by a worker lies in the queue
    return queue.workers * (WORKER_BYTES + max(made, whole) + queue.ahead * whole)


def augmenting_bytes(n_channels: int, *, label_itemsize: int, augment: AugmentConfig) -> int:
    """The most that reading and augmenting one patch holds at once, a voxel.

    Counted in the transforms' code, channel by channel as they work; `C` channels of float32:

    - the patch as it is read, and its copy that is changed: 4 C and the label, each;
    - an affine: its grid (4 numbers), of that three axes again, and these in float64; image and
      result in float64, and the result in float32. The label is moved in the same way, as one
      channel, when the new image stands already;
    - a flip or a turn: another copy, beside which the affine works;
    - intensities, when the copy is free again: the channels done, and for the one under way a
      number of temporaries; all channels twice when they are put side by side.
    """
    whole = FLOAT * n_channels + label_itemsize

    def may(*chances: float) -> int:
        return sum(chance * augment.highest_probability > 0 for chance in chances)

    moves = may(augment.flip if augment.flip_axes else 0.0, augment.rotate90)
    held = whole * (1 + moves)
    if may(augment.affine):
        grid = 4 + 3
        image = max(grid + 6 + 2 * n_channels, 4 + 6 + 5 * n_channels)
        label = grid + 6 + 2 + n_channels + 1
        held = max(held, whole * (1 + min(moves, 1)) + FLOAT * max(image, label))
    temporaries = (  # numbers, of the channel under way
        (augment.noise, 3),
        (augment.blur, 3),
        (augment.brightness, 2),
        (augment.contrast, 2),
        (augment.low_resolution, 2),
        (augment.gamma, 4),
    )
    own = [max(n_channels - 1 + n, 2 * n_channels) for chance, n in temporaries if may(chance)]
    if own:
        before = n_channels if len(own) > 1 else 0
        held = max(held, whole + FLOAT * (before + max(own)))
    return whole + held


def training_peak(plan: Plan, report: MemoryReport) -> int:
    """The most that a training as planned takes of its device, or of a CPU's resident memory.

    Steps take most, as a rule. Without workers patches are made between them, when activations are
    gone; workers on a CPU go on meanwhile. With many classes scoring a patch may take more.

    Args:
        plan: the training's.
        report: of its step, traced.
    """
    kind = device_kind(plan.device)
    step = predicted_peak(
        report, device=kind, heap=plan.memory.heap, beside_bytes=beside_training(report, kind)
    )
    step += accumulating_bytes(plan, report)
    taught = teacher_bytes(plan)
    scoring = validation_bytes(plan) + taught
    if kind == "cuda":
        return max(step, scoring)
    loader = plan.memory.loader_bytes
    if plan.training.workers > 0:
        return max(step, scoring) + loader
    # at rest: the weights, the averaged ones, what the optimizer keeps, and teachers
    resting = 2 + numbers_kept(plan.training.optimizer)
    between = resting * report.parameter_bytes + taught + TRAINER_BYTES + loader
    return max(step, scoring, between)


def accumulating_bytes(plan: Plan, report: MemoryReport) -> int:
    """What a step of several batches takes beyond one of a single batch, at most.

    Their images and labels lie ready together, and the gradients of the batches before are there
    from the start; in a step of one batch they come to be one by one.

    Args:
        plan: the training's.
        report: of a step of one batch, traced.
    """
    more = plan.training.optimizer.accumulate - 1
    waiting = batch_bytes(
        plan.patch_size,
        len(plan.channels),
        plan.batch_size,
        label_itemsize=_label_itemsize(plan),
    )
    return more * waiting + (report.parameter_bytes if more else 0)


def planned_loader_bytes(plan: Plan) -> int:
    """What a plan's loader takes of the host."""
    return loader_bytes(
        plan.patch_size,
        len(plan.channels),
        plan.samples_per_step,
        workers=plan.training.workers,
        queue_bytes=plan.training.queue_bytes,
        label_itemsize=_label_itemsize(plan),
        augment=plan.training.augment,
    )


def _label_itemsize(plan: Plan) -> int:
    return 1 if len(plan.labels) < 256 else 2


def validation_bytes(plan: Plan) -> int:
    """The most that scoring a validation patch takes, with all that rests between steps.

    On the device of the plan, as a step's peak. It counts where there are many classes: of a patch
    all logits exist at once, and once more in the loss.

    Args:
        plan: the training's.
    """
    kind = device_kind(plan.device)
    with torch.device("meta"):
        network = build_network(plan.network)
    shape = (1, plan.network.in_channels, *plan.patch_size)
    report = trace_forward(network, shape, autocast=AUTOCAST[plan.precision], device=kind)
    assert report.device_bytes is not None
    scoring = math.prod(plan.patch_size) * max(
        2 * FLOAT * plan.network.out_channels + SCORING_BYTES, COUNTING_BYTES
    )
    beside = report.device_bytes - report.peak_bytes
    weights = report.parameter_bytes
    # those under way are the averaged ones; beside them the network's own, and the optimizer's
    resting = 1 + numbers_kept(plan.training.optimizer)
    return resting * weights + max(report.device_bytes, beside + weights + scoring)


def case_bytes(
    frame: Frame, plan: Plan, *, image_itemsize: int, label_dtype: "np.dtype[np.generic]"
) -> int:
    """The most that preparing one case takes: of a training, before its first step.

    The label map is whole in memory, as stored and in the smallest type, then at the plan's
    spacing; of the image there are a few planes, unless its files are small.

    Args:
        frame: of its image, swept along the first axis of its files.
        plan: says what it is prepared for.
        image_itemsize: bytes of a channel of a voxel as read.
        label_dtype: of the label map as read.
    """
    n_channels = len(plan.channels)
    native, prepared = frame.native.n_voxels, frame.grid.n_voxels
    values = [label.value for label in plan.labels] + [plan.ignore_label or 0]
    small = np.min_scalar_type(max(values))
    if label_dtype.kind == "f":
        reading = 4 * label_dtype.itemsize + 1  # rounded, its distance from that, and a mask
    else:
        reading = label_dtype.itemsize + (small.itemsize if label_dtype != small else 0)
    moving = (native + (prepared if frame.is_resampled else 0)) * small.itemsize
    plane = prepared // frame.grid.shape[0]
    # places, their values and differences of a slab, or the random numbers of its voxels
    searching = prepared * small.itemsize + COMPONENT_BYTES + 28 * max(SLAB_VOXELS, plane)
    stored = native * n_channels * image_itemsize
    image = preparing_bytes(frame, n_channels=n_channels) + (
        2 * stored if stored <= WHOLE_BYTES else 0
    )
    return max(native * reading, moving + RESAMPLING_BYTES, searching, image)
