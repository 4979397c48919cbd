"""A network without its last layer, where that is affine and blending commutes with it."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from effseg.memory import trace_forward
from effseg.networks import NormActConv, finest
from effseg.resample import AffineHead

logger = logging.getLogger("effseg")


class Headless(nn.Module):
    """A network up to what its last layer reads, a 1x1x1 convolution.

    Norm and activation before that layer stay in: their statistics may be a window's own.

    Args:
        network: the whole; it is left as it is.
        path: of the layer in it.
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        super().__init__()
        self.network = network
        self.path = path

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, z, y, x) -> features (N, K, z, y, x)."""
        conv = self.network.get_submodule(self.path)
        with _called(self.network, [conv]), _passing_on(conv):
            return finest(self.network(image))

    @property
    def conv(self) -> nn.Conv3d:
        """The layer left out."""
        conv = self.network.get_submodule(self.path)
        assert isinstance(conv, nn.Conv3d)
        return conv


@dataclass(frozen=True, eq=False)
class Blend:
    """What of some networks is blended, window by window.

    Attributes:
        networks: their outputs are averaged; with a head, they lie side by side instead.
        head: makes the averaged logits of the features side by side; None where logits come.
    """

    networks: tuple[nn.Module, ...]
    head: AffineHead | None


def choose_blend(networks: Sequence[nn.Module], input_shape: Sequence[int]) -> Blend:
    """Blend features where all networks end in an affine layer and it takes fewer channels.

    Args:
        networks: whole ones, or such as `find_headless` made of them.
        input_shape: of one window, (1, C, z, y, x).
    """
    headless = [
        network if isinstance(network, Headless) else find_headless(network, input_shape)
        for network in networks
    ]
    cut = [network for network in headless if network is not None]
    n_features = sum(network.conv.in_channels for network in cut)
    if len(cut) == len(networks) and n_features < cut[0].conv.out_channels:
        return Blend(networks=tuple(cut), head=_joint_head([network.conv for network in cut]))
    if cut and len(networks) > 1:
        logger.info("blending logits: not all %d networks have a head to spare", len(networks))
    whole = (n.network if isinstance(n, Headless) else n for n in networks)
    return Blend(networks=tuple(whole), head=None)


def find_headless(network: nn.Module, input_shape: Sequence[int]) -> Headless | None:
    """The network without its head; None, and the reason in the log, where it has none to spare.

    One is to spare if it is a 1x1x1 convolution that makes more channels than it reads, and what
    it returns is what the network returns. The network is asked on tensors without memory.

    Args:
        network: any that takes one tensor.
        input_shape: of one window, (1, C, z, y, x).
    """
    paths = [path for path, module in network.named_modules() if _widens(module)]
    if not paths:
        logger.info("blending logits: no 1x1x1 convolution makes more channels than it reads")
        return None
    found: list[str] = []
    try:
        # a device's rules change types and bytes, not which layer is last
        witness = _Witness(network, paths, lambda path: found.append(path))
        trace_forward(witness, input_shape, device="cpu")
    except Exception as error:  # what a network cannot do without memory it may do with it
        logger.info("blending logits: where the network ends cannot be traced (%s)", error)
        return None
    if not found:
        logger.info("blending logits: the network does not end in a 1x1x1 convolution")
        return None
    headless = Headless(network, found[0])
    logger.info(
        "blending the %d features below %s in place of %d logits",
        headless.conv.in_channels,
        found[0] or "the network",
        headless.conv.out_channels,
    )
    return headless


class _Witness(nn.Module):
    """Runs a network and tells which of some layers its output comes from, untouched."""

    def __init__(
        self, network: nn.Module, paths: Sequence[str], tell: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.network = network
        self.paths = paths
        self.tell = tell

    def forward(self, image: Tensor) -> Tensor:
        outputs: dict[str, list[tuple[Tensor, int]]] = {path: [] for path in self.paths}
        layers = {path: self.network.get_submodule(path) for path in self.paths}
        hooks = [
            layer.register_forward_hook(
                lambda _, __, output, path=path: outputs[path].append((output, output._version))
            )
            for path, layer in layers.items()
        ]
        try:
            with _called(self.network, layers.values()):
                result = finest(self.network(image))
        finally:
            for hook in hooks:
                hook.remove()
        for path, calls in outputs.items():
            if len(calls) == 1 and calls[0][0] is result and calls[0][1] == result._version:
                self.tell(path)
        return result


def _widens(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv3d)
        and module.in_channels < module.out_channels
        and module.kernel_size == module.stride == (1, 1, 1)
        and module.padding in ((0, 0, 0), "valid", "same")
        and module.groups == 1
    )


def _joint_head(convs: Sequence[nn.Conv3d]) -> AffineHead:
    """The mean of several layers' logits as one layer over their features side by side."""
    weights = [conv.weight.detach().flatten(1).float().cpu().numpy() for conv in convs]
    biases = [
        np.zeros(conv.out_channels, np.float32)
        if conv.bias is None
        else conv.bias.detach().float().cpu().numpy()
        for conv in convs
    ]
    return AffineHead(
        weight=np.divide(np.concatenate(weights, axis=1), len(convs), dtype=np.float32),
        bias=np.mean(biases, axis=0, dtype=np.float32),
    )


@contextmanager
def _called(network: nn.Module, convs: Iterable[nn.Module]) -> Iterator[None]:
    """Have layers of ours call their convolutions, which "shared" memory reads the weights of."""
    wanted = {id(conv) for conv in convs}
    layers = [
        module
        for module in network.modules()
        if isinstance(module, NormActConv) and id(module.conv) in wanted
    ]
    modes = [layer.memory for layer in layers]
    for layer in layers:
        layer.memory = "plain"
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.memory = mode


@contextmanager
def _passing_on(module: nn.Module) -> Iterator[None]:
    """Have a module return what it is given."""
    attributes: dict[str, Any] = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = _given
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


def _given(features: Tensor) -> Tensor:
    return features
