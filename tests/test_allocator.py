import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effseg.memory.allocator import Block, CachingAllocator

KIB, MIB = 2**10, 2**20


def allocated(allocator: CachingAllocator, *sizes: int) -> list[Block]:
    return [allocator.allocate(size) for size in sizes]


@pytest.mark.parametrize(
    ("n_bytes", "taken", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest of the small pool
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # a segment of its own from here on
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # nearly 2 MiB are left: split off
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB is left: not worth it
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # a little more is
    ],
)
def test_one_request_by_hand(n_bytes, taken, reserved):
    allocator = CachingAllocator()
    block = allocator.allocate(n_bytes)
    assert (block.n_bytes, allocator.allocated_bytes) == (taken, taken)
    assert allocator.reserved_bytes == reserved
    allocator.free(block)
    assert allocator.allocated_bytes == 0
    assert (allocator.reserved_bytes, allocator.peak_allocated_bytes) == (reserved, taken)


def test_small_and_large_requests_share_nothing():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(18 * MIB))
    allocated(allocator, MIB, MIB)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate(1)
    assert allocator.reserved_bytes == 22 * MIB


def test_the_smallest_block_that_fits_is_taken_and_the_first_of_equals():
    allocator = CachingAllocator()
    for block in allocated(allocator, 30 * MIB, 14 * MIB, 14 * MIB, 12 * MIB):
        allocator.free(block)
    block = allocator.allocate(13 * MIB)
    assert block.n_bytes == 14 * MIB
    assert allocator.allocate(13 * MIB).start > block.start
    assert allocator.allocate(13 * MIB).n_bytes == 13 * MIB  # cut from the 30 MiB
    assert allocator.reserved_bytes == 70 * MIB


def test_neighbours_become_one_whatever_the_order():
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        allocator = CachingAllocator()
        blocks = allocated(allocator, 4 * MIB, 4 * MIB, 4 * MIB)
        for at in order:
            allocator.free(blocks[at])
        assert [block.n_bytes for block in allocator.free_blocks()] == [20 * MIB]
        assert allocator.allocate(18 * MIB).n_bytes == 18 * MIB
        assert allocator.reserved_bytes == 20 * MIB


def test_segments_never_become_one_unless_they_expand():
    rigid, expanding = CachingAllocator(), CachingAllocator(expandable_segments=True)
    for allocator in (rigid, expanding):
        for block in allocated(allocator, 12 * MIB, 12 * MIB):
            allocator.free(block)
        allocator.allocate(24 * MIB)
    assert rigid.reserved_bytes == 48 * MIB
    assert expanding.reserved_bytes == 40 * MIB  # two pages of 20 MiB


def test_an_expandable_segment_grows_by_what_its_free_end_lacks():
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.allocate(11 * MIB + 512)
    assert first.n_bytes == 11 * MIB + 512  # split to the byte
    allocator.allocate(25 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(first)
    allocator.allocate(10 * MIB)  # the hole in front, not the end, which can still grow
    assert allocator.reserved_bytes == 40 * MIB
    allocator.allocate(MIB)
    assert allocator.reserved_bytes == 42 * MIB


def test_of_an_expandable_segment_the_end_is_taken_last():
    allocator = CachingAllocator(expandable_segments=True)
    hole, _ = allocated(allocator, 12 * MIB, 5 * MIB)
    allocator.free(hole)  # 12 MiB free in front, 3 MiB at the end
    assert allocator.allocate(2 * MIB).start == hole.start


def test_repeating_a_step_beside_what_it_left_behind():
    allocator = CachingAllocator()
    activation = allocator.allocate(12 * MIB)
    allocator.free(activation)
    step = list(allocator.requests)
    state = allocator.allocate(11 * MIB)  # an optimizer's: it takes the activation's block
    assert allocator.reserved_bytes == 12 * MIB
    allocator.repeat(step)
    assert allocator.reserved_bytes == 24 * MIB
    assert allocator.allocated_bytes == state.n_bytes
    allocator.repeat(step)
    assert allocator.reserved_bytes == 24 * MIB
    allocator.repeat([(state, None)])  # not asked for within: not theirs to free
    assert allocator.allocated_bytes == state.n_bytes


SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 3 * MIB),
    st.integers(9 * MIB, 40 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 10 * MIB, 11 * MIB]),
)
MOVES = st.lists(st.tuples(st.booleans(), SIZES, st.integers(0, 10**6)), max_size=60)


def play(
    allocator: CachingAllocator,
    moves: list[tuple[bool, int, int]],
    check: Callable[[list[tuple[Block, int]]], None],
) -> list[tuple[Block, int]]:
    """Allocate, or free the one that a number picks; the blocks that live with what they hold."""
    living: list[tuple[Block, int]] = []
    for give_back, size, pick in moves:
        if give_back and living:
            allocator.free(living.pop(pick % len(living))[0])
        else:
            living.append((allocator.allocate(size), size))
        check(living)
    return living


@given(moves=MOVES, expandable=st.booleans())
def test_blocks_hold_what_lives_and_never_overlap(moves, expandable):
    allocator = CachingAllocator(expandable_segments=expandable)

    def check(living: list[tuple[Block, int]]) -> None:
        for block, size in living:
            slack = 511 if block.small or expandable else MIB + 511
            assert size <= block.n_bytes <= size + slack
            assert not block.free
        everything = [block for block, _ in living] + allocator.free_blocks()
        spans = sorted((block.start, block.start + block.n_bytes) for block in everything)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert allocator.allocated_bytes == sum(block.n_bytes for block, _ in living)
        assert allocator.reserved_bytes == sum(block.n_bytes for block in everything)
        assert allocator.reserved_bytes % (2 * MIB) == 0
        for block in allocator.free_blocks():
            for neighbour in (block.previous, block.following):
                assert neighbour is None or not neighbour.free

    living = play(allocator, moves, check)
    assert allocator.peak_allocated_bytes >= allocator.allocated_bytes
    for block, _ in living:
        allocator.free(block)
    left = allocator.free_blocks()
    assert all(block.previous is block.following is None for block in left)
    assert sum(block.n_bytes for block in left) == allocator.reserved_bytes
    assert len(left) <= 2 or not expandable  # one segment a pool


@pytest.mark.gpu
@pytest.mark.parametrize("expandable", [False, True])
def test_the_real_allocator_hands_out_the_same_bytes(expandable):
    subprocess.run(
        [sys.executable, "-c", REAL, str(expandable)],
        check=True,
        env=os.environ | {"PYTORCH_ALLOC_CONF": f"expandable_segments:{expandable}"},
    )


REAL = """
import random, sys
import torch
from effseg.memory.allocator import CachingAllocator

simulated = CachingAllocator(expandable_segments=sys.argv[1] == "True")
random.seed(0)
living = []
for _ in range(600):
    if living and random.random() < 0.45:
        tensor, block = living.pop(random.randrange(len(living)))
        simulated.free(block)
        del tensor
    else:
        size = int(2 ** random.uniform(0, 26))
        tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
        living.append((tensor, simulated.allocate(size)))
        del tensor
    assert torch.cuda.memory_allocated() == simulated.allocated_bytes, size
    assert torch.cuda.memory_reserved() == simulated.reserved_bytes, size
"""
