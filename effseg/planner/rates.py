"""How fast a machine computes and moves: what turns the work of a step into seconds."""

import json
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from effseg.devices import AUTOCAST, DeviceKind, Precision
from effseg.errors import DataError
from effseg.files import write_text_whole
from effseg.memory import Work
from effseg.plans import Config

ROUNDS = 5
VECTOR_BYTES = 2**25
"""Of each operand when memory is timed: past every cache."""


class Rates(Config):
    """What a device does in a second.

    Attributes:
        flops: of convolutions, forward and backward.
        bytes: read and written by operators that compute little.
        operators: that can be called at all.
        why: where the numbers come from.
    """

    flops: float
    bytes: float
    operators: float
    why: str

    def seconds(self, work: Work) -> float:
        """What this work takes: arithmetic, memory traffic and calls, one after the other."""
        return (
            work.flops / self.flops
            + work.moved_bytes / self.bytes
            + work.n_operators / self.operators
        )


def nominal_rates(device: DeviceKind) -> Rates:
    """Round numbers that do not depend on what else a machine is doing: plans are bound by them."""
    if device == "cuda":
        return ABSENT_CARD
    n = torch.get_num_threads()
    return Rates(flops=n * 60e9, bytes=n * 5e9, operators=4e5, why=f"{n} threads, nominally")


ABSENT_CARD = Rates(
    flops=60e12, bytes=1.2e12, operators=1e5, why="an A100's, roughly: there is no card here"
)
"""In bfloat16. Its data sheet says 312 TFLOP/s and 1.6 TB/s, of which 3-D networks see a part; such
seconds rank candidates, no more."""
CPUINFO = Path("/proc/cpuinfo")


def machine_rates(device: DeviceKind, precision: Precision) -> Rates:
    """The rates of this machine: the best that were ever measured on it.

    They are measured when a process first asks, in less than a second, and the best are kept in
    `~/.cache/effseg/rates.json` by processor, number of threads, torch and
    precision: a machine that was busy once is not called slow for ever.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return ABSENT_CARD
    return _best_ever(device, precision)


@cache
def _best_ever(device: DeviceKind, precision: Precision) -> Rates:
    key = ", ".join((_processor(device), precision, f"torch {torch.__version__}"))
    path = _cache() / "rates.json"
    known, now = _remembered(path), _measured(device, precision)
    if key in known:
        before = known[key]
        now = Rates(
            flops=max(now.flops, before.flops),
            bytes=max(now.bytes, before.bytes),
            operators=max(now.operators, before.operators),
            why=now.why,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        everything = known | {key: now}
        content = {name: one.model_dump() for name, one in everything.items()}
        write_text_whole(path, json.dumps(content, indent=2) + "\n")
    except (OSError, DataError):
        pass  # a home that cannot be written: what was measured now must do
    return now


def _cache() -> Path:
    return Path.home() / ".cache" / "effseg"


def _remembered(path: Path) -> dict[str, Rates]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: Rates.model_validate(one) for name, one in content.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _processor(device: DeviceKind) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _measured(device: DeviceKind, precision: Precision) -> Rates:
    n_bytes = 3 * VECTOR_BYTES
    a, b, c = (torch.ones(VECTOR_BYTES // 4, device=device) for _ in range(3))
    small = torch.ones(8, device=device)
    dtype = AUTOCAST[precision] or torch.float32
    conv = torch.nn.Conv3d(32, 32, 3, padding=1).to(device, dtype)
    image = torch.ones(2, 32, 24, 24, 24, device=device, dtype=dtype, requires_grad=True)
    flops = 3 * 2 * 2 * 24**3 * conv.weight.numel()

    def convolve() -> None:
        out = conv(image)
        out.backward(torch.ones_like(out))

    def call_often() -> None:
        for _ in range(1000):
            small.add_(1)

    return Rates(
        flops=flops / _best_seconds(convolve, device),
        bytes=n_bytes / _best_seconds(lambda: torch.add(a, b, out=c), device),
        operators=1000 / _best_seconds(call_often, device),
        why="measured on this machine",
    )


def _best_seconds(fn: Callable[[], object], device: DeviceKind) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):  # the first one loads what is loaded once
        start = time.perf_counter()
        fn()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
