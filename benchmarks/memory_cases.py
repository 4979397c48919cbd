"""What the memory suite compares: networks, and the schemes under which each of them runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from dense_schemes import SCHEMES, Scheme, build_block
from made_up_facts import made_up_facts
from monai.networks import nets
from reference_networks import LAYOUTS, ReferenceUNet
from torch import nn

from effseg.networks import MemoryMode, build_network
from effseg.planner.geometry import stages_for
from effseg.planner.wish import network_config

FULL_SIDE = 128
"""Voxels along each axis of the patch whose bytes are traced."""
N_CLASSES = 2
FEATURES = (32, 64, 128, 256, 320, 320)
"""Of nnU-Net's stages at this patch."""
BLOCKS = ((4, 32, 16), (6, 32, 16), (8, 64, 16), (12, 64, 16), (16, 64, 32))
"""Layers, channels of the input, growth rate."""
Size = Literal["dense", "whole"]
VARIANTS: dict[str, dict[str, object]] = {
    "": {},
    "linknet": {"decoder": "linknet"},
    "pyramid": {"head": "pyramid"},
    "residual": {"residual": True},
}
"""Of the network of effseg."""


@dataclass(frozen=True)
class Case:
    """A network under a scheme.

    Attributes:
        network: its name.
        scheme: what is stored and what is recomputed; "plain" where the network has no choice.
        build: makes it, with fresh weights.
        size: how large it is run: "dense" are the widest at full resolution, and run on less.
        batch: samples of the traced step.
        block: one block, with the mean of its output for a loss and no optimizer.
        compiled: through torch.compile.
        budget: its `activation_memory_budget`, the share of saved bytes it may keep.
    """

    network: str
    scheme: str
    build: Callable[[], nn.Module]
    size: Size = "whole"
    batch: int = 1
    block: bool = False
    compiled: bool = False
    budget: float = 1.0

    @property
    def name(self) -> str:
        """Of the benchmark."""
        return f"{self.network}-{self.scheme}"


def probe(n_layers: int, c0: int, growth_rate: int, scheme: Scheme) -> nn.Sequential:
    """A dense block between two 1x1x1 convolutions, which read and write one channel.

    What the block reads is then an activation like any other, and its output has a reader that
    keeps it, as in a network.
    """
    return nn.Sequential(
        nn.Conv3d(1, c0, 1, bias=False),
        build_block(c0, growth_rate, n_layers, scheme),
        nn.Conv3d(c0 + n_layers * growth_rate, 1, 1, bias=False),
    )


def flagship(memory: MemoryMode, variant: str = "") -> nn.Module:
    """The network of effseg as the planner builds it for one isotropic image and one label."""
    facts = made_up_facts(FULL_SIDE)
    stages = stages_for(facts.shapes[0], facts.spacings[0])
    return build_network(network_config(facts, stages, memory, options=VARIANTS[variant]))


def nnunet(kind: Literal["plain", "residual"]) -> nn.Module:
    """nnU-Net's network for this patch; its package is no dependency of effseg's."""
    from dynamic_network_architectures.architectures import unet

    shared = {
        "input_channels": 1,
        "n_stages": len(FEATURES),
        "features_per_stage": FEATURES,
        "conv_op": nn.Conv3d,
        "kernel_sizes": 3,
        "strides": (1, 2, 2, 2, 2, 2),
        "num_classes": N_CLASSES,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }
    if kind == "plain":
        return unet.PlainConvUNet(n_conv_per_stage=2, n_conv_per_stage_decoder=2, **shared)
    return unet.ResidualEncoderUNet(
        n_blocks_per_stage=(1, 3, 4, 6, 6, 6), n_conv_per_stage_decoder=1, **shared
    )


def why_not(case: Case) -> str | None:
    """Why a case cannot run here; None where it can."""
    if case.network.startswith("nnU-Net") and find_spec("dynamic_network_architectures") is None:
        return "dynamic_network_architectures is not installed"
    if case.compiled and not torch.cuda.is_available():
        if case.network != block_name(*BLOCKS[0]):
            return "on a CPU torch.compile takes minutes for this one"
        if not _has_compiler():
            return "torch.compile finds no C++ compiler"
    return None


def block_name(n_layers: int, c0: int, growth_rate: int) -> str:
    """The name of a block: its layers, input and growth rate."""
    return f"block-L{n_layers}-C{c0}-k{growth_rate}"


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def _with_compiled(cases: list[Case]) -> list[Case]:
    """The cases, and the first and last of them, plain and shared, through the compiler."""
    plain, shared = cases[0], cases[-1]
    return [
        *cases,
        replace(plain, scheme="plain-compiled", compiled=True),
        replace(plain, scheme="plain-compiled-0.3", compiled=True, budget=0.3),
        replace(shared, scheme="shared-compiled", compiled=True),
    ]


def _block_cases(n_layers: int, c0: int, growth_rate: int) -> list[Case]:
    name = block_name(n_layers, c0, growth_rate)
    return [
        Case(
            name,
            scheme,
            lambda scheme=scheme: probe(n_layers, c0, growth_rate, scheme),
            size="dense",
            block=True,
        )
        for scheme in SCHEMES
    ]


def _reference_cases(name: str) -> list[Case]:
    return [
        Case(
            name,
            scheme,
            lambda scheme=scheme: ReferenceUNet(LAYOUTS[name], N_CLASSES, scheme),
            size="dense",
        )
        for scheme in SCHEMES
    ]


def _flagship_cases() -> list[Case]:
    modes: tuple[MemoryMode, ...] = ("plain", "checkpoint", "shared")
    return [Case("effseg", mode, lambda mode=mode: flagship(mode), batch=2) for mode in modes]


def _variant_cases(variant: str) -> list[Case]:
    modes: tuple[MemoryMode, ...] = ("plain", "shared")
    return [
        Case(f"effseg-{variant}", mode, lambda mode=mode: flagship(mode, variant), batch=2)
        for mode in modes
    ]


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "MONAI-SegResNet": lambda: nets.SegResNet(
        spatial_dims=3, init_filters=32, in_channels=1, out_channels=N_CLASSES
    ),
    "MONAI-DynUNet": lambda: nets.DynUNet(
        3, 1, N_CLASSES, [3] * 6, [1, 2, 2, 2, 2, 2], [2] * 5, res_block=True
    ),
    "MONAI-BasicUNet": lambda: nets.BasicUNet(
        spatial_dims=3, in_channels=1, out_channels=N_CLASSES
    ),
    "nnU-Net-PlainConvUNet": lambda: nnunet("plain"),
    "nnU-Net-ResEncM": lambda: nnunet("residual"),
}

CASES: dict[str, list[Case]] = {
    cases[0].network: cases
    for cases in (
        *(_with_compiled(_block_cases(*shape)) for shape in BLOCKS),
        *(_with_compiled(_reference_cases(name)) for name in LAYOUTS),
        _with_compiled(_flagship_cases()),
        *(_variant_cases(variant) for variant in VARIANTS if variant),
        *([Case(name, "plain", build, batch=2)] for name, build in OTHERS.items()),
    )
}
"""By network; each list begins with "plain"."""
