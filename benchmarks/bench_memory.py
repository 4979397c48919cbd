"""A training step under each memory scheme: bytes beside seconds.

    effseg benchmark --suite memory

Bytes at 128^3 in bfloat16 are traced by CUDA's rules, nothing allocated: `peak_gib` is all that
lives at once, `saved_gib` what is kept from forward to backward. `peak_u` and `saved_u` are the
same of one dense block in float32, in units of one channel's bytes. Seconds, and the bytes measured
beside them, are of a size that this device runs in seconds; `ratio` is to the same network's plain
step. What torch.compile allocates inside its kernels, only CUDA's allocator sees.

A complete run leaves its rows and a plot in `benchmarks/results`.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from memory_cases import CASES, FULL_SIDE, Case, why_not
from memory_results import Row, write_results
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.optim import AdamW

from effseg.losses import CompoundLoss
from effseg.memory import MemoryReport, measure_peak, trace_peak
from effseg.memory.trace import mean_of_outputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDES = {"cpu": {"dense": 24, "whole": 64}, "cuda": {"dense": FULL_SIDE, "whole": FULL_SIDE}}
"""Voxels along each axis of the patch that is run."""
AUTOCAST = {"cpu": None, "cuda": torch.bfloat16}
"""In which precision it is run."""
CPU_BATCH = 2
"""With one sample, torch's CPU convolutions of small inputs take another, slower way. A CUDA device
runs what is traced."""
ROUNDS = 3
GIB, MIB = 2**30, 2**20


def timed_size(case: Case) -> tuple[int, int]:
    """Samples and voxels along each axis that are run."""
    n = CPU_BATCH if DEVICE.type == "cpu" else case.batch
    return n, SIDES[DEVICE.type][case.size]


class Clock:
    """A clock that stands still but for what it is told has passed.

    pytest-benchmark times one benchmark after the other. On a machine that does other work a ratio
    needs rounds that take turns, so they do, and this clock tells it afterwards how long each took.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self) -> float:
        """The time."""
        return self.seconds

    def advance(self, rounds: Iterator[float]) -> None:
        """Let the next round pass."""
        self.seconds += next(rounds)


CLOCK = Clock()


@dataclass
class Outcome:
    """What running a case gave.

    Attributes:
        seconds: of each round.
        peak_bytes: measured; None where nothing here can.
        saved_bytes: likewise.
        problem: why it could not run; None where it could.
    """

    seconds: list[float]
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    problem: str | None = None


class Step:
    """A training step of a case that can be run again and again."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.others_bytes = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        self.case = case
        n, side = timed_size(case)
        self.shape = (n, 1, side, side, side)
        self.network = case.build().to(DEVICE)
        self.batch = torch.randn(self.shape, device=DEVICE)
        labels = (n, side, side, side)
        self.labels = torch.randint(0, 2, labels, device=DEVICE, dtype=torch.uint8)
        self.loss = CompoundLoss()
        self.optimizer = None if case.block else AdamW(self.network.parameters(), lr=1e-3)
        if case.compiled:
            self.network.compile()

    def __call__(self) -> None:
        """Take it; gradients add to those that are there."""
        self._loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def clear(self) -> None:
        """Drop the gradients; the next step makes its own, as it would without this one."""
        self.network.zero_grad()
        gc.collect()

    def seconds(self) -> float:
        """How long one takes."""
        _wait()
        start = time.perf_counter()
        self()
        _wait()
        return time.perf_counter() - start

    def warm_up(self) -> None:
        """Take the step that compiles and makes the optimizer's state."""
        with ExitStack() as stack:
            if self.case.compiled:
                stack.enter_context(
                    torch._functorch.config.patch(activation_memory_budget=self.case.budget)
                )
            self()

    def measured(self) -> tuple[int | None, int]:
        """Peak and saved bytes of one; what other cases hold on the device is none of its own."""
        self.clear()
        if not self.case.compiled:
            # a process's first count also holds what the first operator under it loads
            measure_peak(lambda: torch.zeros(1))
            report = measure_peak(self)
            return report.peak_bytes - self.others_bytes, report.saved_bytes
        loss = self._loss()
        saved = _kept_bytes(loss, besides=[*self.network.parameters(), self.batch, self.labels])
        del loss
        if DEVICE.type == "cpu":
            return None, saved
        torch.cuda.reset_peak_memory_stats()
        self()
        return torch.cuda.max_memory_allocated() - self.others_bytes, saved

    def _loss(self) -> Tensor:
        dtype = AUTOCAST[DEVICE.type]
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not None):
            # the output has no name, so that it lives no longer than it is needed
            if self.case.block:
                return mean_of_outputs(self.network(self.batch))
            return self.loss(self.network(self.batch), self.labels)


@cache
def run(network: str) -> dict[str, Outcome]:
    """Run a network's cases in turns, by scheme."""
    torch._dynamo.reset()  # it keeps only so many compilations of one piece of code
    outcomes: dict[str, Outcome] = {}
    steps: dict[str, Step] = {}
    for case in CASES[network]:
        outcome = outcomes[case.scheme] = Outcome([], problem=why_not(case))
        if outcome.problem is not None:
            continue
        try:
            step = Step(case)
            step.warm_up()
            outcome.peak_bytes, outcome.saved_bytes = step.measured()
            step.clear()
        except torch.OutOfMemoryError:
            outcome.problem = f"out of memory at {timed_size(case)[1]}^3"
        else:
            steps[case.scheme] = step
    for _ in range(ROUNDS if len(CASES[network]) > 1 else 1):
        for scheme, step in steps.items():
            outcomes[scheme].seconds.append(step.seconds())
            step.clear()
    return outcomes


def traced(
    case: Case,
    *,
    side: int = FULL_SIDE,
    batch: int | None = None,
    autocast: torch.dtype | None = torch.bfloat16,
    device: Any = "cuda",
) -> MemoryReport:
    """Trace a case's training step."""
    batch = case.batch if batch is None else batch
    whole: dict[str, Any] = {
        "loss": CompoundLoss(),
        "label_shape": (batch, side, side, side),
        "label_dtype": torch.uint8,
        "optimizer": partial(AdamW, lr=1e-3),
    }
    return trace_peak(
        case.build(),
        (batch, 1, side, side, side),
        autocast=autocast,
        device=device,
        **({} if case.block else whole),
    )


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """What was found, case by case; written down in the end, if nothing is missing."""
    found: list[Row] = []
    yield found
    n_wanted = sum(why_not(case) is None for cases in CASES.values() for case in cases)
    if len(found) == n_wanted and request.config.getoption("benchmark_enable"):
        write_results(found, device=DEVICE)


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(
    "case", [case for cases in CASES.values() for case in cases], ids=lambda case: case.name
)
def test_step(benchmark: BenchmarkFixture, case: Case, rows: list[Row]) -> None:
    """A training step: network, loss, gradients, optimizer."""
    outcomes = run(case.network)
    outcome, plain = outcomes[case.scheme], outcomes[CASES[case.network][0].scheme]
    if outcome.problem is not None:
        pytest.skip(outcome.problem)
    row = Row(network=case.network, scheme=case.scheme, n_parameters=n_parameters(case.build()))
    row.seconds = statistics.median(outcome.seconds)
    row.batch, row.side = timed_size(case)
    row.ratio = row.seconds / statistics.median(plain.seconds) if plain.seconds else None
    row.measured_mib = None if outcome.peak_bytes is None else outcome.peak_bytes / MIB
    if not case.compiled:
        if DEVICE.type == "cpu":
            report = traced(case, side=row.side, batch=row.batch, autocast=None, device="cpu")
            assert (report.peak_bytes, report.saved_bytes) == (
                outcome.peak_bytes,
                outcome.saved_bytes,
            )
        full = traced(case)
        row.traced_batch = case.batch
        row.peak_gib, row.saved_gib = full.peak_bytes / GIB, full.saved_bytes / GIB
        if case.block:
            full, unit = traced(case, autocast=None), 4 * FULL_SIDE**3
            row.peak_u, row.saved_u = full.peak_bytes / unit, full.saved_bytes / unit
    elif case.block and outcome.saved_bytes is not None:
        unit = (4 if AUTOCAST[DEVICE.type] is None else 2) * row.batch * row.side**3
        row.saved_u = outcome.saved_bytes / unit
    benchmark.extra_info |= row.counted()
    rows.append(row)
    benchmark.pedantic(CLOCK.advance, args=(iter(outcome.seconds),), rounds=len(outcome.seconds))


def n_parameters(network: nn.Module) -> int:
    """How many numbers a network learns."""
    return sum(parameter.numel() for parameter in network.parameters())


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _kept_bytes(loss: Tensor, *, besides: list[Tensor]) -> int:
    """Bytes that the graph behind a loss keeps for backward, each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: dict[int, int] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for tensor in _saved_by(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        nodes += [following for following, _ in node.next_functions]
    return sum(kept.values())


def _saved_by(node: Any) -> list[Tensor]:
    values: list[Any] = list(getattr(node, "saved_tensors", ()))
    values += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    return [value for value in values if isinstance(value, Tensor)]
