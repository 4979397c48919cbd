"""A network without its last layer, where that is affine and blending commutes with it."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from effseg.memory import trace_forward
from effseg.networks import NormActConv, WeightsFile, finest
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
    """What of some models is blended, window by window.

    Attributes:
        networks: one a model; models whose weights take turns in a network share it. Their outputs
            are averaged; with a head, they lie side by side instead.
        weights: one a model, read into its network before it is run; None: the network has them.
        head: makes the averaged logits of the features side by side; None where logits come.
    """

    networks: tuple[nn.Module, ...]
    weights: tuple[WeightsFile | None, ...]
    head: AffineHead | None

    @property
    def distinct(self) -> tuple[nn.Module, ...]:
        """Each network once: all that is in memory."""
        return tuple({id(network): network for network in self.networks}.values())


def choose_blend(
    networks: Sequence[nn.Module],
    input_shape: Sequence[int],
    *,
    weights: Sequence[Sequence[WeightsFile]] | None = None,
) -> Blend:
    """Blend features where all networks end in an affine layer and it takes fewer channels.

    Args:
        networks: whole ones, or such as `find_headless` made of them.
        input_shape: of one window, (1, C, z, y, x).
        weights: of each network, the files that take turns in it; None or empty: its own.
    """
    headless = [
        network if isinstance(network, Headless) else find_headless(network, input_shape)
        for network in networks
    ]
    turns = [files or (None,) for files in weights or [()] * len(networks)]
    models = [
        (network, cut, file)
        for network, cut, files in zip(networks, headless, turns, strict=True)
        for file in files
    ]
    files = tuple(file for _, _, file in models)
    cuts = [cut for _, cut, _ in models if cut is not None]
    n_features = sum(cut.conv.in_channels for cut in cuts)
    if len(cuts) == len(models) and n_features < cuts[0].conv.out_channels:
        head = _joint_head([_head(cut, file) for cut, file in zip(cuts, files, strict=True)])
        return Blend(networks=tuple(cuts), weights=files, head=head)
    if cuts and len(models) > 1:
        logger.info(
            "blending logits: %d models together have no head to spare, or one that takes more",
            len(models),
        )
    whole = (n.network if isinstance(n, Headless) else n for n, _, _ in models)
    return Blend(networks=tuple(whole), weights=files, head=None)


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


def _head(cut: Headless, weights: WeightsFile | None) -> AffineHead:
    """The layer left out, as a network has it or as a file does."""
    weight, bias = cut.conv.weight.detach(), cut.conv.bias
    if weights is not None:
        stem = f"{cut.path}." if cut.path else ""
        weight = weights.tensor(f"{stem}weight")
        bias = None if bias is None else weights.tensor(f"{stem}bias")
    if bias is None:
        bias = weight.new_zeros(len(weight))
    return AffineHead(
        weight=weight.flatten(1).float().cpu().numpy(),
        bias=bias.detach().float().cpu().numpy(),
    )


def _joint_head(heads: Sequence[AffineHead]) -> AffineHead:
    """The mean of several layers' logits as one layer over their features side by side."""
    weights = np.concatenate([head.weight for head in heads], axis=1)
    return AffineHead(
        weight=np.divide(weights, len(heads), dtype=np.float32),
        bias=np.mean([head.bias for head in heads], axis=0, dtype=np.float32),
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
