"""The last 1x1x1 convolution and the loss, forward and backward: seconds and bytes.

    pytest benchmarks/bench_head_loss.py --benchmark-enable

Of a convolution and MONAI's DiceCELoss, of the same convolution and effseg's, and of the two in one
(deferred logits); and of each loss that a plan may have, with deferred logits. `extra_info` holds
`extra_mib`, tensor bytes at the peak beyond features and their gradient, and `ratio`, seconds over
those of MONAI in the same run.
"""

from collections.abc import Callable

import monai.losses
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from effseg.losses import CompoundLoss
from effseg.memory import measure_peak
from effseg.networks import defer_logits
from effseg.plans import LOSSES, LossConfig

SHAPES = [(118, 32, 64), (118, 32, 128), (3, 32, 96)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Step = Callable[[nn.Conv3d, Tensor, Tensor], Tensor]


def by_monai(head: nn.Conv3d, features: Tensor, labels: Tensor) -> Tensor:
    loss = monai.losses.DiceCELoss(
        softmax=True, to_onehot_y=True, include_background=False, batch=True
    )
    return loss(head(features), labels[:, None])


def by_effseg(head: nn.Conv3d, features: Tensor, labels: Tensor) -> Tensor:
    return CompoundLoss()(head(features), labels)


def deferred(head: nn.Conv3d, features: Tensor, labels: Tensor) -> Tensor:
    return CompoundLoss()(defer_logits(head, features), labels)


seconds_of_monai: dict[tuple[object, ...], float] = {}


def run(benchmark: BenchmarkFixture, shape: tuple[int, int, int], dtype: str, by: Step) -> float:
    """Bytes and seconds of a forward and backward, the latter returned."""
    n_classes, n_channels, side = shape
    torch.manual_seed(0)
    head = nn.Conv3d(n_channels, n_classes, 1)
    features = torch.randn(1, n_channels, side, side, side, dtype=DTYPES[dtype])
    features.requires_grad_()
    labels = torch.randint(0, n_classes, (1, side, side, side), dtype=torch.uint8)

    def step() -> None:
        low = DTYPES[dtype] != torch.float32
        with torch.autocast("cpu", dtype=DTYPES[dtype] if low else None, enabled=low):
            value = by(head, features, labels)
        value.backward()
        head.zero_grad()
        features.grad = None

    peak_bytes = measure_peak(step).peak_bytes
    extra_bytes = peak_bytes - 2 * features.numel() * features.element_size()
    benchmark.extra_info["extra_mib"] = round(extra_bytes / 2**20, 1)
    benchmark.group = f"{n_classes} classes, {n_channels} features, {side}^3, {dtype}"
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    return float(benchmark.stats.stats.min)


@pytest.mark.parametrize("by", [by_monai, by_effseg, deferred], ids=lambda by: by.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}x{}x{}^3".format(*shape))
def test_head_and_loss(
    benchmark: BenchmarkFixture, shape: tuple[int, int, int], dtype: str, by: Step
) -> None:
    """C classes of K features in side^3 voxels, batch 1; autocast where the type is low."""
    seconds = run(benchmark, shape, dtype, by)
    if by is by_monai:
        seconds_of_monai[shape, dtype] = seconds
    if (shape, dtype) in seconds_of_monai:
        ratio = seconds / seconds_of_monai[shape, dtype]
        benchmark.extra_info["ratio"] = round(ratio, 2)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "weighted_cross_entropy"])
def test_each_loss(benchmark: BenchmarkFixture, name: str) -> None:
    """What a loss adds to the head, and what one takes more than another."""
    loss = CompoundLoss(LossConfig(**LOSSES[name]), n_channels=118)
    run(
        benchmark,
        (118, 32, 64),
        "float32",
        lambda head, features, labels: loss(defer_logits(head, features), labels),
    )
