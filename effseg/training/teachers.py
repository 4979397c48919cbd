"""What trained runs say of the patches that a student sees."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from effseg.losses import SoftLabels, add_teacher
from effseg.networks import WeightsFile, build_network, finest, for_loss
from effseg.planner.teachers import empty_targets, teacher_networks
from effseg.plans import Plan
from effseg.record import PLAN, WEIGHTS
from effseg.types import Features


class Teachers:
    """Trained networks that are asked about every patch of a step, before it.

    A patch is seen as it was augmented, so nothing is kept between steps. Teachers of one network
    take turns in it: in memory there is one, its features while it runs, and the targets, two bytes
    a class and voxel. Their logits are made a tile at a time.

    Args:
        networks: in eval mode, each with the files whose weights take turns in it.
        n_classes: that they tell apart.
        temperature: of their probabilities.
    """

    def __init__(
        self,
        networks: Sequence[tuple[nn.Module, Sequence[WeightsFile]]],
        *,
        n_classes: int,
        temperature: float,
    ) -> None:
        self.networks = networks
        self.n_classes = n_classes
        self.temperature = temperature
        self.n_models = sum(len(files) for _, files in networks)

    @classmethod
    def of(cls, plan: Plan) -> Self | None:
        """The teachers that a plan names; None where it names none.

        Raises:
            CheckpointError: if one is no run, has no weights, or does not fit the plan.
        """
        if plan.training.distillation is None:
            return None
        networks = []
        for config, folders in teacher_networks(plan):
            network = build_network(config).eval().requires_grad_(requires_grad=False)
            files = [WeightsFile.open(Path(folder) / WEIGHTS) for folder in folders]
            for file in files:
                file.check(network, of=PLAN)
            files[-1].fill(network)
            networks.append((network, files))
        return cls(
            networks,
            n_classes=len(plan.labels),
            temperature=plan.training.distillation.temperature,
        )

    @torch.no_grad()
    def soft_labels(self, image: Features, labels: Tensor) -> SoftLabels:
        """The labels of a batch, and what the teachers say of it."""
        targets = empty_targets(image, self.n_classes)
        for network, files in self.networks:
            network.to(image.device)
            for file in files:
                if len(files) > 1:  # otherwise it lies there since it was loaded
                    file.fill(network)
                logits = finest(for_loss(network, image))
                add_teacher(targets, logits, temperature=self.temperature, share=1 / self.n_models)
                del logits
        return SoftLabels(labels, targets)
