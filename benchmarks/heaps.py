"""Freed memory given back or kept: what it takes, and seconds.

    python benchmarks/heaps.py

Each network of the tuning suite trains on patches of 64^3 voxels, and ours of size b1 labels
windows of 64^3 to 128^3, on each heap in turn, each in a process of its own. The tensors are the
same on either, so what one takes over the other is what lies free in it. Adds to
benchmarks/results/heaps.csv what is not there; `KEPT_USUAL` and `KEPT_WORST` are from it.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from bench_inference import fresh
from pydantic import TypeAdapter
from result_rows import append_rows
from torch import nn
from tuning_cases import MIB, NETWORKS, Taken, load_kernels, run

from effseg.devices import AUTOCAST, Precision
from effseg.memory import PeakResident, heap_of
from effseg.plans import Heap
from effseg.types import Shape3

RESULTS = Path(__file__).parent / "results" / "heaps.csv"
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
TRAINED_SIDE, PREDICTED_SIDES = 64, (64, 96, 128)
HEAPS: tuple[Heap, ...] = ("mapped", "kept")
BATCH = 2
MOST_STEPS, MOST_SECONDS = 12, 6.0
N_PASSES = 24
"""What lies free grows over the first passes."""


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        network: its name.
        work: what it does.
        side: voxels of a patch along each axis.
        precision: of the step or the pass.
        heap: what becomes of freed memory.
    """

    network: str
    work: Literal["train", "predict"]
    side: int
    precision: Precision
    heap: Heap


@dataclass(frozen=True)
class Row(Job):
    """What it took.

    Attributes:
        peak_mib: resident, above what the process held after its imports.
        seconds: of a step or a pass, the median.
    """

    peak_mib: int
    seconds: float

    @property
    def job(self) -> Job:
        """What was measured."""
        return Job(self.network, self.work, self.side, self.precision, self.heap)


@dataclass(frozen=True)
class AsGiven:
    """A training that nobody tuned, in the tuning suite's terms."""

    patch: Shape3
    precision: Precision
    heap: Heap
    batch: int = BATCH

    def prepare(self, network: nn.Module) -> None:
        """Nothing is recomputed."""

    def running(self) -> AbstractContextManager[object]:
        """On its heap."""
        return heap_of(self.heap)


def main() -> None:
    """Measure what is missing, and say what keeping takes and saves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    done = {row.job for row in known()}
    for job in jobs(parser.parse_args().networks):
        if job not in done:
            add(job)
    print(worst(known()))


def known() -> list[Row]:
    """What the table has."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return TypeAdapter(list[Row]).validate_python(list(csv.DictReader(file)))


def add(job: Job) -> None:
    """Measure, and add a row to the table."""
    taken: Taken = fresh(passes if job.work == "predict" else trained, job)
    seconds = round(statistics.median(taken.seconds), 4)
    row = Row(**asdict(job), peak_mib=round(taken.peak_bytes / MIB), seconds=seconds)
    print(row, flush=True)
    append_rows(RESULTS, [asdict(row)])


def jobs(networks: Iterable[str]) -> Iterator[Job]:
    """Predictions, then trainings; the heaps of one case one after the other."""
    for side, precision, heap in product(PREDICTED_SIDES, PRECISIONS, HEAPS):
        yield Job("effseg-b1", "predict", side, precision, heap)
    for name, precision, heap in product(networks, PRECISIONS, HEAPS):
        yield Job(name, "train", TRAINED_SIDE, precision, heap)


def trained(job: Job) -> Taken:
    """Some steps."""
    as_given = AsGiven((job.side,) * 3, job.precision, job.heap)
    return run(job.network, as_given, most_steps=MOST_STEPS, most_seconds=MOST_SECONDS)


def passes(job: Job) -> Taken:
    """Some windows, one at a time."""
    with heap_of(job.heap):
        load_kernels()
        resident = PeakResident().start()
        network, dtype = NETWORKS[job.network]().network, AUTOCAST[job.precision]
        window = torch.randn(1, 1, *(job.side,) * 3)
        network.eval()
        seconds = []
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            for _ in range(N_PASSES):
                started = time.perf_counter()
                network(window)
                seconds.append(time.perf_counter() - started)
        return Taken(resident.stop(), tuple(seconds))


def worst(rows: Iterable[Row]) -> str:
    """The most that keeping takes over giving back, and the least and the most that it saves."""
    by_job = {row.job: row for row in rows}
    lines = []
    for work in ("predict", "train"):
        pairs = [
            (kept, by_job[replace(job, heap="mapped")])
            for job, kept in by_job.items()
            if job.heap == "kept" and job.work == work
        ]
        more = [kept.peak_mib / mapped.peak_mib for kept, mapped in pairs]
        faster = [mapped.seconds / kept.seconds for kept, mapped in pairs]
        lines.append(
            f"{work}: kept takes {min(more):.2f} to {max(more):.2f} times as much as mapped "
            f"(median {statistics.median(more):.2f}), and is {min(faster):.2f} to "
            f"{max(faster):.2f} times as fast (median {statistics.median(faster):.2f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
