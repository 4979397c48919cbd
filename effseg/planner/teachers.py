"""The runs that a student learns from: whether they fit it, and what they take in its step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from effseg.errors import CheckpointError, PlanError
from effseg.losses import SoftLabels, add_teacher
from effseg.losses.soft import TARGETS_DTYPE
from effseg.networks import build_network, finest, for_loss
from effseg.plans import DistillationConfig, NetworkConfig, Plan, PlannedNetwork
from effseg.record import PLAN

MUST_AGREE = ("channels", "labels", "spacing")
"""Of the plans of student and teachers: both see one patch, and give each voxel one label."""


def teacher_networks(plan: Plan) -> list[tuple[PlannedNetwork, list[Path]]]:
    """The networks of a student's teachers, and whose weights take turns in each; none: nobody's.

    Ours are built with "shared" memory, whatever they were trained with: the numbers are the same,
    and their logits are never whole.

    Raises:
        CheckpointError: if a teacher is no run, or sees or labels something else than the student.
    """
    found: list[tuple[PlannedNetwork, list[Path]]] = []
    config = plan.training.distillation
    for folder in map(Path, () if config is None else config.teachers):
        try:
            theirs = Plan.load(folder / PLAN)
        except PlanError as error:
            raise CheckpointError(f"{folder}: not a run that can teach: {error}") from error
        for name in MUST_AGREE:
            if getattr(theirs, name) != getattr(plan, name):
                raise CheckpointError(
                    f"{folder}: the teacher's {name} are {getattr(theirs, name)}, the student's "
                    f"{getattr(plan, name)}; let it learn from runs of one plan"
                )
        stride = theirs.network.total_stride
        if any(p % s for p, s in zip(plan.patch_size, stride, strict=True)):
            raise CheckpointError(
                f"{folder}: the teacher takes patches in multiples of {stride}, the student's are "
                f"{plan.patch_size}; change patch_size in the student's plan"
            )
        network = theirs.network
        if isinstance(network, NetworkConfig):
            network = network.model_copy(update={"memory": "shared"})
        for known, folders in found:
            if known == network:
                folders.append(folder)
                break
        else:
            found.append((network, [folder]))
    return found


def teacher_bytes(plan: Plan) -> int:
    """Of the parameters of a student's teachers, which lie there all the time.

    Raises:
        CheckpointError: as `teacher_networks`.
    """
    networks = _on_meta([network for network, _ in teacher_networks(plan)])
    return sum(p.numel() * p.element_size() for p in networks.parameters())


def _on_meta(networks: Sequence[PlannedNetwork]) -> nn.ModuleList:
    with torch.device("meta"):
        return nn.ModuleList(build_network(network) for network in networks)


def empty_targets(image: Tensor, n_classes: int) -> Tensor:
    """Where the targets of a batch go, (N, voxels, classes): two bytes a probability."""
    shape = (len(image), image[0, 0].numel(), n_classes)
    return image.new_zeros(shape, dtype=TARGETS_DTYPE)


class TaughtStep(nn.Module):
    """A training step to be traced, with its teachers before it.

    Args:
        runner: makes the student's outputs of a batch, and has `loss` for them.
        networks: of the teachers, each once.
        config: what is learnt from them.
    """

    def __init__(
        self, runner: nn.Module, networks: Sequence[PlannedNetwork], config: DistillationConfig
    ) -> None:
        super().__init__()
        self.runner = runner
        self.teachers = _on_meta(networks)
        self.teachers.eval().requires_grad_(requires_grad=False)
        self.temperature = config.temperature
        self.n_classes = networks[0].out_channels

    def forward(self, image: Tensor) -> tuple[Self, Any, Tensor]:
        """What `loss` takes."""
        targets = empty_targets(image, self.n_classes)
        with torch.no_grad():
            for teacher in self.teachers:
                logits = finest(for_loss(teacher, image))
                add_teacher(targets, logits, temperature=self.temperature, share=1.0)
                del logits
        return self, self.runner(image), targets

    @staticmethod
    def loss(output: tuple[Any, Any, Tensor], labels: Tensor) -> Tensor:
        """Of the batch."""
        step, outputs, targets = output
        value: Tensor = type(step.runner).loss(outputs, SoftLabels(labels, targets))
        return value
