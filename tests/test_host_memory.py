"""What the system counts of a training step on a CPU: told beforehand, and given back."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from effseg.memory import trace_forward, trace_peak
from effseg.memory.host_convolution import VECTOR_BYTES
from effseg.memory.host_workspace import HOST_BYTES, PRODUCT_BYTES

WIDTH = VECTOR_BYTES.get(torch.backends.cpu.get_cpu_capability(), 4) // 4
"""Channels of float32 in a vector."""
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and glibc are Linux's")


def working(conv, shape, *, innermost=False):
    """Scratch bytes of one pass of a convolution: what its trace takes beyond its tensors."""
    if innermost:
        conv = conv.to(memory_format=torch.channels_last_3d)
    report = trace_forward(conv, shape, device="cpu")
    return report.device_bytes - HOST_BYTES - report.peak_bytes


def blocked(n, channels, *space):
    """Floats of a copy whose channels fill vectors, in bytes."""
    n_values = n * -(-channels // WIDTH) * WIDTH
    for length in space:
        n_values *= length
    return 4 * n_values


def copied(n, channels, space, kernel, *, result):
    """Bytes of a convolution's copies, as long as there is no result yet, and after it."""
    before, after = (blocked(n, number, *space) for number in channels)
    return max(after, before + after + blocked(*reversed(channels), *kernel) - result)


def test_a_convolution_copies_what_is_not_channels_last():
    conv = nn.Conv3d(20, 40, 3, padding=1, bias=False)
    copies = copied(2, (20, 40), (8, 8, 8), (3, 3, 3), result=4 * 2 * 40 * 8**3)
    assert working(conv, (2, 20, 8, 8, 8)) == copies
    assert working(conv, (2, 20, 8, 8, 8), innermost=True) == 0


@pytest.mark.skipif(WIDTH != 16, reason="of other processors it is not known")
@pytest.mark.parametrize("n_channels", [1, 13])
def test_channels_that_fill_no_vector_are_read_in_place(n_channels):
    conv = nn.Conv3d(n_channels, 16, 3, padding=1, bias=False)
    assert working(conv, (2, n_channels, 8, 8, 8)) == blocked(2, 16, 8, 8, 8)
    pointwise = nn.Conv3d(n_channels, 16, 1, bias=False).bfloat16()
    copies = copied(2, (n_channels, 16), (8, 8, 8), (1, 1, 1), result=4 * 2 * 16 * 8**3)
    assert working(pointwise, (2, n_channels, 8, 8, 8)) == copies // 2


def test_the_gradient_of_few_channels_is_written_as_a_vector_of_them():
    def of_step(*parts):
        report = trace_peak(nn.Sequential(*parts), (2, 4, 16, 16, 16), device="cpu")
        return report.device_bytes - HOST_BYTES - report.peak_bytes

    conv = nn.Conv3d(4, 4, 3, padding=1, bias=False)
    copies = copied(2, (4, 4), (16, 16, 16), (3, 3, 3), result=4 * 2 * 4 * 16**3)
    assert of_step(nn.Sigmoid(), conv) < copies  # nothing before it learns
    assert of_step(nn.Conv3d(4, 4, 1), nn.Sigmoid(), conv) == copies


def test_shorter_numbers_do_not_fill_longer_vectors():
    conv = nn.Conv3d(20, 40, 3, padding=1, bias=False).bfloat16()
    copies = copied(2, (20, 40), (8, 8, 8), (3, 3, 3), result=4 * 2 * 40 * 8**3)
    assert working(conv, (2, 20, 8, 8, 8)) == copies // 2


def test_a_small_single_sample_is_laid_out_in_columns():
    conv = nn.Conv3d(4, 2, 3, padding=1, bias=False)
    assert working(conv, (1, 4, 5, 6, 7)) == 4 * 27 * (5 * 6 * 7) * 4


class Combined(nn.Module):
    """A tensor with its half as precise self."""

    def __init__(self, combine):
        super().__init__()
        self.combine = combine

    def forward(self, image):
        return self.combine(image.bfloat16(), image)


@pytest.mark.parametrize(
    ("combine", "n_copies"),
    [
        (torch.add, 1),
        (torch.mul, 1),
        (lambda half, image: torch.where(image > 0, half, image), 1),
        (lambda half, image: half.add_(image), 2),  # the result is one of them
        (lambda half, image: half * 2.0, 0),
        (lambda half, image: image + image, 0),
    ],
    ids=["add", "mul", "where", "add_", "number", "alike"],
)
def test_operands_of_another_type_are_converted_as_wholes(combine, n_copies):
    assert working(Combined(combine), (2, 3, 8, 8, 8)) == n_copies * 4 * 2 * 3 * 8**3


CONVERTED = """
import sys
import torch
from effseg.memory import PeakResident, mapped_blocks
from effseg.memory.host_workspace import HostWorkspace

name = sys.argv[1]
with mapped_blocks():
    half, whole = torch.ones(2**24, dtype=torch.bfloat16), torch.ones(2**24)
    getattr(half[:8], name)(whole[:8])
    resident = PeakResident().start()
    found = getattr(half, name)(whole)
    new_bytes = 0 if found is half else found.nbytes
    print(new_bytes + HostWorkspace()(f"aten::{name}", (half, whole), found), resident.stop())
"""


@linux
@pytest.mark.parametrize("name", ["add", "mul_"])
def test_that_is_what_the_system_counts(name):
    command = [sys.executable, "-c", CONVERTED, name]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected, measured = map(int, said.split())
    assert expected == 2**27
    assert measured == pytest.approx(expected, rel=0.05)


def test_a_step_counts_scratch_where_it_is_needed_and_no_optimizer_state_twice():
    """Between two layers that keep much, the copies of a small one are not the peak."""
    wide = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 8**3, 4000))
    report = trace_peak(wide, (2, 1, 8, 8, 8), device="cpu", optimizer=torch.optim.AdamW)
    assert report.device_bytes == report.peak_bytes + HOST_BYTES


@pytest.mark.parametrize("innermost", [False, True])
def test_in_bfloat16_backward_turns_what_it_multiplies(innermost):
    conv = nn.Conv3d(16, 32, 3, padding=1, bias=False)
    if innermost:
        conv = conv.to(memory_format=torch.channels_last_3d)
    report = trace_peak(conv, (2, 16, 8, 8, 8), device="cpu", autocast=torch.bfloat16)
    values = 2 * (16 + 32) * 8**3
    copies = 0 if innermost else values + 2 * 16 * 32 * 27  # summed in float32
    scratch = report.device_bytes - HOST_BYTES - report.peak_bytes
    assert 2 * values <= scratch + 2**16
    assert scratch <= 2 * (values + copies)


def test_compiled_products_of_short_types_stay():
    linear = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 48))
    kept = [
        trace_forward(linear, (32, 64), device="cpu", autocast=dtype).device_bytes
        for dtype in (None, torch.bfloat16)
    ]
    assert kept[1] - kept[0] == pytest.approx(2 * PRODUCT_BYTES, rel=0.05)  # two shapes


STEP = """
import sys
from functools import partial
import torch
from monai.networks.nets import BasicUNet, SegResNet
from torch import nn
from effseg.losses import CompoundLoss
from effseg.memory import PeakResident, mapped_blocks, trace_peak

torch.set_num_threads(2)
build = {
    "BasicUNet": lambda: BasicUNet(3, 1, 2, features=(16, 16, 32, 64, 128, 16)),
    "SegResNet": lambda: SegResNet(3, init_filters=16, in_channels=1, out_channels=2),
    "innermost": lambda: SegResNet(3, init_filters=16, in_channels=1, out_channels=2).to(
        memory_format=torch.channels_last_3d
    ),
}[sys.argv[1]]
shape, space, loss = (2, 1, 48, 48, 48), (2, 48, 48, 48), CompoundLoss()
expected = trace_peak(
    build(), shape, loss=loss, label_shape=space, label_dtype=torch.uint8,
    optimizer=partial(torch.optim.AdamW, lr=1e-3), device="cpu",
).device_bytes
with mapped_blocks():
    conv = nn.Conv3d(2, 2, 3)
    conv(torch.zeros(2, 2, 8, 8, 8)).sum().backward()
    resident = PeakResident().start()
    network = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(3):
        image, label = torch.randn(shape), torch.randint(0, 2, space, dtype=torch.uint8)
        optimizer.zero_grad()
        value = loss(network(image), label)
        value.backward()
        optimizer.step()
        del value, image, label
    print(expected, resident.stop())
"""


@linux
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("BasicUNet", "SegResNet")),
        "innermost",
    ],
)
def test_resident_memory_of_training_is_what_the_trace_said(name):
    pytest.importorskip("monai")
    ended = subprocess.run(
        [sys.executable, "-c", STEP, name], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    expected, measured = map(int, ended.stdout.split())
    assert measured == pytest.approx(expected, rel=0.05)


KEPT = """
import torch
from effseg.memory import mapped_blocks, resident_bytes

def left_after_freeing():
    before = resident_bytes()
    several = [torch.ones(2**19) for _ in range(32)]
    held = resident_bytes() - before
    top = several[31]  # what lives on top keeps a heap from shrinking
    del several
    left = resident_bytes() - before
    del top
    return held >> 20, left >> 20

with mapped_blocks() as mapped:
    with mapped_blocks():
        print(mapped, *left_after_freeing())
    print(mapped, *left_after_freeing())
print(mapped, *left_after_freeing())
"""


@linux
def test_blocks_are_given_back_when_they_are_freed_until_the_last_has_left():
    """In a process of its own: what is free on the heap before is used first, and stays."""
    ended = subprocess.run(
        [sys.executable, "-c", KEPT], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    *within, after = (line.split() for line in ended.stdout.splitlines())
    if within[0][0] == "False":
        pytest.skip("the C library is not glibc")
    for _, held, left in within:
        assert int(held) >= 60
        assert int(left) <= 8
    assert int(after[2]) >= 16


KEPT_ALL = """
import torch
from effseg.memory import kept_blocks, mapped_blocks, resident_bytes

def left_after_freeing(*lengths):
    before = resident_bytes()
    several = [torch.ones(n) for n in lengths]
    held = resident_bytes() - before
    del several
    return held >> 20, (resident_bytes() - before) >> 20

ALL = 2**19, 2**21, 2**24  # 2, 8 and 64 MiB
with mapped_blocks() as can:
    with kept_blocks():
        print(can, *left_after_freeing(*ALL))
with kept_blocks():
    with mapped_blocks():
        print(can, *left_after_freeing(*ALL))
    before = resident_bytes()
    print(can, *left_after_freeing(*ALL))
    print(can, *left_after_freeing(2**24))
print(can, 0, (resident_bytes() - before) >> 20)
"""


@linux
def test_blocks_of_any_size_are_kept_and_used_again_unless_they_are_to_be_given_back():
    """Mapped wins, whichever was entered first; and what was kept is given back in the end."""
    ended = subprocess.run(
        [sys.executable, "-c", KEPT_ALL], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    if rows[0][0] == "False":
        pytest.skip("the C library is not glibc")
    mapped, mapped_too, kept, again, after = ([int(n) for n in row[1:]] for row in rows)
    for held, left in (mapped, mapped_too):
        assert held >= 70
        assert left <= 8
    assert kept[0] >= 70
    assert kept[1] >= 70
    assert again[0] <= 8  # nothing was asked of the system
    assert after[1] <= 8
