"""Tiles of wide features: what fits a processor's cache, and who works on which.

Features are rows here: (batch, voxels, channels), channels innermost, as channels-last memory lies.
Wide features come in *segments*, rows of the same voxels whose channels count as concatenated.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}

SHARE = 1 << 16
"""Numbers a thread should have to work on: below it, waking it takes longer than the work."""

STRIPS = 32
"""Runs of tiles, over all samples, that keep sums of their own."""

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Tile = tuple[int, slice]
"""A sample and a range of its voxels; for `merged` rows, all samples count as one."""


def to_rows(features: Tensor) -> Tensor:
    """(batch, channels, *space) to (batch, voxels, channels); a view of channels-last features."""
    return features.movedim(1, -1).flatten(1, -2)


def from_rows(rows: Tensor, space: torch.Size) -> Tensor:
    """(batch, voxels, channels) to (batch, channels, *space) in channels-last memory; a view."""
    return rows.view(rows.shape[0], *space, rows.shape[2]).movedim(-1, 1)


def channels_last(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features in this type and in channels-last memory; they themselves where they are so."""
    return features.to(dtype).contiguous(memory_format=CHANNELS_LAST[features.ndim])


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over features of this type are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_length(n_channels: int, device: str) -> int:
    """How many voxels of so many channels fill `TILE_BYTES` in float32 on this kind of device."""
    budget = TILE_BYTES.get(device, TILE_BYTES["cuda"])
    return max(256, budget // (4 * max(n_channels, 1)) // 256 * 256)


def merged(rows: Sequence[Tensor], statistics: Tensor) -> list[Tensor]:
    """Rows whose samples share statistics as if of one sample, (1, batch * voxels, channels).

    Where a sample is small, tiles are fewer so. Rows of samples with statistics of their own stay
    as they are; and so do those whose samples do not lie one behind the other, and those on a card,
    whose tiles are large.
    """
    if (
        statistics.shape[0] == rows[0].shape[0]
        or rows[0].device.type != "cpu"
        or any(part.stride(0) != part.shape[1] * part.stride(1) for part in rows)
    ):
        return list(rows)
    return [part.view(1, -1, part.shape[2]) for part in rows]


def strips_of(segments: Sequence[Tensor], *, length: int | None = None) -> list[list[Tile]]:
    """The tiles of some features in runs, as many runs for each sample, sample by sample.

    Whoever sums over tiles keeps one sum a strip: how many there are depends on the features
    alone, so the numbers do not depend on the number of threads.

    Args:
        segments: each (batch, voxels, some of the channels).
        length: voxels of a tile; None: `tile_length` of all channels.
    """
    n_samples, n_voxels, _ = segments[0].shape
    n_channels = sum(segment.shape[2] for segment in segments)
    step = length or tile_length(n_channels, segments[0].device.type)
    n_tiles = -(-n_voxels // step)
    if length is None and n_voxels * n_channels >= 2 * SHARE:
        n_tiles += n_tiles % 2
    return _strips(n_samples, n_voxels, n_tiles, max(1, STRIPS // n_samples))


@lru_cache(1024)
def _strips(n_samples: int, n_voxels: int, n_tiles: int, n_strips: int) -> list[list[Tile]]:
    ends = [n_voxels * i // n_tiles for i in range(n_tiles + 1)]
    n_strips = min(n_strips, n_tiles)
    bounds = [n_tiles * i // n_strips for i in range(n_strips + 1)]
    return [
        [(sample, slice(ends[i], ends[i + 1])) for i in range(*bounds[strip : strip + 2])]
        for sample in range(n_samples)
        for strip in range(n_strips)
    ]


def each_tile(
    segments: Sequence[Tensor], work: Callable[[int, Tile], None], *, length: int | None = None
) -> None:
    """Call `work(index of the strip, tile)` for every tile of the strips that `strips_of` finds.

    On a CPU a strip is one thread's work from its first operator to its last. Left to torch, each
    of these short operators would be split over all threads and end in a barrier; where another
    process wants a core, ten thousand barriers a step cost a hundred times the arithmetic.
    """
    strips = strips_of(segments, length=length)
    n_threads = 1
    if segments[0].device.type == "cpu":
        n_values = sum(segment.numel() for segment in segments)
        n_threads = max(1, min(torch.get_num_threads(), len(strips), n_values // SHARE))

    inference = torch.is_inference_mode_enabled()

    def share(first: int) -> None:
        # a thread has modes of its own, and only in inference mode may its tensors be written
        with torch.inference_mode(inference), torch.no_grad():
            for index in range(first, len(strips), n_threads):
                for tile in strips[index]:
                    work(index, tile)

    if n_threads == 1:
        share(0)
    else:
        # `list` waits, and raises what a thread raised
        list(_crew(torch.get_num_threads()).map(share, range(n_threads)))


@cache
def _crew(n_threads: int) -> ThreadPoolExecutor:
    """Threads in which torch's operators do not split up further."""
    crew = ThreadPoolExecutor(n_threads, "effseg", initializer=partial(torch.set_num_threads, 1))
    list(crew.map(lambda _: None, range(n_threads)))
    crew.submit(_be_known_to_openmp).result()
    torch.set_num_threads(n_threads)  # the threads' own setting also became that of later threads
    return crew


def _be_known_to_openmp() -> None:
    """Let OpenMP know of a thread that is not its own, in that thread.

    Its threads spin for milliseconds after each of torch's convolutions, and take a core from the
    crew, unless it knows of more threads than there are cores: then, for microseconds. It learns of
    a thread when that opens a parallel region.
    """
    torch.set_num_threads(2)
    torch.zeros(1 << 17, device="cpu").add_(1)  # enough to be split
    torch.set_num_threads(1)


def row_of(statistics: Tensor, tile: Tile) -> Tensor:
    """The statistics of a tile's sample; batch norm has one row for all of them."""
    return statistics[tile[0] if statistics.shape[0] > 1 else 0]


def by_row(sums: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums of each strip, (2, strips, channels), to two of each row of statistics."""
    n_rows, n_channels = statistics.shape
    one, other = sums.view(2, n_rows, -1, n_channels).sum(2)
    return one.clone(), other.clone()  # an operator's results may not share memory
