"""Windows passed through networks, and what comes out blended."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from effseg.devices import AUTOCAST, Precision
from effseg.errors import MemoryBudgetError
from effseg.inference.frontier import Frontier
from effseg.inference.headless import Blend, Headless
from effseg.inference.windows import SweptImage
from effseg.networks import finest
from effseg.types import Slices3

logger = logging.getLogger("effseg")

Mirror = tuple[int, ...]
"""The axes of (z, y, x) to flip."""


class Passes:
    """Passes windows through networks and blends what they return.

    A batch of windows that a device has no memory for is passed in halves, it alone, and so are
    those that follow.

    Args:
        blend: the networks, and what of them is wanted.
        mirrors: ways to show each window, averaged over.
        backwards: an axis along which windows are given backwards; None: as they are.
        frontier: makes the sums for a number of channels.
        device: where the networks run.
        precision: autocast type; "float32" switches autocast off.
        skip_constant: do not pass a window of one value if the last such one had the same.

    Attributes:
        skip_constant: as it was given.
        blended: what was blended; None before the first window.
        n_skipped: how many windows were not passed because they were constant.
        n_needless: how many nobody needed.
    """

    def __init__(
        self,
        blend: Blend,
        *,
        mirrors: Sequence[Mirror],
        backwards: int | None,
        frontier: Callable[[int], Frontier],
        device: torch.device,
        precision: Precision,
        skip_constant: bool,
    ) -> None:
        self.blended: Frontier | None = None
        self.n_skipped = 0
        self.n_needless = 0
        self._blend = blend
        self._mirrors = [_turned(mirror, backwards) for mirror in mirrors]
        self._frontier = frontier
        self._device = device
        self._dtype = AUTOCAST[precision]
        self.skip_constant = skip_constant
        self._constant: tuple[float, ...] | None = None
        self._answer: Tensor | None = None
        self._most: int | None = None  # windows in a pass, once more were too many
        self._seated: dict[nn.Module, int] = {}  # whose weights a network holds

    @torch.inference_mode()
    def run(self, image: SweptImage, boxes: Sequence[Slices3]) -> int:
        """Pass some windows and blend what comes of them; how many a network has seen."""
        fresh: list[Slices3] = []
        windows: list[npt.NDArray[np.float32]] = []
        constant: dict[int, tuple[float, ...]] = {}
        for box in boxes:
            window = image.crop(box)
            value = _constant(window) if self.skip_constant else None
            if value is not None and value == self._constant:
                assert self.blended is not None
                assert self._answer is not None
                self.blended.add(box, self._answer, channels=slice(None), mirror=())
                self.blended.count(box)
                self.n_skipped += 1
                continue
            if value is not None:
                constant[len(fresh)] = value
            fresh.append(box)
            windows.append(window)
        if fresh:
            self._pass(fresh, np.stack(windows), constant)
        return len(fresh)

    def wait(self) -> None:
        """Until the device is done with what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _pass(
        self,
        boxes: Sequence[Slices3],
        windows: npt.NDArray[np.float32],
        constant: dict[int, tuple[float, ...]],
    ) -> None:
        host = torch.from_numpy(windows)
        if self._device.type == "cuda":
            host = host.pin_memory()
        batch = host.to(self._device, non_blocking=True)
        remembered = max(constant, default=None)
        answer: Tensor | None = None
        for index, network in enumerate(self._blend.networks):
            self._seat(index)
            for mirror in self._mirrors:
                for i, values in self._outputs(network, batch, mirror):
                    channels = self._channels(index, len(values))
                    blended = self._sums_of(len(values))
                    blended.add(boxes[i], values, channels=channels, mirror=mirror)
                    if i == remembered:
                        if answer is None:
                            answer = values.new_zeros(
                                (blended.n_channels, *values.shape[1:]), dtype=torch.float32
                            )
                        answer[channels] += values.flip([1 + axis for axis in mirror])
                    del values
        assert self.blended is not None
        for box in boxes:
            self.blended.count(box)
        if remembered is not None:
            self._constant, self._answer = constant[remembered], answer

    def _seat(self, index: int) -> None:
        """See that the network of a model holds the model's weights."""
        network, weights = self._blend.networks[index], self._blend.weights[index]
        if weights is not None and self._seated.get(network) != index:
            weights.fill(network.network if isinstance(network, Headless) else network)
            self._seated[network] = index

    def close(self) -> None:
        """Let go of what was blended."""
        if self.blended is not None:
            self.blended.close()

    def _outputs(
        self, network: nn.Module, batch: Tensor, mirror: Mirror
    ) -> Iterator[tuple[int, Tensor]]:
        """Each window of a batch and what the network makes of it, (channels, *window)."""
        axes = [2 + axis for axis in mirror]
        on, dtype = self._dtype is not None, self._dtype
        first = 0
        while first < len(batch):
            part = batch[first : first + (self._most or len(batch))]
            output = None
            try:
                with torch.autocast(self._device.type, dtype=dtype, enabled=on):
                    output = finest(network(part.flip(axes) if axes else part))
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise MemoryBudgetError(
                        "the device has no memory for one window; take a smaller patch, or "
                        "predict on the CPU"
                    ) from error
            if output is None:  # only now are the tensors of the failed pass let go
                self._halve(len(part))
                continue
            for i in range(len(output)):
                yield first + i, output[i]
            first += len(part)
            del output, part

    def _halve(self, n_windows: int) -> None:
        self._most = n_windows // 2
        logger.warning("no memory for %d windows at once; %d from here on", n_windows, self._most)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _channels(self, index: int, n: int) -> slice:
        """Where the outputs of a network lie: side by side for a head, else all at one place."""
        return slice(index * n, (index + 1) * n) if self._blend.head is not None else slice(0, n)

    def _sums_of(self, n_outputs: int) -> Frontier:
        n_beside = len(self._blend.networks) if self._blend.head is not None else 1
        return self.sums(n_beside * n_outputs)

    @torch.inference_mode()
    def sums(self, n_channels: int | None = None) -> Frontier:
        """What was blended so far; where nothing was, made for so many channels."""
        if self.blended is None:
            assert n_channels is not None
            self.blended = self._frontier(n_channels)
        return self.blended


def mirrors(along: Sequence[int]) -> tuple[Mirror, ...]:
    """The axes to flip for each of the mirrors along some of (z, y, x), the unchanged one first."""
    axes = sorted(set(along))
    return tuple(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))


def _turned(mirror: Mirror, backwards: int | None) -> Mirror:
    """The flips that show a window as a mirror does, where it is given backwards along an axis."""
    return mirror if backwards is None else tuple(sorted({*mirror} ^ {backwards}))


def _constant(window: npt.NDArray[np.float32]) -> tuple[float, ...] | None:
    """Each channel's value, where each channel has but one."""
    low = window.min(axis=(1, 2, 3))
    if not np.array_equal(low, window.max(axis=(1, 2, 3))):
        return None
    return tuple(low.tolist())
