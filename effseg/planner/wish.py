"""What is asked of the search, and how large the network may be."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from effseg.devices import DeviceKind, Precision
from effseg.errors import PlanError
from effseg.files import name_places
from effseg.networks import MemoryMode
from effseg.planner.candidates import Candidates
from effseg.planner.geometry import Stages, shrinking_patches
from effseg.planner.rates import Rates, nominal_rates
from effseg.planner.scaling import SIZES, Scale, scale_of
from effseg.planner.search import Answer, Pace, Search
from effseg.planner.step import PlannedTraining, beside_training
from effseg.plans import Fingerprint, LossConfig, NetworkConfig
from effseg.types import Shape3, Spacing

CPU_STEP_SECONDS = 0.8
"""A step on a CPU takes no longer, by nominal rates: larger ones would fit most budgets, and leave
a training of minutes with a handful of them."""
QUICK_SECONDS = {"cpu": CPU_STEP_SECONDS, "cuda": 0.15}
"""Of a step for which a larger network is taken unasked."""
STEM_CHANNELS = 16
GROWTH_RATE = 16
BOTTLENECK = 2
ENCODER_LAYERS = (1, 2, 4, 4, 4, 4)
DECODER_LAYERS = (1, 2, 2, 2, 2)
"""Few layers at full resolution, where each costs most: context comes from the coarse stages."""
OPTIONS = (
    *("decoder", "head", "residual", "deep_supervision", "norm", "act", "dropout"),
    *("stem_channels", "growth_rate", "bottleneck", "compression"),
)
"""Of the network, what may be asked for; the rest follows from patch, data and budget."""


@dataclass(frozen=True)
class Wish:
    """What is asked of the search, whatever the size of the network.

    Attributes:
        options: of the network, in place of what is usual.
    """

    facts: Fingerprint
    spacing: Spacing
    median: Shape3
    loss: LossConfig
    precision: Precision
    device: DeviceKind
    budget_bytes: int
    rates: Rates
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def stages(self) -> dict[Shape3, Stages]:
        """Of the network for each patch, the largest patch first."""
        return dict(shrinking_patches(self.median, self.spacing))

    @property
    def pace(self) -> Pace:
        """What a step may take."""
        return Pace(rates=nominal_rates(self.device), seconds=QUICK_SECONDS[self.device])

    def candidates(self, scale: Scale) -> Candidates:
        """The steps of a network of this size."""
        largest = next(iter(self.stages))
        wanted = min(scale.side**3, math.prod(largest))
        return Candidates(
            subject=PlannedTraining(
                build_config=lambda patch, mode: self.config(patch, mode, scale),
                loss=self.loss,
                ignored=self.facts.ignore_label is not None,
                precision=self.precision,
                device=self.device,
                can_split=self.options.get("norm") != "batch",
            ),
            patches=[patch for patch in self.stages if math.prod(patch) >= wanted],
            budget_bytes=self.budget_bytes,
            device=self.device,
            rates=self.rates,
            beside_bytes=lambda report: beside_training(report, self.device),
        )

    def search(self, scale: Scale, *, patches: Sequence[Shape3] | None = None) -> Search:
        """For the best step of a network of this size, among all patches or some of them."""
        among = self.candidates(scale)
        return Search(
            among if patches is None else replace(among, patches=patches),
            longest=self.pace if self.device == "cpu" else None,
        )

    def config(self, patch: Shape3, mode: MemoryMode, scale: Scale) -> NetworkConfig:
        """Of the flagship for patches of this size."""
        return network_config(self.facts, self.stages[patch], mode, scale, options=self.options)


def sized(wish: Wish) -> tuple[Scale, Answer]:
    """The largest network that fits and is quick where the smallest one leaves room.

    Context comes first: a larger network is looked at once a patch shows the whole median case with
    nothing computed twice, and taken where neither patch nor batch shrink for it.
    """
    scale = scale_of(SIZES[0])
    answer = wish.search(scale).run()
    step = answer.step
    if answer.too_large is not None or step.policies or step.split:
        return scale, answer

    def is_too_large(size: str) -> bool:
        among = wish.candidates(scale_of(size))
        larger = among.step(step.patch, step.batch, step.mode, {})
        return larger.peak_bytes > wish.budget_bytes or wish.pace.share(larger) > 1

    first = bisect_left(SIZES, True, lo=1, key=is_too_large)  # each is larger than the one before
    if first > 1:
        scale = scale_of(SIZES[first - 1])
        answer = wish.search(scale, patches=[step.patch]).run()
    return scale, answer


def network_config(
    facts: Fingerprint,
    stages: Stages,
    memory: MemoryMode,
    scale: Scale | None = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> NetworkConfig:
    """The flagship for these stages; of size b0 where no scale is given.

    Raises:
        PlanError: if an option is none of `OPTIONS`, or its value cannot be.
    """
    n = len(stages.strides)
    scale = scale or scale_of(SIZES[0])
    usual = NetworkConfig(
        in_channels=len(facts.channels),
        out_channels=1 + len(facts.labels),
        stem_channels=scale.channels(STEM_CHANNELS),
        growth_rate=scale.channels(GROWTH_RATE),
        bottleneck=BOTTLENECK,
        encoder_layers=scale.layers(ENCODER_LAYERS[:n]),
        decoder_layers=scale.layers(DECODER_LAYERS[: n - 1]),
        strides=stages.strides,
        kernels=stages.kernels,
        memory=memory,
    )
    options = options or {}
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise PlanError(f"network option {unknown[0]!r}; expected one of {', '.join(OPTIONS)}")
    try:
        return NetworkConfig.model_validate(usual.model_dump() | dict(options))
    except ValidationError as error:
        raise PlanError(f"network option {name_places(error, what='network')}") from error
