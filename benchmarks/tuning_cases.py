"""What the tuning suite tunes: twelve networks; and what it runs, each in a process of its own."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from made_up_facts import made_up_facts
from memory_cases import FEATURES, N_CLASSES, OTHERS, nnunet
from monai.networks import nets
from plain_networks import PlainUNet, UsersUNet
from torch import Tensor, nn
from torch.optim import AdamW

import effseg
from effseg.devices import AUTOCAST
from effseg.losses import CompoundLoss
from effseg.memory import PeakResident, apply_policy, trace_peak
from effseg.networks import DenseUNet, build_network
from effseg.planner.geometry import stages_for
from effseg.planner.scaling import scale_of
from effseg.planner.wish import network_config
from effseg.plans import Plan
from effseg.training.step import SampleBySample, WholeBatch
from effseg.types import Shape3

MIB = 2**20
CASE = (1, 192, 192, 192)
"""Channels and voxels of the cases that are tuned for: more than any of the budgets has room for,
so that it is the budget that bounds the patch."""
LADDER_MIB = (384, 512, 768, 1024, 1536, 2048, 3072, 4096)
STATE_BYTES = 16
"""Of each parameter: itself, its gradient and AdamW's two moments, in float32."""
ROOM = 1.3
"""A budget is worth tuning for from so many times the state of a network on."""
SMALLEST_MIB = {
    "effseg-b2": 512,
    "effseg-b3": 768,
    "MONAI-DynUNet": 1024,
    "nnU-Net-PlainConvUNet": 1024,
}
"""Of the ladder, where the smallest patch takes more beside its network's state than that: a search
below was refused, and said so much."""
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)
OPTIMIZER = partial(AdamW, lr=1e-3)


class ForLoss(nn.Module):
    """effseg's network as it trains: the loss makes the logits itself."""

    def __init__(self, network: DenseUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Any:
        """What the loss reads."""
        return self.network.for_loss(image)


def ours(size: str, side: int = CASE[1]) -> nn.Module:
    """The flagship of a size, its stages those for patches of `side` voxels along each axis."""
    facts = made_up_facts(side)
    stages = stages_for(facts.shapes[0], facts.spacings[0])
    return ForLoss(build_network(network_config(facts, stages, "shared", scale_of(size))))


def plain_conv_unet() -> nn.Module:
    """nnU-Net's: its own class where that is installed, else its layout."""
    return nnunet("plain") if has_nnunets() else PlainUNet(FEATURES, N_CLASSES)


def res_enc_m() -> nn.Module:
    """Likewise."""
    if has_nnunets():
        return nnunet("residual")
    return PlainUNet(FEATURES, N_CLASSES, RESIDUAL_BLOCKS)


def has_nnunets() -> bool:
    """Whether nnU-Net's own networks are installed."""
    return find_spec("dynamic_network_architectures") is not None


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{f"effseg-{size}": partial(ours, size) for size in ("b0", "b1", "b2", "b3")},
    **{name: build for name, build in OTHERS.items() if name.startswith("MONAI")},
    "MONAI-VNet": partial(nets.VNet, 3, 1, N_CLASSES),
    "MONAI-AttentionUnet": partial(
        nets.AttentionUnet, 3, 1, N_CLASSES, channels=(32, 64, 128, 256), strides=(2, 2, 2)
    ),
    "nnU-Net-PlainConvUNet": plain_conv_unet,
    "nnU-Net-ResEncM": res_enc_m,
    "user-written": partial(UsersUNet, N_CLASSES),
}


def n_parameters(name: str) -> int:
    """How many numbers a network learns."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NETWORKS[name]().parameters())


def usual_budgets(name: str) -> tuple[int, ...]:
    """The three smallest of the ladder that leave a network room for activations, in bytes."""
    least = max(ROOM * STATE_BYTES * n_parameters(name), SMALLEST_MIB.get(name, 0) * MIB)
    return tuple(mib * MIB for mib in LADDER_MIB if mib * MIB >= least)[:3]


@dataclass(frozen=True)
class Found:
    """A search and what it took.

    Attributes:
        tuning: what it found; None: it refused.
        refusal: in its words; empty where it did not.
        seconds: of its wall clock, imports aside.
        grown_bytes: by how much the process grew in it. A step tried out would be in there.
    """

    tuning: Any
    refusal: str
    seconds: float
    grown_bytes: int


def search(name: str, budget_bytes: int) -> Found:
    """Tune a network for a budget of this machine's memory."""
    tuning, refusal = None, ""
    tune = effseg.tune
    load_kernels()
    resident, started = PeakResident().start(), time.perf_counter()
    try:
        tuning = tune(
            NETWORKS[name],
            CASE,
            memory=budget_bytes,
            n_classes=N_CLASSES,
            loss=CompoundLoss(),
            optimizer=OPTIMIZER,
            device="cpu",
        )
    except effseg.MemoryBudgetError as error:
        refusal = str(error)
    return Found(tuning, refusal, time.perf_counter() - started, resident.stop())


@dataclass(frozen=True)
class Taken:
    """What steps took.

    Attributes:
        peak_bytes: of resident memory, above what the process held after its imports.
        seconds: of each step.
    """

    peak_bytes: int
    seconds: tuple[float, ...]


def run(name: str, tuning: Any, *, most_steps: int, most_seconds: float = math.inf) -> Taken:
    """Train a network as it was tuned, on noise: steps up to a number or a time, two at least.

    The optimizer's state is there from the second step on.
    """
    with tuning.running():
        load_kernels()
        resident = PeakResident().start()
        network = NETWORKS[name]()
        tuning.prepare(network)
        step = Step(network, tuning.patch, tuning.batch, dtype=AUTOCAST[tuning.precision])
        seconds = [step.seconds(), step.seconds()]
        while len(seconds) < most_steps and sum(seconds) < most_seconds:
            seconds.append(step.seconds())
        return Taken(resident.stop(), tuple(seconds))


class Step:
    """A training step, on another batch of noise each time."""

    def __init__(
        self, network: nn.Module, patch: Shape3, batch: int, dtype: torch.dtype | None = None
    ) -> None:
        self.network, self.patch, self.batch, self.dtype = network, patch, batch, dtype
        self.loss = CompoundLoss()
        self.optimizer = OPTIMIZER(network.parameters())

    def seconds(self) -> float:
        """Take it; what its batch took to make does not count."""
        image = torch.randn(self.batch, 1, *self.patch)
        label = torch.randint(0, N_CLASSES, (self.batch, *self.patch), dtype=torch.uint8)
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
            # the output has no name, so that it lives no longer than it is needed
            loss = self.loss(self.network(image), label)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def load_kernels() -> None:
    """Take a step of next to nothing: what libraries load when they are first used is import."""
    Step(nn.Conv3d(1, N_CLASSES, 3, padding=1), (8, 8, 8), 2).seconds()


def step_seconds(
    build: Callable[[], nn.Module], *, patch: Shape3, batch: int, n_steps: int
) -> list[float]:
    """Of each of so many plain steps of a network, after one that warms up."""
    step = Step(build(), patch, batch)
    return [step.seconds() for _ in range(1 + n_steps)][1:]


def planned_step_seconds(plan: Plan, *, patch: Shape3, batch: int, n_steps: int) -> list[float]:
    """The same of a plan's network, as training takes its steps, in float32."""
    network = build_network(plan.network)
    apply_policy(network, plan.policies)
    step = (SampleBySample if plan.sample_by_sample else WholeBatch)(network, CompoundLoss())
    optimizer = OPTIMIZER(network.parameters())
    seconds = []
    for _ in range(1 + n_steps):
        image = torch.randn(batch, 1, *patch)
        label = torch.randint(0, N_CLASSES, (batch, *patch), dtype=torch.uint8)
        started = time.perf_counter()
        step.backward(step.loss(image, label))
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def device_bytes_on_cuda(build: Callable[[], nn.Module], patch: Shape3, batch: int) -> int:
    """What a card shows in a plain step in bfloat16, traced."""
    with torch.device("meta"):
        network = build()
    report = trace_peak(
        network,
        (batch, 1, *patch),
        loss=CompoundLoss(),
        label_shape=(batch, *patch),
        label_dtype=torch.uint8,
        optimizer=OPTIMIZER,
        autocast=torch.bfloat16,
        device="cuda",
    )
    assert report.device_bytes is not None
    return report.device_bytes


def largest_patch(
    needed: Callable[[Shape3], int], budget_bytes: int, *, multiple: int, most: int
) -> Shape3:
    """The largest patch that fits, of the nearly cubic ones: one axis grows after the other.

    Args:
        needed: bytes of a step on a patch; more for a larger one.
        budget_bytes: that it may take.
        multiple: of which each length is one.
        most: voxels along an axis.
    """
    patches = [
        (side + multiple * (grown > 0), side + multiple * (grown > 1), side)
        for side in range(multiple, most + 1, multiple)
        for grown in range(3)
        if side + multiple * (grown > 0) <= most
    ]
    fitting, too_large = -1, len(patches)
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if needed(patches[middle]) <= budget_bytes:
            fitting = middle
        else:
            too_large = middle
    if fitting < 0:
        raise effseg.MemoryBudgetError(
            f"a patch of {multiple} voxels a side takes {needed(patches[0])} bytes, the budget is "
            f"{budget_bytes}; give more"
        )
    return patches[fitting]
