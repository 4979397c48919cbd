"""CUDA's caching allocator, replayed on numbers alone: what it would hand out, and what it holds.

torch asks the driver for *segments* and cuts them into *blocks*. A freed block stays with the
process and is used again, so what the card must hold (reserved) is more than what tensors take
(allocated), by as much as blocks fit each other badly. Both follow from the order of requests.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with one stream and nothing set but
`expandable_segments`; the sizes stand in c10/core/AllocatorConfig.h (torch 2.10 to 2.13). Left out:
what happens when the card is full, where cached segments go back to the driver.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

MIB = 2**20

ROUNDING_BYTES = 512
"""Every request is rounded up to a multiple of this (kMinBlockSize)."""

SMALL_REQUEST_BYTES = MIB
"""Requests up to here are served from the small pool (kSmallSize)."""

SMALL_SEGMENT_BYTES = 2 * MIB
"""What the small pool asks the driver for at a time (kSmallBuffer)."""

LARGE_SEGMENT_BYTES = 20 * MIB
"""What the large pool asks the driver for at a time (large_segment_size) ..."""

OWN_SEGMENT_BYTES = 10 * MIB
"""... for requests below this; from here on each gets a segment of its own (kMinLargeAlloc) ..."""

SEGMENT_ROUNDING_BYTES = 2 * MIB
"""... rounded up to a multiple of this (kRoundLarge)."""

LARGE_POOL_START = 2**56
"""Where the simulated addresses of the large pool begin."""


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment, in use or free.

    Attributes:
        start: its address; the segments of a pool are laid out one after the other.
        n_bytes: its length, what `torch.cuda.memory_allocated` counts while it is in use.
        small: of the small pool.
        free: whether it waits to be used again.
        previous: the block before it in its segment.
        following: the block after it in its segment.
    """

    start: int
    n_bytes: int
    small: bool
    free: bool = False
    previous: "Block | None" = None
    following: "Block | None" = None


Request: TypeAlias = tuple[Block, int | None]
"""A block and the bytes it was asked for, or None where it was freed."""


@dataclass(slots=True)
class _Pool:
    """The free blocks of one pool, the smallest first, at equal size the lowest address."""

    small: bool
    end: int
    """The first address that is not mapped."""
    free: list[tuple[int, int, Block]] = field(default_factory=list)
    last: Block | None = None
    """The last block of an expandable segment."""

    def add(self, block: Block) -> None:
        block.free = True
        insort(self.free, (block.n_bytes, block.start, block))

    def remove(self, block: Block) -> None:
        at = bisect_left(self.free, (block.n_bytes, block.start), key=_size_and_start)
        assert self.free[at][2] is block
        del self.free[at]
        block.free = False

    def best_fit(self, n_bytes: int) -> Block | None:
        at = bisect_left(self.free, n_bytes, key=_size)
        if at == len(self.free):
            return None
        if self.free[at][2] is self.last and at + 1 < len(self.free):
            at += 1  # the end of an expandable segment can grow: it counts as the largest of all
        return self.free[at][2]


class CachingAllocator:
    """Hands out blocks and takes them back, as CUDA's would on one stream.

    Args:
        expandable_segments: as of PYTORCH_ALLOC_CONF: one segment a pool that grows at its end,
            by pages of 2 MiB (small pool) or 20 MiB (large pool).
    """

    def __init__(self, *, expandable_segments: bool = False) -> None:
        self._expandable = expandable_segments
        self._pools = {
            True: _Pool(small=True, end=0),
            False: _Pool(small=False, end=LARGE_POOL_START),
        }
        self.requests: list[Request] = []
        self.allocated_bytes = 0
        self.peak_allocated_bytes = 0
        self.reserved_bytes = 0

    def allocate(self, n_bytes: int) -> Block:
        """A block of at least `n_bytes`, which is one or more."""
        size = -(-n_bytes // ROUNDING_BYTES) * ROUNDING_BYTES
        pool = self._pools[size <= SMALL_REQUEST_BYTES]
        block = pool.best_fit(size)
        if block is None:
            block = self._grow(pool, size) if self._expandable else self._new_segment(pool, size)
        pool.remove(block)
        if self._is_worth_splitting(block, size):
            self._split(block, size)
        self.allocated_bytes += block.n_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self.requests.append((block, n_bytes))
        return block

    def free(self, block: Block) -> None:
        """Take a block back; it becomes one with free neighbours."""
        self.allocated_bytes -= block.n_bytes
        self.requests.append((block, None))
        pool = self._pools[block.small]
        for neighbour in (block.previous, block.following):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                self._absorb(block, neighbour)
        pool.add(block)

    def repeat(self, requests: Iterable[Request]) -> None:
        """Ask once more for what was asked before, as the next step of a training does.

        Args:
            requests: of `self.requests`. What they free without having asked for it is not theirs
                and stays.
        """
        again: dict[Block, Block] = {}
        for block, n_bytes in list(requests):
            if n_bytes is not None:
                again[block] = self.allocate(n_bytes)
            elif block in again:
                self.free(again.pop(block))

    def free_blocks(self) -> list[Block]:
        """What is reserved and not in use."""
        return [block for pool in self._pools.values() for _, _, block in pool.free]

    def _is_worth_splitting(self, block: Block, size: int) -> bool:
        left = block.n_bytes - size
        if block.small or self._expandable:
            return left >= ROUNDING_BYTES
        return left > SMALL_REQUEST_BYTES

    def _split(self, block: Block, size: int) -> None:
        rest = Block(
            start=block.start + size,
            n_bytes=block.n_bytes - size,
            small=block.small,
            previous=block,
            following=block.following,
        )
        if rest.following is not None:
            rest.following.previous = rest
        block.following, block.n_bytes = rest, size
        pool = self._pools[block.small]
        if pool.last is block:
            pool.last = rest
        pool.add(rest)

    def _absorb(self, block: Block, neighbour: Block) -> None:
        """Make `neighbour` a part of `block`, which lies beside it."""
        if neighbour is block.previous:
            block.start, block.previous = neighbour.start, neighbour.previous
            if block.previous is not None:
                block.previous.following = block
        else:
            block.following = neighbour.following
            if block.following is not None:
                block.following.previous = block
            if self._pools[block.small].last is neighbour:
                self._pools[block.small].last = block
        block.n_bytes += neighbour.n_bytes

    def _new_segment(self, pool: _Pool, size: int) -> Block:
        if pool.small:
            n_bytes = SMALL_SEGMENT_BYTES
        elif size < OWN_SEGMENT_BYTES:
            n_bytes = LARGE_SEGMENT_BYTES
        else:
            n_bytes = -(-size // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES
        block = self._map(pool, n_bytes)
        pool.add(block)
        return block

    def _grow(self, pool: _Pool, size: int) -> Block:
        """Map pages at the end of the pool's one segment until `size` fits there."""
        page = SMALL_SEGMENT_BYTES if pool.small else LARGE_SEGMENT_BYTES
        last = pool.last
        at_hand = last.n_bytes if last is not None and last.free else 0
        block = self._map(pool, -(-(size - at_hand) // page) * page)
        pool.last = block
        if last is not None:
            block.previous, last.following = last, block
            if last.free:
                pool.remove(last)
                self._absorb(block, last)
        pool.add(block)
        return block

    def _map(self, pool: _Pool, n_bytes: int) -> Block:
        block = Block(start=pool.end, n_bytes=n_bytes, small=pool.small)
        pool.end += n_bytes
        self.reserved_bytes += n_bytes
        return block


def _size(entry: tuple[int, int, Block]) -> int:
    return entry[0]


def _size_and_start(entry: tuple[int, int, Block]) -> tuple[int, int]:
    return entry[:2]
