"""Windows passed through networks."""

from collections.abc import Iterator, Sequence
from itertools import chain, combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from effseg.devices import AUTOCAST, Precision
from effseg.inference.headless import Blend, finest
from effseg.inference.windows import PaddedImage
from effseg.types import Slices3

Mirror = tuple[int, ...]
"""The axes of (N, C, z, y, x) to flip."""


class Passes:
    """Passes windows through networks; it remembers what the last constant one came to.

    Args:
        blend: the networks, and what of them is wanted.
        mirrors: ways to show each window, averaged over.
        device: where the networks run.
        precision: autocast type; "float32" switches autocast off.
        skip_constant: do not pass a window of one value if the last such one had the same.

    Attributes:
        n_skipped: how many windows were not passed.
    """

    def __init__(
        self,
        blend: Blend,
        *,
        mirrors: Sequence[Mirror],
        device: torch.device,
        precision: Precision,
        skip_constant: bool,
    ) -> None:
        self.n_skipped = 0
        self._blend = blend
        self._mirrors = mirrors
        self._device = device
        self._dtype = AUTOCAST[precision]
        self._skip_constant = skip_constant
        self._constant: tuple[float, ...] | None = None
        self._answer: Tensor | None = None

    def run(self, image: PaddedImage, boxes: Sequence[Slices3]) -> Iterator[tuple[Slices3, Tensor]]:
        """What is blended of some windows, (channels, *window), float32, free to be changed."""
        fresh: list[tuple[Slices3, npt.NDArray[np.float32], tuple[float, ...] | None]] = []
        for box in boxes:
            window = image.crop(box)
            constant = _constant(window) if self._skip_constant else None
            if constant is not None and constant == self._constant:
                assert self._answer is not None
                self.n_skipped += 1
                yield box, self._answer.clone()
            else:
                fresh.append((box, window, constant))
        if not fresh:
            return
        passed = self._pass(np.stack([window for _, window, _ in fresh]))
        for (box, _, constant), values in zip(fresh, passed, strict=True):
            if constant is not None:
                self._constant, self._answer = constant, values.clone()
            yield box, values

    def _pass(self, windows: npt.NDArray[np.float32]) -> Tensor:
        """The mean over mirrors; of networks, the mean of logits, or features side by side."""
        host = torch.from_numpy(windows)
        if self._device.type == "cuda":
            host = host.pin_memory()
        batch = host.to(self._device, non_blocking=True)
        sums: list[Tensor] = []
        for network in self._blend.networks:
            apart = self._blend.head is not None or not sums
            for axes in self._mirrors:
                output = self._run_network(network, batch.flip(axes) if axes else batch)
                output = output.flip(axes) if axes else output
                if apart:
                    # a copy, since a network may return what it was given
                    sums.append(output.clone())
                    apart = False
                else:
                    sums[-1].add_(output)
        n_summed = len(self._mirrors) * len(self._blend.networks) // len(sums)
        return (torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]).div_(n_summed)

    def _run_network(self, network: nn.Module, batch: Tensor) -> Tensor:
        on = self._dtype is not None
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=on):
            return finest(network(batch)).float()


def mirrors() -> tuple[Mirror, ...]:
    """The axes of (N, C, z, y, x) to flip for each of the 8 mirrors, the unchanged one first."""
    axes = (2, 3, 4)
    return tuple(chain.from_iterable(combinations(axes, n) for n in range(4)))


def _constant(window: npt.NDArray[np.float32]) -> tuple[float, ...] | None:
    """Each channel's value, where each channel has but one."""
    low = window.min(axis=(1, 2, 3))
    if not np.array_equal(low, window.max(axis=(1, 2, 3))):
        return None
    return tuple(low.tolist())
