"""Any network in a budget: patch, batch and what is recomputed, found by tracing its step."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from effseg.dataset import Dataset
from effseg.devices import AUTOCAST, DeviceKind, Precision, device_kind
from effseg.errors import PlanError
from effseg.losses import DeepSupervisionLoss, build_loss
from effseg.memory import (
    MemoryReport,
    Policy,
    apply_policy,
    heap_of,
    trace_forward,
    trace_peak,
)
from effseg.networks import MemoryMode
from effseg.planner.candidates import SMALLEST_BATCH, Candidates
from effseg.planner.facts import fingerprint
from effseg.planner.geometry import median_shape, patches_of_stride, target_spacing
from effseg.planner.machine import choose_device, choose_precision
from effseg.planner.rates import machine_rates
from effseg.planner.search import LARGEST_BATCH, Search
from effseg.plans import Alternative, Fingerprint, Heap, LossConfig, format_bytes, parse_bytes
from effseg.types import Shape3, Spacing

STRIDES = (1, 2, 4, 8, 16, 32, 64)
"""Of what a network may want its patches to be a multiple."""
COARSEST = 3
"""Voxels along an axis at the coarsest scale while the stride is looked for; odd, so that a network
that wants a multiple of twice as much refuses."""

Loss = Callable[[Any, Tensor], Tensor]
OptimizerOf = Callable[[Any], Optimizer]


@dataclass(frozen=True)
class Tuning:
    """How to train a network within a budget.

    ```
    tuning = effseg.tune(build_network, (1, 512, 512, 300), memory="8GiB")
    network = build_network()
    tuning.prepare(network)
    with tuning.running():
        ...  # patches of tuning.patch, tuning.batch of them in a step
    ```

    Attributes:
        patch: voxels.
        batch: samples.
        policies: of stages of the network, by path.
        precision: of the step.
        heap: of a CPU within `running`: "mapped" gives freed memory back at once, "kept" uses it
            again, which is about twice as fast.
        peak_bytes: predicted: on CUDA what the card shows, else resident memory beyond the imports.
        seconds: of a step, estimated.
        report: of the traced step.
        alternatives: what was weighed, the one that was taken first.
    """

    patch: Shape3
    batch: int
    policies: dict[str, Policy]
    precision: Precision
    heap: Heap
    peak_bytes: int
    seconds: float
    report: MemoryReport
    alternatives: tuple[Alternative, ...]

    def prepare(self, network: nn.Module) -> None:
        """Put a network's stages under the policies.

        Raises:
            PlanError: if it is not the network that was tuned: a stage is missing.
        """
        apply_policy(network, self.policies)

    def running(self) -> AbstractContextManager[object]:
        """Train within, or a CPU's resident memory is not what was predicted."""
        return heap_of(self.heap)

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.alternatives[0].choice}: {format_bytes(self.peak_bytes)}, "
            f"about {self.seconds:.2g} s a step"
        )


def tune(
    build_network: Callable[[], nn.Module],
    data: Dataset | Fingerprint | str | Path | Sequence[int],
    *,
    memory: str | int,
    n_classes: int | None = None,
    loss: Loss | None = None,
    optimizer: OptimizerOf = AdamW,
    precision: Precision | None = None,
    device: str | None = None,
    smallest_batch: int = SMALLEST_BATCH,
    largest_batch: int = LARGEST_BATCH,
) -> Tuning:
    """Find the best training step of any network that fits a budget; none is run.

    As much context a second as there is to have: patches grow from the median case in mm, larger
    ones before larger batches, and stages are recomputed (on CUDA also offloaded) where that shows
    more than it costs. On a CPU the budget is for resident memory beyond the imports.

    Args:
        build_network: makes the network: (N, C, *patch) -> logits (N, n_classes, *patch), or a
            list of them, the finest first.
        data: a `Dataset`, its folder or CSV, a fingerprint, or the shape (C, z, y, x) of a median
            case with voxels of equal sides.
        memory: the budget, "8GiB".
        n_classes: of the labels; known from a data set, 2 where a shape is given.
        loss: called with the network's output and labels (N, *patch); None: Dice and
            cross-entropy.
        optimizer: makes an optimizer of parameters.
        precision: of the step; None: what is faster here.
        device: "cpu" or "cuda", which need not be here; None: CUDA where torch sees it.
        smallest_batch: samples.
        largest_batch: samples.

    Returns:
        The patch, the batch, the policies, and what they take.

    Raises:
        PlanError: if the budget or the shape are none, the network takes no patch at all or cannot
            be traced.
        MemoryBudgetError: if nothing fits; says what would.
        DataError: if a case cannot be used.
    """
    budget = parse_bytes(memory)
    name, _ = choose_device(device)
    kind = device_kind(name)
    n_channels, known_classes, median, spacing = _seen(data)
    n_classes = n_classes or known_classes
    precision = precision or choose_precision(kind)[0]
    network = _without_weights(build_network().train())
    stride = network_stride(network, n_channels)
    subject = _AnyNetwork(
        original=network,
        n_channels=n_channels,
        loss=loss or _standard_loss(n_classes),
        optimizer=optimizer,
        precision=precision,
        device=kind,
    )
    candidates = Candidates(
        subject=subject,
        patches=list(patches_of_stride(median, spacing, stride)),
        batch=smallest_batch,
        budget_bytes=budget,
        device=kind,
        rates=machine_rates(kind, precision),
        beside_bytes=lambda _: 0,
    )
    answer = Search(candidates, largest_batch=largest_batch).run()
    step = answer.step
    return Tuning(
        patch=step.patch,
        batch=step.batch,
        policies=dict(step.policies),
        precision=precision,
        heap=step.heap,
        peak_bytes=step.peak_bytes,
        seconds=step.seconds,
        report=step.report,
        alternatives=answer.alternatives,
    )


@dataclass(frozen=True)
class _AnyNetwork:
    """A user's network, which has no memory modes of its own."""

    original: nn.Module
    n_channels: int
    loss: Loss
    optimizer: OptimizerOf
    precision: Precision
    device: DeviceKind
    modes: tuple[MemoryMode, ...] = ("plain",)
    can_split: bool = False

    def network(self, patch: Shape3, mode: MemoryMode) -> nn.Module:
        """A copy, for policies change it; it is traced in training mode."""
        del patch, mode
        return copy.deepcopy(self.original)

    def trace(
        self, network: nn.Module, patch: Shape3, batch: int, *, split: bool = False
    ) -> MemoryReport:
        """The memory of a step; what the loss reads of a sample is not known, so none is split."""
        assert not split
        return trace_peak(
            network,
            (batch, self.n_channels, *patch),
            loss=self.loss,
            label_shape=(batch, *patch),
            label_dtype=torch.uint8,
            optimizer=self.optimizer,
            autocast=AUTOCAST[self.precision],
            device=self.device,
        )


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy whose parameters hold nothing: what is weighed may be many times what fits."""
    empty: dict[int, Any] = {
        id(parameter): nn.Parameter(
            torch.empty_like(parameter, device="meta"), parameter.requires_grad
        )
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, empty)


def _seen(
    data: Dataset | Fingerprint | str | Path | Sequence[int],
) -> tuple[int, int, Shape3, Spacing]:
    """Channels, classes, and the median case."""
    if isinstance(data, Dataset | str | Path):
        data = fingerprint(data)
    if isinstance(data, Fingerprint):
        spacing, _ = target_spacing(data)
        return len(data.channels), 1 + len(data.labels), median_shape(data, spacing), spacing
    if len(data) != 4 or any(n < 1 for n in data):
        raise PlanError(f"shape {tuple(data)}; expected (channels, z, y, x), each at least 1")
    n_channels, z, y, x = data
    return n_channels, 2, (z, y, x), (1.0, 1.0, 1.0)


def network_stride(network: nn.Module, n_channels: int) -> int:
    """Of what a network wants the lengths of its patches to be a multiple.

    Raises:
        PlanError: if it takes no patch that was tried.
    """
    last: Exception | None = None
    for stride in STRIDES:
        shape = (1, n_channels, *(COARSEST * stride,) * 3)
        try:
            trace_forward(network, shape, device="cpu")
        except PlanError:
            raise
        except Exception as error:  # whatever its own code raises for a patch that does not do
            last = error
        else:
            return stride
    side = COARSEST * STRIDES[-1]
    raise PlanError(
        f"{type(network).__name__} takes no patch of {n_channels} channels and up to {side} voxels "
        f"along an axis: {type(last).__name__}: {last}"
    ) from last


def _standard_loss(n_classes: int) -> Loss:
    loss = build_loss(LossConfig(), ignore_label=None, n_classes=n_classes)
    supervised = DeepSupervisionLoss(loss)

    def of_output(output: Any, labels: Tensor) -> Tensor:
        chosen = supervised if isinstance(output, list | tuple) else loss
        value: Tensor = chosen(output, labels)
        return value

    return of_output
