"""What of some networks is blended, found out once an image says how many channels it has."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import nn

from effseg.devices import DeviceKind
from effseg.inference.headless import Blend, choose_blend
from effseg.inference.tracing import count_outputs, pass_beside_others, traced_pass_bytes
from effseg.networks import WeightsFile
from effseg.types import Shape3


class Blending:
    """Features below a head, or logits; and what a pass to them takes.

    Args:
        networks: on the device.
        patch_size: of a window.
        device: where they run.
        weights: of each network, the files that take turns in it; none: its own.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        patch_size: Shape3,
        device: torch.device,
        *,
        weights: Sequence[Sequence[WeightsFile]],
    ) -> None:
        self._networks = networks
        self._weights = weights
        self._patch_size = patch_size
        self._device = device
        self._blend: Blend | None = None
        self._n_classes: int | None = None

    def of(self, n_channels: int) -> Blend:
        """What is blended, of images with so many channels."""
        if self._blend is None:
            shape = (1, n_channels, *self._patch_size)
            self._blend = choose_blend(self._networks, shape, weights=self._weights)
        return self._blend

    def n_blended(self, n_channels: int) -> int:
        """How many channels are blended, of images with so many channels."""
        head = self.of(n_channels).head
        return self.n_classes(n_channels) if head is None else head.weight.shape[1]

    def n_classes(self, n_channels: int) -> int:
        """How many logits a voxel has, of images with so many channels."""
        blend = self.of(n_channels)
        if blend.head is not None:
            return blend.head.n_classes
        if self._n_classes is None:
            shape = (1, n_channels, *self._patch_size)
            self._n_classes = count_outputs(blend.networks[0], shape, device=self._device)
        return self._n_classes

    def pass_bytes(
        self,
        n_channels: int,
        *,
        autocast: torch.dtype | None,
        kind: DeviceKind,
        weight_bytes: int,
    ) -> Callable[[int], int]:
        """Tells what a pass over so many windows takes, weights included; each traced once.

        Args:
            n_channels: of an image.
            autocast: the lower type of mixed precision; None: off.
            kind: of the device.
            weight_bytes: of all networks.
        """

        @cache
        def of_windows(n: int) -> int:
            shape = (n, n_channels, *self._patch_size)
            passes = [
                traced_pass_bytes(one, shape, autocast=autocast, kind=kind)
                for one in self.of(n_channels).distinct
            ]
            return pass_beside_others(passes, weight_bytes)

        return of_windows
