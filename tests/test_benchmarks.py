"""The memory suite compares like with like, and the bytes it shows do not grow unseen."""

import dataclasses
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from effseg.memory import MemoryReport, trace_peak

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
cases: Any = import_module("memory_cases")
references: Any = import_module("reference_networks")
schemes: Any = import_module("dense_schemes")
suite: Any = import_module("bench_memory")

GIB = 2**30
SIDE = 32
UNIT = 4 * SIDE**3
"""One channel's bytes."""
TINY = references.Layout(encoder=(2, 1), decoder=(2,), growth_rate=2, c0=4)


def block_report(shape: tuple[int, int, int], scheme: str) -> MemoryReport:
    return trace_peak(cases.probe(*shape, scheme), (1, 1, SIDE, SIDE, SIDE), device="cpu")


@pytest.mark.parametrize("shape", cases.BLOCKS)
@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_a_block_saves_what_its_scheme_is_known_to_save(shape, scheme):
    n, c0, k = shape
    m, end = 4 * k, c0 + n * k
    inputs = sum(c0 + i * k for i in range(n))
    channels, numbers = {
        # each norm keeps its input, each activation its result, two numbers a channel
        "plain": (2 * inputs + 2 * m * n + end, 2 * (inputs + n * m)),
        # each feature but the last once, the middle twice, and all features in one piece
        "bottleneck": (end - k + 2 * m * n + end, 2 * n * m),
        "layer": (end - k + end, 0),
        "block": (c0 + end, 0),
        "shared": (end, 2 * (end + n * m)),
    }[scheme]
    assert block_report(shape, scheme).saved_bytes == channels * UNIT + 4 * numbers


@pytest.mark.parametrize("shape", cases.BLOCKS)
def test_a_shared_block_takes_little_beyond_its_features_and_their_gradient(shape):
    n, c0, k = shape
    m, end = 4 * k, c0 + n * k
    report = block_report(shape, "shared")
    activations = report.peak_bytes - 2 * report.parameter_bytes
    assert 2 * end * UNIT < activations <= (2 * end + 2 * m + k + c0) * UNIT


def full_report(network: str, scheme: str) -> MemoryReport:
    (case,) = (case for case in cases.CASES[network] if case.scheme == scheme)
    return suite.traced(case)


def test_a_dense_unet_of_full_width_trains_in_4_gib():
    network = references.ReferenceUNet(references.LAYOUTS["R1"], 2, "shared")
    assert network.head.conv.in_channels == 309
    assert sum(p.numel() for p in network.parameters()) == 1_730_744
    assert full_report("R1", "shared").peak_bytes <= 4.0 * GIB


def test_effsegs_network_trains_on_two_samples_in_2_3_gib():
    assert full_report("effseg", "shared").peak_bytes <= 2.3 * GIB


@pytest.mark.parametrize("scheme", schemes.SCHEMES[1:])
def test_the_reference_networks_schemes_give_the_same_numbers(scheme):
    results = {}
    state = references.ReferenceUNet(TINY, 2, "plain").state_dict()
    image = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64)
    for name in ("plain", scheme):
        network = references.ReferenceUNet(TINY, 2, name).double()
        network.load_state_dict(state)
        logits = network(image)
        logits.sin().sum().backward()
        gradients = [p.grad for p in network.parameters()]
        results[name] = [logits, *gradients, *network.buffers()]
    for got, expected in zip(results[scheme], results["plain"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_reference_network_repeats_what_a_transposed_convolution_does():
    features, conv = torch.randn(1, 5, 2, 3, 4), torch.nn.Conv3d(5, 8 * 3, 1, bias=False)
    # 1x1x1 channels come in the order (z, y, x, channel) of the fine voxel
    kernel = conv.weight.detach().view(2, 2, 2, 3, 5).permute(4, 3, 0, 1, 2)
    expected = torch.nn.functional.conv_transpose3d(features, kernel, stride=2)
    torch.testing.assert_close(references.unfolded(conv(features)), expected)


def test_every_network_is_compared_with_its_plain_step():
    for network, of_network in cases.CASES.items():
        assert of_network[0].scheme == "plain"
        assert {case.network for case in of_network} == {network}
        names = [case.name for case in of_network]
        assert len(set(names)) == len(names)


def test_rows_and_plot_are_written(tmp_path, monkeypatch):
    results = import_module("memory_results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    plain = results.Row(network="R1", scheme="plain", n_parameters=7, ratio=1.0, peak_gib=22.2)
    shared = dataclasses.replace(plain, scheme="shared", ratio=0.5, peak_gib=3.17)
    results.write_results([plain, shared], device=torch.device("cpu"))
    table = (tmp_path / "results" / "memory.csv").read_text().splitlines()
    assert len(table) == 3
    assert table[2].startswith("R1,shared,7,")
    assert "shared 3.2" in (tmp_path / "results" / "memory.svg").read_text()
