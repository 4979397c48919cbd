"""One dense block, forward and backward: seconds and bytes of each memory mode.

    effseg benchmark --suite memory

`extra_info` holds `peak` and `saved`, counted exactly, in units of one channel's bytes (u), and
`floor`: the features and their gradient, which nothing can do without. Compare seconds within one
run only.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from effseg.memory import measure_peak
from effseg.networks import DenseBlock, MemoryMode

SIDE = 24
SHAPES = [(4, 32, 16), (6, 32, 16), (8, 64, 16), (12, 64, 16), (16, 64, 32)]
MODES: tuple[MemoryMode, ...] = ("plain", "checkpoint", "shared")


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(("n_layers", "c0", "growth"), SHAPES)
def test_block(
    benchmark: BenchmarkFixture, n_layers: int, c0: int, growth: int, memory: MemoryMode
) -> None:
    """L layers of growth k on C0 channels, batch norm and ReLU, float32."""
    torch.manual_seed(0)
    block = DenseBlock(c0, growth, n_layers, memory=memory)
    x = torch.randn(1, c0, SIDE, SIDE, SIDE, requires_grad=True)

    def step() -> None:
        block(x).square().mean().backward()
        block.zero_grad(set_to_none=True)
        x.grad = None

    report = measure_peak(step)
    unit = 4 * SIDE**3
    parameters = sum(p.numel() * 4 for p in block.parameters())
    benchmark.extra_info["peak"] = round((report.peak_bytes - 2 * parameters) / unit, 1)
    benchmark.extra_info["saved"] = round(report.saved_bytes / unit, 1)
    benchmark.extra_info["floor"] = 2 * block.out_channels
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
