"""Resampling beside SimpleITK's and torch's: seconds, and resident bytes beyond the input.

    pytest benchmarks/bench_resample.py --benchmark-enable

`extra_info` holds `output_bytes`, and on Linux `extra_bytes`: by how much the call raised the
resident memory of a fresh process that held the input, at its peak, the output included.
"""

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from effseg import Grid, Volume, resample_like
from effseg.types import Array

SIDE = 192
TURN = ((0.9553365, -0.2955202, 0.0), (0.2955202, 0.9553365, 0.0), (0.0, 0.0, 1.0))
SOURCE = Grid((SIDE, SIDE, SIDE))
TARGETS = {
    "finer 1.5x": SOURCE.with_spacing((2 / 3, 2 / 3, 2 / 3)),
    "coarser 2x": SOURCE.with_spacing((2.0, 2.0, 2.0)),
    "tilted": Grid(SOURCE.shape, origin=(5.0, -20.0, 30.0), direction=TURN),
}
PROCESS = Path("/proc/self")


def image() -> Array:
    return np.random.default_rng(0).standard_normal(SOURCE.shape, dtype=np.float32)


def label() -> Array:
    """Ten balls and a background."""
    steps = np.ogrid[tuple(slice(0, n) for n in SOURCE.shape)]
    array = np.zeros(SOURCE.shape, dtype=np.uint8)
    for value, centre in enumerate(np.random.default_rng(0).uniform(30, 160, (10, 3)), start=1):
        distance2 = sum((step - at) ** 2 for step, at in zip(steps, centre, strict=True))
        array[distance2 < 25**2] = value
    return array


def by_effseg(array: Array, target: Grid) -> Callable[[], Array]:
    volume = Volume(array=array, grid=SOURCE)
    return lambda: resample_like(volume, target, label=array.dtype == np.uint8).array


def by_simpleitk(array: Array, target: Grid) -> Callable[[], Array]:
    volume = SimpleITK.GetImageFromArray(array)
    resampler = SimpleITK.ResampleImageFilter()
    resampler.SetSize(target.shape[::-1])
    resampler.SetOutputSpacing(target.spacing[::-1])
    resampler.SetOutputOrigin(target.origin[::-1])
    resampler.SetOutputDirection(np.asarray(target.direction)[::-1, ::-1].ravel().tolist())
    linear = SimpleITK.sitkLabelLinear if array.dtype == np.uint8 else SimpleITK.sitkLinear
    resampler.SetInterpolator(linear)
    return lambda: SimpleITK.GetArrayViewFromImage(resampler.Execute(volume))


def by_torch(array: Array, target: Grid) -> Callable[[], Array]:
    volume = torch.from_numpy(array)[None, None]
    return lambda: torch.nn.functional.interpolate(
        volume, size=target.shape, mode="trilinear"
    ).numpy()[0, 0]


CASES = [
    (by, make, name)
    for name in TARGETS
    for make in (image, label)
    for by in (by_effseg, by_simpleitk, by_torch)
    if by is not by_torch or (make is image and name != "tilted")
]


@pytest.mark.parametrize(
    ("by", "make", "name"), CASES, ids=lambda part: part if isinstance(part, str) else part.__name__
)
def test_resample(
    benchmark: BenchmarkFixture,
    by: Callable[[Array, Grid], Callable[[], Array]],
    make: Callable[[], Array],
    name: str,
) -> None:
    benchmark.group = f"{make.__name__}, {name}, {SIDE}^3 -> {TARGETS[name].shape[0]}^3"
    result = benchmark.pedantic(by(make(), TARGETS[name]), rounds=3, warmup_rounds=1)
    assert result.shape == TARGETS[name].shape
    benchmark.extra_info["output_bytes"] = result.nbytes
    if sys.platform == "linux":
        benchmark.extra_info["extra_bytes"] = extra_bytes(by, make, name)


def extra_bytes(
    by: Callable[[Array, Grid], Callable[[], Array]], make: Callable[[], Array], name: str
) -> int:
    """What one call adds to the peak of a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_growth, (by, make, name))


def _peak_growth(
    by: Callable[[Array, Grid], Callable[[], Array]], make: Callable[[], Array], name: str
) -> int:
    call = by(make(), TARGETS[name])
    (PROCESS / "clear_refs").write_text("5")  # the peak starts again from what is resident now
    before_bytes = _resident_peak_bytes()
    result = call()
    assert result.size
    return _resident_peak_bytes() - before_bytes


def _resident_peak_bytes() -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
