"""A trained run as it lies in its folder: the plan and the weights, of one model or several."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self, TypeAlias

from torch import nn

from effseg.devices import AUTOCAST, DeviceKind, device_kind, is_present
from effseg.errors import CheckpointError, PlanError
from effseg.inference.headless import Headless, find_headless
from effseg.inference.pace import Pace
from effseg.inference.tracing import traced_pass_bytes
from effseg.networks import WeightsFile, build_network
from effseg.plans import Plan
from effseg.record import PLAN, SNAPSHOTS, WEIGHTS

logger = logging.getLogger("effseg")


@dataclass(frozen=True)
class Run:
    """A plan and the network it describes, with trained weights, in eval mode on the CPU.

    Attributes:
        folder: where it lies; of several models, the first one's.
        plan: of the run; of several, the first one's.
        network: that is run.
        weights: files it was filled from. Several are models that are averaged: they take turns in
            the network, so that memory does not grow with their number.
    """

    folder: Path
    plan: Plan
    network: nn.Module
    weights: tuple[WeightsFile, ...] = ()
    _window_bytes: dict[tuple[DeviceKind, int], int] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    _paces: dict[tuple[object, ...], Pace] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def device(self) -> str:
        """Where it runs unless a call says otherwise: as planned, or on the CPU with a warning."""
        if is_present(self.plan.device):
            return self.plan.device
        logger.warning(
            "%s: planned for %s, which is not here; it runs on the CPU",
            self.folder,
            self.plan.device,
        )
        return "cpu"

    @cached_property
    def headless(self) -> Headless | None:
        """The network up to its head, where blending that takes less than blending logits."""
        shape = (1, len(self.plan.channels), *self.plan.patch_size)
        return find_headless(self.network, shape)

    @property
    def n_models(self) -> int:
        """How many models are averaged."""
        return max(1, len(self.weights))

    @property
    def turns(self) -> tuple[WeightsFile, ...]:
        """The files that take turns in the network; none where it holds the only one."""
        return self.weights if len(self.weights) > 1 else ()

    def pace(self, device: str, *, manner: tuple[object, ...]) -> Pace:
        """What was found of how many windows a pass should take, in a manner of passing them."""
        return self._paces.setdefault((device, *manner), Pace(device_kind(device)))

    def window_bytes(self, kind: DeviceKind, n: int) -> int:
        """What one pass over so many windows takes at most, weights included; traced once.

        On a CUDA device with what its allocator keeps for itself.
        """
        plan = self.plan
        if (kind, n) not in self._window_bytes:
            self._window_bytes[kind, n] = traced_pass_bytes(
                self.headless or self.network,
                (n, len(plan.channels), *plan.patch_size),
                autocast=AUTOCAST[plan.precision],
                kind=kind,
            )
        return self._window_bytes[kind, n]


Runs: TypeAlias = str | Path | Run | Sequence[str | Path | Run]
"""A run or several, loaded or where they lie."""


def load_run(folder: str | Path, *, snapshots: bool = False) -> Run:
    """Load a trained run.

    Args:
        folder: the run's.
        snapshots: take the weights it kept in the course of its training, which are averaged as
            several models are, in place of the best ones.

    Raises:
        CheckpointError: if the folder is no run, has no weights yet, or they do not fit the plan.
    """
    found = _Found.at(Path(folder), snapshots=snapshots)
    return _built(found.folder, found.plan, found.weights)


def load_runs(run: Runs, *, snapshots: bool = False) -> tuple[Run, ...]:
    """The runs that are meant, loaded; those of one network as one run, whose weights take turns.

    A run that is loaded already stays one of its own.

    Args:
        run: which.
        snapshots: of those that are not loaded yet, as `load_run` takes it.

    Raises:
        CheckpointError: if one cannot be loaded, or they do not belong together.
    """
    given = [run] if isinstance(run, str | Path | Run) else list(run)
    if not given:
        raise CheckpointError("no run; expected one or more")
    found = [
        one if isinstance(one, Run) else _Found.at(Path(one), snapshots=snapshots) for one in given
    ]
    for name in ("patch_size", "spacing", "channels", "labels"):
        ours = getattr(found[0].plan, name)
        for other in found[1:]:
            theirs = getattr(other.plan, name)
            if theirs != ours:
                raise CheckpointError(
                    f"{found[0].folder} and {other.folder} differ in {name}, {ours} vs {theirs}; "
                    "only runs of one plan, such as folds, can be averaged"
                )
    groups: list[Run | list[_Found]] = []
    for one in found:
        if isinstance(one, Run):  # stays as it is: its network may have changed since its files
            groups.append(one)
            continue
        for group in groups:
            if isinstance(group, list) and one.plan.network == group[0].plan.network:
                group.append(one)
                break
        else:
            groups.append([one])
    return tuple(group if isinstance(group, Run) else _joined(group) for group in groups)


def mirrored_axes(runs: Sequence[Run]) -> tuple[int, ...]:
    """The axes of (z, y, x), by number, along which all runs were trained on flipped patches.

    A network that never saw a mirrored patient takes front for back: its answers to mirrors along
    other axes are no second opinions.
    """
    axes = {0, 1, 2}
    for run in runs:
        augment = run.plan.training.augment
        chance = augment.flip * augment.highest_probability
        axes &= {"zyx".index(axis) for axis in augment.flip_axes if chance > 0}
    return tuple(sorted(axes))


@dataclass(frozen=True)
class _Found:
    """A run that lies somewhere, not loaded yet."""

    folder: Path
    plan: Plan
    weights: tuple[WeightsFile, ...]

    @classmethod
    def at(cls, folder: Path, *, snapshots: bool) -> Self:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such run; `effseg train` makes one")
        try:
            plan = Plan.load(folder / PLAN)
        except PlanError as error:
            raise CheckpointError(f"{folder}: not a run that can be used: {error}") from error
        files = [folder / WEIGHTS]
        if snapshots:
            files = sorted((folder / SNAPSHOTS).glob("*.safetensors"))
            if not files:
                raise CheckpointError(
                    f"{folder}: no weights in {SNAPSHOTS}/; set training.snapshots in the plan "
                    "before training"
                )
        elif not files[0].is_file():
            raise CheckpointError(f"{folder}: no {WEIGHTS}: the run has not finished an epoch yet")
        return cls(folder, plan, tuple(WeightsFile.open(path) for path in files))


def _joined(group: Sequence[_Found]) -> Run:
    """Runs of one network as one."""
    first = group[0]
    return _built(first.folder, first.plan, tuple(file for one in group for file in one.weights))


def _built(folder: Path, plan: Plan, weights: tuple[WeightsFile, ...]) -> Run:
    network = build_network(plan.network)
    for file in weights:
        file.check(network, of=PLAN)
    weights[0].fill(network)
    return Run(folder=folder, plan=plan, network=network.eval(), weights=weights)
