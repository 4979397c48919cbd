"""Components slab by slab beside those of the whole label map: seconds, and bytes beyond it.

    pytest benchmarks/bench_components.py --benchmark-enable

`extra_info` holds `mvoxels_per_s`, `ratio_to_cc3d` (seconds, over those of cc3d alone on the
whole), `extra_bytes` (numpy's peak during the call, what is returned included) and for a stream
`stored_bytes`, what it keeps of the voxels until it cleans them. One thread does everything.
"""

import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache

import cc3d
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from effseg.plans import PostprocessConfig
from effseg.postprocess import ComponentStream, remove_components
from effseg.types import Array

SHAPE = (160, 384, 384)
THICKNESS = 16
RULE = PostprocessConfig(minimum_mm3=30.0, fraction_of_largest=0.01)


def nodules() -> Array:
    return balls(n=40, smallest=2, largest=12, n_labels=1)


def organs() -> Array:
    return balls(n=60, smallest=15, largest=70, n_labels=25)


def specks() -> Array:
    """A threshold on noise: one voxel in fifty."""
    return (np.random.default_rng(0).random(SHAPE, dtype=np.float32) < 0.02).astype(np.uint8)


def balls(*, n: int, smallest: int, largest: int, n_labels: int) -> Array:
    rng = np.random.default_rng(0)
    labels = np.zeros(SHAPE, np.uint8)
    for i in range(n):
        radius = rng.uniform(smallest, largest)
        centre = [rng.uniform(0, length) for length in SHAPE]
        box = tuple(
            slice(max(0, int(at - radius)), min(length, int(at + radius) + 2))
            for at, length in zip(centre, SHAPE, strict=True)
        )
        steps = np.ogrid[box]
        distance2 = sum((step - at) ** 2 for step, at in zip(steps, centre, strict=True))
        labels[box][distance2 < radius**2] = i % n_labels + 1
    return labels


def by_cc3d(labels: Array) -> int:
    """Numbers alone: nothing measured, nothing removed."""
    cc3d.connected_components(labels, connectivity=26)
    return 0


def by_whole(labels: Array) -> int:
    remove_components(labels, 1.0, RULE)
    return 0


def by_stream(labels: Array) -> int:
    """Numbers, statistics, rules and cleaned slabs."""
    with ComponentStream(1.0, RULE) as stream:
        for slab in slabs(labels):
            stream.add(slab)
        stream.finish()
        for _ in stream.cleaned():
            pass
        return stream.stored_bytes


def slabs(labels: Array) -> Iterator[Array]:
    for start in range(0, len(labels), THICKNESS):
        yield labels[start : start + THICKNESS]


@cache
def best_seconds(by: Callable[[Array], int], make: Callable[[], Array]) -> float:
    """Of five calls; a first one loads what is loaded once."""
    labels = make()
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        by(labels)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@pytest.mark.parametrize("make", [nodules, organs, specks], ids=lambda make: make.__name__)
@pytest.mark.parametrize("by", [by_cc3d, by_whole, by_stream], ids=lambda by: by.__name__)
def test_components(
    benchmark: BenchmarkFixture, by: Callable[[Array], int], make: Callable[[], Array]
) -> None:
    labels = make()
    benchmark.group = f"{make.__name__}, {(labels > 0).mean():.1%} foreground"
    stored_bytes = benchmark.pedantic(by, (labels,), rounds=4, warmup_rounds=1)
    tracemalloc.start()
    by(labels)
    benchmark.extra_info["extra_bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if stored_bytes:
        benchmark.extra_info["stored_bytes"] = stored_bytes
    if benchmark.enabled:
        seconds = benchmark.stats.stats.min
        benchmark.extra_info["mvoxels_per_s"] = round(labels.size / seconds / 1e6)
        benchmark.extra_info["ratio_to_cc3d"] = round(seconds / best_seconds(by_cc3d, make), 2)
