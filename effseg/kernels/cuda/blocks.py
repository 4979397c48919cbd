"""How work is cut for a card: blocks, and runs of blocks with partial sums of their own.

Nothing here looks at the card, nor needs Triton. How a sum is cut depends on the features' shape
alone, and partial sums are added in one order, so a step gives the same numbers each time and on
every card.
"""

import math
from typing import NamedTuple

PROGRAMS = 512
"""As many fill the largest card of today: 132 multiprocessors, two to four programs on each."""

PARTIAL_BYTES = 8 << 20
"""Of a weight's partial gradients, where the gradient itself takes no more."""

LARGEST_CHANNELS = 64
LARGEST_OUTPUTS = 128
"""Of a matrix product. Where there are more, backward reads the features once more."""
LARGEST_CLASSES = 128
"""There is no kernel for more: a block of voxels has its logits in registers."""

VALUES = 4096
"""Of a block that is read, changed and written without a matrix product."""


class Cut(NamedTuple):
    """Blocks of voxels and channels; the voxels' in runs, each with partial sums of its own.

    Attributes:
        block_v: voxels of a block.
        block_c: channels of a block.
        n_blocks_c: blocks that hold the channels.
        n_runs: of each sample's voxels; none is empty.
        run_length: blocks of a run; the last may have fewer.
    """

    block_v: int
    block_c: int
    n_blocks_c: int
    n_runs: int
    run_length: int


def n_of(n_values: int, block: int) -> int:
    """Blocks that hold so many values."""
    return -(-n_values // block)


def block_of(n_values: int, largest: int) -> int:
    """A power of two that holds the values, at most `largest`; 16 at least, for matrix products."""
    return min(largest, max(16, 1 << (n_values - 1).bit_length()))


def unit_of(*lengths: int) -> int:
    """What all of these are multiples of, at most 8: so many values are read at once.

    Kernels take lengths in this unit, a constant to them, and so know how rows are aligned.
    """
    return math.gcd(8, *lengths)


def _cut(block_v: int, n_voxels: int, n_channels: int, n_runs: int) -> Cut:
    """With about as many runs as wanted, at most one a block."""
    block_c = block_of(n_channels, LARGEST_CHANNELS)
    n_blocks = n_of(n_voxels, block_v)
    length = n_of(n_blocks, max(1, n_runs))
    return Cut(block_v, block_c, n_of(n_channels, block_c), n_of(n_blocks, length), length)


def cut_rows(n_samples: int, n_voxels: int, n_channels: int) -> Cut:
    """For an operator without matrix products, a sample at a time."""
    block_c = block_of(n_channels, LARGEST_CHANNELS)
    n_programs = n_samples * n_of(n_channels, block_c)
    return _cut(VALUES // block_c, n_voxels, n_channels, PROGRAMS // n_programs)


def cut_backward(n_voxels: int, n_channels: int, n_outputs: int) -> Cut:
    """For the backward of a matrix product; a run takes its share of every sample.

    A block of more voxels or channels needs more registers than there are.
    """
    n_programs = n_of(n_channels, block_of(n_channels, LARGEST_CHANNELS))
    n_programs *= n_of(n_outputs, LARGEST_OUTPUTS)
    partial = 4 * n_outputs * n_channels
    return _cut(32, n_voxels, n_channels, min(PROGRAMS // n_programs, PARTIAL_BYTES // partial))


def cut_head(n_samples: int, n_voxels: int, n_channels: int, n_classes: int) -> Cut:
    """For the sums of a head's logits and their backward, a sample at a time."""
    n_programs = n_samples * n_of(n_channels, block_of(n_channels, LARGEST_CHANNELS))
    partial = 4 * n_classes * n_channels * n_samples
    return _cut(64, n_voxels, n_channels, min(PROGRAMS // n_programs, PARTIAL_BYTES // partial))
