"""What one step of a training takes, traced: nothing is allocated."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from effseg.devices import AUTOCAST, DeviceKind, Precision, device_kind
from effseg.losses import DeepSupervisionLoss, build_loss
from effseg.memory import MemoryReport, Policy, apply_policy, trace_peak
from effseg.networks import DenseUNet, build_network
from effseg.plans import LossConfig, NetworkConfig, Plan
from effseg.types import Shape3


def trace_plan(plan: Plan) -> MemoryReport:
    """The memory of a training step as a plan has it, module by module.

    Raises:
        PlanError: if a policy names no stage of the network.
    """
    return trace_step(
        plan.network,
        plan.policies,
        patch=plan.patch_size,
        batch=plan.batch_size,
        loss=plan.training.loss,
        ignored=plan.ignore_label is not None,
        precision=plan.precision,
        device=device_kind(plan.device),
    )


def trace_step(
    config: NetworkConfig,
    policies: Mapping[str, Policy],
    *,
    patch: Shape3,
    batch: int,
    loss: LossConfig,
    ignored: bool,
    precision: Precision,
    device: DeviceKind,
) -> MemoryReport:
    """The memory of a training step of the network that a configuration describes.

    Args:
        config: of the network.
        policies: of its stages.
        patch: voxels.
        batch: samples.
        loss: its configuration.
        ignored: whether voxels may be ignored.
        precision: of the step.
        device: whose rules to follow.

    Raises:
        PlanError: if a policy names no stage of the network.
    """
    n_classes = config.out_channels
    compute = build_loss(loss, ignore_label=n_classes if ignored else None, n_classes=n_classes)
    with torch.device("meta"):
        network = build_network(config)
    apply_policy(network, policies)
    return trace_peak(
        _ForLoss(network),
        (batch, config.in_channels, *patch),
        loss=DeepSupervisionLoss(compute) if config.deep_supervision else compute,
        label_shape=(batch, *patch),
        label_dtype=torch.uint8,
        optimizer=partial(AdamW, lr=1e-3),
        autocast=AUTOCAST[precision],
        device=device,
    )


class _ForLoss(nn.Module):
    """The network as a step of training runs it."""

    def __init__(self, network: DenseUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Any:
        """What the loss reads."""
        return self.network.for_loss(image)
