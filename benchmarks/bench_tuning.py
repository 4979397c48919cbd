"""What tuning promises and keeps: twelve networks under three budgets each, and beside others.

    effseg benchmark --suite tuning
    pytest benchmarks/bench_tuning.py --benchmark-enable -k SegResNet --steps 200 --budgets 1GiB

For each network and budget: `effseg.tune`, and in a fresh process the training that it found, AdamW
on Dice plus cross-entropy of noise, for 200 steps or a minute, whichever is over first. `value` is
how far the predicted peak is from the measured one, resident memory above what the process held
after its imports. Then the worst of them all, and at 8 GiB by CUDA's rules the voxels of our
largest patch over those of others'; seconds a voxel are run side by side on this machine.

A row is written into `benchmarks/results/tuning.csv` as soon as it is known and takes the place of
the one that was there, so that a long run may be made in parts; the worst of all are those of that
file, and stand with the ratios in `tuning_goals.csv`.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
from bench_inference import Row as Goal
from bench_inference import fresh, write_rows
from made_up_facts import made_up_facts
from memory_cases import OTHERS
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from tuning_cases import (
    MIB,
    NETWORKS,
    Found,
    Taken,
    device_bytes_on_cuda,
    largest_patch,
    n_parameters,
    plain_conv_unet,
    planned_step_seconds,
    run,
    search,
    step_seconds,
    usual_budgets,
)
from tuning_results import WORST, Row, put_row, read_rows, rounded

import effseg
from effseg.plans import Plan, format_shape
from effseg.types import Shape3

RESULTS = Path(__file__).parent / "results"
ROWS, GOALS = "tuning.csv", "tuning_goals.csv"
QUICK_STEPS = 5
CARD_BYTES = 8 * 2**30
CARD_CASE = 512
"""Voxels along each axis of the case whose largest patch is looked for."""
SIDE, BATCH = 64, 2
"""Of the patch on which seconds are compared."""
ROUNDS, ROUND_STEPS = 3, 2
"""How often each network's turn comes, and steps of a turn."""


def tuned_row(name: str, budget_bytes: int, *, most_steps: int, most_seconds: float) -> Row:
    """Tune a network for a budget, and train it so."""
    found: Found = fresh(search, name, budget_bytes)
    row = Row(
        network=name,
        budget_mib=budget_bytes / MIB,
        n_parameters=n_parameters(name),
        search_seconds=rounded(found.seconds),
        search_mib=rounded(found.grown_bytes / MIB),
        refusal=found.refusal,
    )
    tuning = found.tuning
    if tuning is None:
        return row
    taken: Taken = fresh(
        partial(run, name, tuning, most_steps=most_steps, most_seconds=most_seconds)
    )
    return replace(
        row,
        patch=format_shape(tuning.patch),
        batch=tuning.batch,
        policies=sum(policy != "keep" for policy in tuning.policies.values()),
        precision=tuning.precision,
        heap=tuning.heap,
        predicted_mib=rounded(tuning.peak_bytes / MIB),
        measured_mib=rounded(taken.peak_bytes / MIB),
        error_percent=rounded(100 * (tuning.peak_bytes / taken.peak_bytes - 1)),
        used_percent=rounded(100 * taken.peak_bytes / budget_bytes),
        over=taken.peak_bytes > budget_bytes,
        step_seconds=rounded(statistics.median(taken.seconds)),
        steps=len(taken.seconds),
    )


@cache
def flagship_on_card() -> Plan:
    """The plan of the flagship for the card."""
    return effseg.plan(made_up_facts(CARD_CASE), memory=CARD_BYTES, device="cuda", size="b0")


def voxels_over(build: Callable[[], nn.Module], multiple: int, *, at_least: float) -> Goal:
    """Of our largest patch over another network's, which runs as its project runs it."""
    theirs = largest_patch(
        lambda patch: device_bytes_on_cuda(build, patch, BATCH),
        CARD_BYTES,
        multiple=multiple,
        most=CARD_CASE,
    )
    plan = flagship_on_card()
    mine: Shape3 = plan.patch_size
    note = f"{format_shape(mine)}, batch {plan.batch_size}, over {format_shape(theirs)}"
    return Goal(math.prod(mine) / math.prod(theirs), "x", at_least=at_least, note=note)


def time_over(build: Callable[[], nn.Module], *, at_most: float) -> Goal:
    """Seconds a voxel over another network's, on an equal patch, in turns; ours as on the card."""
    patch = (SIDE,) * 3
    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(ROUNDS):
        for seconds, steps in (
            (mine, partial(planned_step_seconds, flagship_on_card())),
            (theirs, partial(step_seconds, build)),
        ):
            seconds += fresh(partial(steps, patch=patch, batch=BATCH, n_steps=ROUND_STEPS))
    ours_median, theirs_median = statistics.median(mine), statistics.median(theirs)
    note = f"theirs {theirs_median:.2f} s; {BATCH} of {format_shape(patch)}"
    return Goal(ours_median / theirs_median, "x", at_most, seconds=ours_median, note=note)


BESIDE: dict[str, Callable[[], Goal]] = {
    "voxels at 8 GiB over PlainConvUNet's": partial(voxels_over, plain_conv_unet, 32, at_least=4),
    "voxels at 8 GiB over SegResNet's": partial(
        voxels_over, OTHERS["MONAI-SegResNet"], 8, at_least=3
    ),
    "seconds a voxel over PlainConvUNet's": partial(time_over, plain_conv_unet, at_most=1.3),
}


@pytest.fixture(scope="module")
def goals(request: pytest.FixtureRequest) -> Iterator[dict[str, Goal]]:
    """What was found but the rows, by name; written down in the end, if nothing is missing."""
    found: dict[str, Goal] = {}
    yield found
    if found.keys() == {*BESIDE, *WORST} and request.config.getoption("benchmark_enable"):
        write_rows(found, RESULTS / GOALS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each network under each budget."""
    if "budget" not in metafunc.fixturenames:
        return
    told = metafunc.config.getoption("budgets")
    cases = [(name, budget) for name in NETWORKS for budget in told or usual_budgets(name)]
    metafunc.parametrize(
        ("name", "budget"), cases, ids=[f"{name}-{budget // MIB}MiB" for name, budget in cases]
    )


def test_tuned(
    benchmark: BenchmarkFixture, name: str, budget: int, request: pytest.FixtureRequest
) -> None:
    """A network under a budget."""
    option = request.config.getoption
    measuring = option("benchmark_enable")
    row = benchmark.pedantic(
        tuned_row,
        args=(name, budget),
        kwargs={
            "most_steps": option("steps") if measuring else QUICK_STEPS,
            "most_seconds": option("step_seconds"),
        },
    )
    benchmark.extra_info |= row.goal().cells()
    if measuring:
        put_row(row, RESULTS / ROWS)


@pytest.mark.parametrize("name", WORST)
def test_worst(benchmark: BenchmarkFixture, name: str, goals: dict[str, Goal]) -> None:
    """The worst of the rows that were written."""
    rows = read_rows(RESULTS / ROWS)
    if not rows:
        pytest.skip(f"{RESULTS / ROWS} has no rows yet")
    goals[name] = benchmark.pedantic(WORST[name], args=(rows,))
    benchmark.extra_info |= goals[name].cells()


@pytest.mark.parametrize("name", BESIDE)
def test_beside(benchmark: BenchmarkFixture, name: str, goals: dict[str, Goal]) -> None:
    """Ours and another's."""
    goals[name] = benchmark.pedantic(BESIDE[name])
    benchmark.extra_info |= goals[name].cells()
