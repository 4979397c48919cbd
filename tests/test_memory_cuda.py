import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from effseg.kernels import norm, pointwise, tiles
from effseg.kernels.cuda.dispatch import triton_is_installed
from effseg.memory import CudaCard, measure_peak, trace_forward, trace_peak
from effseg.memory.cuda_workspace import (
    OLDER_CUBLAS_BYTES,
    TILES,
    Scratch,
    bytes_beyond_allocator,
    scratch_of,
)
from effseg.memory.hollow import HollowMode, hollow_empty
from effseg.memory.simulated import SimulatedCard
from effseg.memory.tracker import ACCELERATOR, MemoryTracker

MIB = 2**20
HOPPER = CudaCard(cudnn_version=91900)
BARE = CudaCard(cudnn_version=91900, cublas_bytes=0, operand_copies=0)
"""A card on which tensors are all that takes memory."""

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "cuda_trace.py"


def convolution(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    dtype: torch.dtype,
    *,
    card: CudaCard | None = None,
    padding: int = 0,
    stride: int = 1,
    transposed: bool = False,
    groups: int = 1,
    innermost: bool = False,
    backward: bool = False,
) -> Scratch:
    """The scratch of a convolution without memory."""
    layout = torch.channels_last_3d if innermost else torch.contiguous_format
    options = ([stride] * 3, [padding] * 3, [1] * 3, transposed, [0] * 3, groups)
    with HollowMode(device="cuda"):
        x = hollow_empty(shape, dtype).contiguous(memory_format=layout)
        w = hollow_empty(weight, dtype)
        y = torch.ops.aten.convolution(x, w, None, *options)
        args, name, result = (x, w, None, *options), "aten::convolution", y
        if backward:
            args, name, result = (y, x, w, None, *options, [True] * 3), f"{name}_backward", None
    scratch = scratch_of(name, args, result, card or HOPPER)
    assert scratch is not None
    return scratch


@pytest.mark.parametrize(
    ("shape", "weight", "padding", "dtype", "version", "gib"),
    [
        ((1, 256, 5, 1090, 1922), (64, 256, 3, 3, 3), 0, torch.float32, 8907, 161.37),
        ((1, 64, 362, 370, 251), (32, 64, 3, 3, 3), 1, torch.float16, 8302, 108.21),
        ((1, 128, 256, 256, 256), (128, 128, 3, 3, 3), 1, torch.bfloat16, 90100, 108.0),
        ((2, 64, 128, 128, 128), (32, 64, 3, 3, 3), 1, torch.bfloat16, 91002, 6.75),
    ],
)
def test_columns_are_what_users_saw_torch_ask_for(shape, weight, padding, dtype, version, gib):
    card = CudaCard(cudnn_version=version)
    scratch = convolution(shape, weight, dtype, card=card, padding=padding)
    assert (len(scratch.blocks), scratch.cublas) == (1, True)
    assert round(scratch.blocks[0] / 2**30, 2) == gib
    newer = convolution(shape, weight, dtype, padding=padding)
    assert not newer.cublas
    assert newer.blocks[0] < scratch.blocks[0] / 4


def test_columns_of_a_transposed_convolution_count_the_input_places():
    card = CudaCard(cudnn_version=91002)
    shape, weight = (1, 8, 4, 4, 4), (8, 2, 2, 2, 2)
    scratch = convolution(shape, weight, torch.float16, card=card, stride=2, transposed=True)
    assert scratch == Scratch((2 * 8 * 4**3 * 2,), cublas=True)
    innermost = convolution(
        shape, weight, torch.float16, card=card, stride=2, transposed=True, innermost=True
    )
    pointwise = convolution(shape, (8, 8, 1, 1, 1), torch.float16, card=card)
    assert not innermost.cublas
    assert not pointwise.cublas


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({}, 8 * 8**3 + 8 * 8**3 + 8 * 8 * 27),
        ({"dtype": torch.float32}, 2 * (4 * 8**3 + 8 * 8**3 + 8 * 4 * 27)),
        ({"kernel": 1, "padding": 0}, None),
        ({"dtype": torch.float64}, None),
        ({"groups": 4}, None),
    ],
    ids=["half", "float", "pointwise", "double", "depthwise"],
)
def test_cudnn_copies_its_operands_with_channels_filled_up(options, values, backward):
    options = {"dtype": torch.bfloat16, "kernel": 3, "padding": 1, "groups": 1} | options
    kernel, groups = (options.pop(name) for name in ("kernel", "groups"))
    weight = (8, 4 // groups, kernel, kernel, kernel)
    scratch = convolution((1, 4, 8, 8, 8), weight, groups=groups, backward=backward, **options)
    assert scratch.blocks == (() if values is None else (2 * values,))
    assert not scratch.cublas


def test_where_channels_are_innermost_only_what_lies_otherwise_is_copied():
    shape, weight = (1, 16, 8, 8, 8), (8, 16, 3, 3, 3)
    scratch = convolution(shape, weight, torch.bfloat16, padding=1, innermost=True)
    assert scratch.blocks == (2 * math.prod(weight),)
    scratch = convolution(shape, weight, torch.bfloat16, padding=1, innermost=True, backward=True)
    assert scratch.blocks == (2 * math.prod(weight),)


def test_an_expanded_gradient_is_written_out_before_a_convolution_reads_it():
    with HollowMode(device="cuda"):
        x, weight = hollow_empty((1, 8, 4, 4, 4), WIDE), hollow_empty((8, 8, 1, 1, 1), WIDE)
        gradient = hollow_empty((1,), WIDE).expand(1, 8, 4, 4, 4)
    options = ([1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1)
    args = (gradient, x, weight, None, *options, [True] * 3)
    scratch = scratch_of("aten::convolution_backward", args, None, HOPPER)
    assert scratch == Scratch((4 * 8 * 4**3,))


LOW, WIDE = torch.bfloat16, torch.float32
ROWS, CHANNELS = 256, 32


def tile_call(name: str, rows: Tensor) -> tuple[object, ...]:
    """Arguments for one of the tile operators."""
    row = torch.ones(1, CHANNELS)
    weight = torch.ones(8, CHANNELS, dtype=rows.dtype)
    gradient = torch.ones(1, rows.shape[1], 8, dtype=rows.dtype)
    into = torch.zeros_like(rows)
    return {
        "moments": (rows, True),
        "affine_act_linear": ([rows], row, row, weight, 0.1),
        "affine_act_linear_backward": ([rows], row, row, weight, 0.1, gradient, [into]),
        "affine_act": (rows, row, row, 0.1),
        "affine_act_": (rows, row, row, 0.1),
        "activation_backward": (into, rows, row, row, 0.1),
        "affine_combine": (into, row, rows, row, row),
    }[name]


@pytest.mark.parametrize("dtype", [LOW, WIDE])
@pytest.mark.parametrize("operator", TILES)
def test_tiles_that_live_at_once_are_counted(operator, dtype, monkeypatch):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * ROWS * CHANNELS)
    name = operator.removeprefix("effseg::")
    args = tile_call(name, torch.randn(1, 2 * ROWS, CHANNELS).to(dtype))
    kept: list[object] = []
    run = (vars(pointwise) | vars(norm))[name]._init_fn
    report = measure_peak(lambda: kept.append(run(*args)))
    results = [t for t in (kept[0] if isinstance(kept[0], tuple) else kept) if t is not None]
    flat = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
    given = {t.untyped_storage().data_ptr(): t for t in flat if isinstance(t, Tensor)}
    held = sum(t.untyped_storage().nbytes() for t in (*given.values(), *results))
    n_tiles = (report.peak_bytes - held) / (4 * ROWS * CHANNELS)
    expected = TILES[operator][0 if dtype == LOW else 1]
    assert expected - 0.1 <= n_tiles <= expected + 0.15  # beside them, sums of a few channels


def test_tiles_of_a_card_without_triton_are_its_own():
    card = CudaCard(triton=False)
    rows = hollow_empty((1, 128**3, 64), LOW)
    scratch = scratch_of("effseg::affine_act_linear", ([rows],), None, card)
    assert scratch == Scratch((tiles.TILE_BYTES["cuda"],) * 2, cublas=True)
    halves = [rows[:, :, :32], rows[:, :, 32:]]
    scratch = scratch_of("effseg::affine_act_linear", (halves,), None, card)
    beside = tiles.TILE_BYTES["cuda"] // 2  # the segments' tile side by side, in their type
    assert scratch == Scratch((*(tiles.TILE_BYTES["cuda"],) * 2, beside), cublas=True)
    few = scratch_of("effseg::moments", (rows[:, :100],), None, card)
    assert few == Scratch((100 * 64 * 4,) * 2)
    assert scratch_of("aten::add", (rows, rows), rows, card) is None


def test_kernels_of_a_card_take_partial_sums_and_no_tiles():
    rows, row = hollow_empty((1, 128**3, 64), LOW), torch.ones(1, 64)
    weight = hollow_empty((32, 64), LOW)
    given = ([rows], row, row, weight, 0.0)
    assert scratch_of("effseg::affine_act_linear", given, None, CudaCard()) is None
    gradient = hollow_empty((1, 128**3, 32), LOW)
    name = "effseg::affine_act_linear_backward"
    scratch = scratch_of(name, (*given, gradient, [rows]), None, CudaCard())
    assert scratch == Scratch((512 * 32 * 64 * 4, 2 * 512 * 64 * 4))
    exact = rows.to(torch.float32)
    tiled = scratch_of("effseg::affine_act_linear", ([exact], *given[1:]), None, CudaCard())
    assert tiled == Scratch((tiles.TILE_BYTES["cuda"],), cublas=True)  # torch's, in full precision


def test_cublas_takes_its_workspace_once_for_forward_and_once_for_backward():
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    without = trace_peak(network, (5, 4), card=BARE)
    for card in (CudaCard(), CudaCard(cublas_bytes=OLDER_CUBLAS_BYTES)):
        report = trace_peak(network, (5, 4), card=card)
        assert report.peak_bytes - without.peak_bytes == 2 * card.cublas_bytes
        assert report.timeline[0].start_bytes - without.timeline[0].start_bytes == (
            2 * card.cublas_bytes
        )
    forward = trace_forward(network, (5, 4)).peak_bytes
    assert forward - trace_forward(network, (5, 4), card=BARE).peak_bytes == 32 * MIB
    assert OLDER_CUBLAS_BYTES == 8.125 * MIB


def test_a_step_on_a_bare_card_by_hand():
    # 4 channels of 64 x 64 x 128 in float32 are 8 MiB: a segment of 20 MiB takes two of them
    network = nn.Sequential(nn.Conv3d(1, 4, 1, bias=False), nn.ReLU())
    report = trace_peak(network, (1, 1, 64, 64, 128), card=BARE)
    batch, features, small = 2 * MIB, 8 * MIB, 512
    # backward of the ReLU: its result and two gradients; weight, loss and the loss's gradient
    assert report.peak_bytes == batch + 3 * features + 3 * small
    assert report.parameter_bytes == small
    # the batch shares a segment with two tensors of features, the third takes another
    assert report.reserved_bytes == 2 * MIB + 2 * 20 * MIB
    assert report.device_bytes == report.reserved_bytes + BARE.context_bytes
    assert "reserved 42 MiB" in str(report)
    assert "device 554 MiB" in str(report)


def test_kernels_workspaces_count_at_the_module_that_takes_them():
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 3))
    shape = (1, 1, 32, 32, 32)
    bare, copying = (
        trace_peak(network, shape, autocast=LOW, card=card)
        for card in (BARE, BARE.model_copy(update={"operand_copies": 1.0}))
    )
    first, second = (r.timeline[0] for r in (bare, copying))
    assert first.module == second.module == "Sequential.0"
    copies = 2 * (2 * 8 * 32**3 + 8 * 8 * 27)  # the one channel of the input counts as eight
    assert second.peak_bytes - first.peak_bytes == -(-copies // 512) * 512
    assert (first.start_bytes, first.end_bytes) == (second.start_bytes, second.end_bytes)


def test_reserved_covers_the_next_step_beside_the_optimizers_state():
    # the moments are made when activations are gone and lie in their segments from then on
    network = nn.Sequential(nn.Conv3d(1, 24, 1, bias=False), nn.Flatten(2), nn.Linear(4096, 1500))
    shape = (1, 1, 16, 16, 16)
    plain = trace_peak(network, shape, card=BARE)
    report = trace_peak(network, shape, card=BARE, optimizer=torch.optim.AdamW)
    assert report.reserved_bytes >= report.peak_bytes
    assert report.reserved_bytes >= plain.reserved_bytes + 2 * report.parameter_bytes - 40 * MIB
    assert plain.reserved_bytes >= plain.peak_bytes


@pytest.mark.parametrize("expandable", [False, True])
def test_reserved_is_never_below_allocated(expandable):
    card = CudaCard(expandable_segments=expandable)
    network = nn.Sequential(nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 2, 1))
    for side in (8, 24, 40):
        shape = (1, 1, side, side, side)
        for report in (
            trace_peak(network, shape, card=card, autocast=LOW, optimizer=torch.optim.AdamW),
            trace_forward(network, shape, card=card),
        ):
            assert report.reserved_bytes >= report.peak_bytes
            assert report.device_bytes == report.reserved_bytes + card.context_bytes


def test_a_storage_that_grows_moves_to_another_block():
    tracker = MemoryTracker(card=SimulatedCard(BARE))
    grown = torch.zeros(0)
    with tracker:
        x = torch.ones(1000)
        torch.add(x[:100], 1, out=grown.resize_(100))
        torch.add(x, 1, out=grown.resize_(1000))
        del x
    report = tracker.report()
    assert report.timeline[-1].end_bytes == 4096
    assert report.peak_bytes == 4096 + 512 + 4096  # the old block lives until the new one is filled


def test_a_cpu_has_nothing_reserved():
    report = trace_peak(nn.Linear(4, 3), (5, 4), device="cpu")
    assert report.reserved_bytes is None
    assert "reserved" not in str(report)


@pytest.fixture
def pretended_card(monkeypatch) -> list[str]:
    """Two cards, of which the second is used, as torch.cuda would speak of them."""
    asked: list[str] = []
    answers = {
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 1,
        "empty_cache": lambda: asked.append("empty"),
        "reset_peak_memory_stats": lambda device: asked.append(f"reset {device}"),
        "max_memory_allocated": lambda device: (0, 100)[device],
        "max_memory_reserved": lambda device: (0, 300)[device],
        "memory_reserved": lambda device: (0, 200)[device],
        "get_device_capability": lambda: (8, 0),
        "mem_get_info": lambda device: (1000, 1000) if device == 0 else (10_000 - 750, 10_000),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(MemoryTracker, "place", property(lambda self: ACCELERATOR))
    return asked


def test_measuring_on_a_card_asks_its_allocator(pretended_card):
    report = measure_peak(lambda: None)
    assert pretended_card == ["empty", "reset 0", "reset 1"]
    assert (report.peak_bytes, report.reserved_bytes) == (100, 300)
    assert report.device_bytes == 300 + 550  # in use but not the allocator's: 750 - 200


def test_a_card_is_described_as_it_stands_there(pretended_card, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91701)
    card = CudaCard.of_this_machine(expandable_segments=True)
    assert card == CudaCard(
        cublas_bytes=OLDER_CUBLAS_BYTES,
        cudnn_version=91701,
        context_bytes=550,
        triton=triton_is_installed(),
        expandable_segments=True,
    )
    assert bytes_beyond_allocator(0) == 0


def test_without_cuda_the_library_is_that_of_the_release(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    assert CudaCard().cudnn_version == 91002
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    assert CudaCard().cudnn_version == 91900
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    assert CudaCard().cudnn_version == 92000


@pytest.mark.gpu
def test_the_context_is_of_the_size_assumed():
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    assert 100 * MIB < bytes_beyond_allocator(torch.cuda.current_device()) < 2048 * MIB
    assert CudaCard.of_this_machine().cublas_bytes >= 8 * MIB


@pytest.mark.gpu
def test_what_a_step_measures_agrees_with_itself():
    network = nn.Conv3d(1, 8, 3).cuda()
    batch = torch.zeros(1, 1, 64, 64, 64, device="cuda")
    report = measure_peak(lambda: network(batch).sum().backward())
    timeline_bytes = max(event.peak_bytes for event in report.timeline)
    assert timeline_bytes <= report.peak_bytes <= report.reserved_bytes < report.device_bytes


def load_benchmark() -> SimpleNamespace:
    sys.path.insert(0, str(BENCHMARK.parent))
    try:
        import cuda_trace
    finally:
        sys.path.pop(0)
    return cuda_trace


def test_the_benchmark_says_that_there_is_no_card():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    answer = subprocess.run([sys.executable, BENCHMARK], capture_output=True, text=True)
    assert answer.returncode == 3
    assert answer.stderr == "no CUDA card here: nothing to compare a trace with\n"
    assert answer.stdout == ""


def test_the_benchmark_has_configurations_that_trace():
    benchmark = load_benchmark()
    assert len(set(benchmark.CONFIGURATIONS)) == len(benchmark.CONFIGURATIONS) >= 20
    assert {c.network for c in benchmark.CONFIGURATIONS} == set(benchmark.NETWORKS)
    assert {c.dtype for c in benchmark.CONFIGURATIONS} == set(benchmark.DTYPES)
    smallest = min(benchmark.CONFIGURATIONS, key=lambda c: math.prod(c.patch))
    for name in benchmark.NETWORKS:
        step = benchmark.Configuration(name, smallest.patch, 1, "bf16")
        report = benchmark.trace(step, CudaCard())
        assert report.device_bytes > report.reserved_bytes >= report.peak_bytes > 0


def test_the_benchmark_sums_its_errors_up(tmp_path):
    benchmark = load_benchmark()

    def row(traced: int, measured: int | None) -> object:
        numbers = {
            f"{kind}_{name}": value
            for name in benchmark.MEASURES
            for kind, value in (("traced", traced), ("measured", measured))
        }
        step = {"network": "UNet", "patch": "32x32x32", "batch": 1, "dtype": "fp32"}
        return benchmark.Row(**step, **numbers, card="", driver="", torch="", cudnn=None)

    rows = [row(90, 100), row(101, 100), row(120, 100), row(50, None)]
    lines = benchmark.summarise(rows)
    assert len(lines) == 3
    assert "median error 10.0%, worst -10.0% to +20.0% over 3 configurations" in lines[0]
    assert "nothing to compare" in benchmark.summarise(rows[3:])[0]
    benchmark.write(rows, tmp_path / "table.csv")
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert len(table) == 5
    assert table[0].startswith("network,patch,batch,dtype,traced_allocated,measured_allocated")
    assert table[4] == "UNet,32x32x32,1,fp32,50,,50,,50,,,,,"
