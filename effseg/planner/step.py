"""A step of training that might be taken, traced: nothing is allocated, nothing runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from effseg.devices import AUTOCAST, DeviceKind, Precision, device_kind
from effseg.errors import PlanError
from effseg.losses import DeepSupervisionLoss, DistillationLoss, build_loss
from effseg.memory import KEPT_WORST, MemoryReport, Policy, apply_policy, recompute, trace_peak
from effseg.networks import MemoryMode, build_network, for_loss, why_whole
from effseg.networks.freezing import freeze_for_start, set_frozen
from effseg.optimizers import build_optimizer
from effseg.planner.recipe import with_class_weights
from effseg.planner.teachers import TaughtStep, teacher_networks
from effseg.plans import (
    DistillationConfig,
    Heap,
    LossConfig,
    OptimizerConfig,
    Plan,
    PlannedNetwork,
)
from effseg.types import Shape3

KEPT_USUAL = 1.5
"""Resident memory of a step on a CPU that keeps what is freed, over that on one that gives it back
(`benchmarks/heaps.py`); `KEPT_WORST` at most."""

TRAINER_BYTES = 16 * 2**20
"""What the training's loop holds on a CPU beside tensors: curves, logs, the library's own. Of 200
cases of 40 x 48 x 32 voxels it was 14 MiB."""


@dataclass(frozen=True)
class Step:
    """One training step, and what it takes.

    Attributes:
        patch: voxels.
        batch: samples.
        mode: of the network's memory.
        split: whether samples of a batch go through the network one after the other.
        policies: of its stages, by path.
        report: as traced.
        peak_bytes: predicted of the training, with what is no tensor.
        seconds: estimated.
        heap: how the C library is to keep freed memory (CPU).
    """

    patch: Shape3
    batch: int
    mode: MemoryMode
    split: bool
    policies: Mapping[str, Policy]
    report: MemoryReport
    peak_bytes: int
    seconds: float
    heap: Heap


class Subject(Protocol):
    """What a step is planned for.

    Attributes:
        modes: of the network's memory, from the fastest to the one that takes least.
        can_split: whether samples may go through the network one after the other.
    """

    @property
    def modes(self) -> tuple[MemoryMode, ...]:
        """Of the network's memory."""

    @property
    def can_split(self) -> bool:
        """Whether samples may go through the network one after the other."""

    def network(self, patch: Shape3, mode: MemoryMode) -> nn.Module:
        """The network for patches of this size, on the meta device or without weights to keep."""

    def trace(
        self, network: nn.Module, patch: Shape3, batch: int, *, split: bool = False
    ) -> MemoryReport:
        """The memory of a step of this network, under the policies that it has."""


@dataclass(frozen=True)
class PlannedTraining:
    """A network in training as `effseg train` runs it.

    Attributes:
        build_config: its configuration for patches of a size, with a memory mode; what goes in and
            comes out is the same for all.
        loss: its configuration.
        ignored: whether voxels may be ignored.
        precision: of the step.
        device: whose rules to follow.
        optimizer: its configuration.
        distillation: what is learnt from teachers; None: nothing.
        teachers: their networks.
        modes: of the network's memory.
        can_split: whether samples may go through the network one after the other.
    """

    build_config: Callable[[Shape3, MemoryMode], PlannedNetwork]
    loss: LossConfig
    ignored: bool
    precision: Precision
    device: DeviceKind
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distillation: DistillationConfig | None = None
    teachers: tuple[PlannedNetwork, ...] = ()
    modes: tuple[MemoryMode, ...] = field(default=("plain", "shared"))
    can_split: bool = True

    def network(self, patch: Shape3, mode: MemoryMode) -> nn.Module:
        """The network for patches of this size; the weights of ours hold nothing."""
        with torch.device("meta"):
            return build_network(self.build_config(patch, mode))

    def trace(
        self, network: nn.Module, patch: Shape3, batch: int, *, split: bool = False
    ) -> MemoryReport:
        """The memory of a step, modules named from the network on."""
        config = self.build_config(patch, self.modes[-1])
        n_classes = config.out_channels
        loss: Any = build_loss(
            self.loss, ignore_label=n_classes if self.ignored else None, n_classes=n_classes
        )
        if config.deep_supervision:
            loss = DeepSupervisionLoss(loss)
        taught = self.distillation
        if taught is not None:
            loss = DistillationLoss(loss, weight=taught.weight, temperature=taught.temperature)
        runner: Any = _SampleBySample(network, loss) if split else _WholeBatch(network, loss)
        outer, name = f"{type(runner).__name__}.network", type(network).__name__
        teacher_bytes = 0
        if taught is not None:
            runner = TaughtStep(runner, self.teachers, taught)
            outer = f"{type(runner).__name__}.runner.network"
            teacher_bytes = sum(p.nbytes for p in runner.teachers.parameters())
        report = trace_peak(
            runner,
            (batch, config.in_channels, *patch),
            loss=type(runner).loss,
            label_shape=(batch, *patch),
            label_dtype=torch.uint8,
            optimizer=partial(build_optimizer, config=self.optimizer),
            autocast=AUTOCAST[self.precision],
            device=self.device,
        )
        timeline = (
            replace(event, module=event.module.replace(outer, name, 1)) for event in report.timeline
        )
        return replace(
            report,
            timeline=tuple(timeline),
            # of what is trained: teachers stand in the peak, and have neither state nor average
            parameter_bytes=report.parameter_bytes - teacher_bytes,
        )


class _WholeBatch(nn.Module):
    """A network as a step of training runs it; gives itself and what the loss reads."""

    def __init__(self, network: nn.Module, batch_loss: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.batch_loss = batch_loss

    def forward(self, image: Tensor) -> tuple[Self, Any]:
        """What `loss` takes."""
        return self, for_loss(self.network, image)

    @staticmethod
    def loss(output: tuple[Any, Any], labels: Tensor) -> Tensor:
        """Of the batch."""
        runner, outputs = output
        value: Tensor = runner.batch_loss(outputs, labels)
        return value


class _SampleBySample(_WholeBatch):
    """As training runs samples one after the other: each once more when backward comes to it."""

    def forward(self, image: Tensor) -> tuple[Self, Any]:
        """What `loss` takes: nothing is computed yet."""
        return self, image

    @staticmethod
    def loss(output: tuple[Any, Any], labels: Tensor) -> Tensor:
        """Of the batch, from the sums of each sample."""
        runner, images = output

        def terms(image: Tensor, label: Tensor) -> Tensor:
            rows: Tensor = runner.batch_loss.terms(for_loss(runner.network, image), label)
            return rows

        rows = [
            recompute(runner.network, terms, images[i, None], labels[i, None])
            for i in range(len(images))
        ]
        value: Tensor = runner.batch_loss.of_terms(torch.cat(rows))
        return value


def trace_plan(plan: Plan) -> MemoryReport:
    """The memory of a training step as a plan has it, module by module.

    Of a plan that lets frozen parts thaw, the step once all of them have: it takes most.
    Of several losses on a schedule, that of the one whose step takes most.

    Raises:
        PlanError: if a policy names no stage of the network, nothing in it may learn, or samples
            are to go one after the other through one that needs them all.
        CheckpointError: if teachers do not fit the plan.
    """
    plan = with_class_weights(plan)
    reports = (_trace_loss(plan, loss) for loss in plan.training.losses)
    return max(reports, key=lambda report: report.peak_bytes)


def _trace_loss(plan: Plan, loss: LossConfig) -> MemoryReport:
    subject = PlannedTraining(
        build_config=lambda *_: plan.network,
        loss=loss,
        ignored=plan.ignores_voxels,
        precision=plan.precision,
        device=device_kind(plan.device),
        optimizer=plan.training.optimizer,
        distillation=plan.training.distillation,
        teachers=tuple(network for network, _ in teacher_networks(plan)),
    )
    network = subject.network(plan.patch_size, plan.network.memory)
    start = plan.training.start
    freeze_for_start(network, start)
    for stage in start.thaw:
        set_frozen(network, stage.parts, frozen=False)
    why_not = why_whole(network) if plan.sample_by_sample else None
    if why_not is not None:
        raise PlanError(
            f"sample_by_sample is true, but a batch cannot be split: {why_not}; set it to false"
        )
    apply_policy(network, plan.policies)
    return subject.trace(network, plan.patch_size, plan.batch_size, split=plan.sample_by_sample)


def beside_training(report: MemoryReport, device: DeviceKind) -> int:
    """What stands beside a step all the time: the averaged weights; on a CPU the loop itself."""
    return report.parameter_bytes + (TRAINER_BYTES if device == "cpu" else 0)


def predicted_peak(
    report: MemoryReport, *, device: DeviceKind, heap: Heap, beside_bytes: int
) -> int:
    """What a training takes: on CUDA what the card shows, else resident memory.

    Args:
        report: of a traced step.
        device: that the step was traced for.
        heap: how the C library keeps freed memory (CPU).
        beside_bytes: what stands beside the step all the time.
    """
    assert report.device_bytes is not None
    given_back = report.device_bytes + beside_bytes
    if device == "cuda" or heap == "mapped":
        return given_back
    return round(KEPT_USUAL * given_back)


def choose_heap(
    report: MemoryReport, *, device: DeviceKind, beside_bytes: int, budget_bytes: int
) -> Heap:
    """Keep what a CPU frees, which is about twice as fast, where the most that may take fits."""
    if device == "cuda":
        return "system"
    given_back = predicted_peak(report, device=device, heap="mapped", beside_bytes=beside_bytes)
    return "kept" if KEPT_WORST * given_back <= budget_bytes else "mapped"
