"""How far a traced training step is from the real one on a CUDA card, in bytes.

    python benchmarks/cuda_trace.py [--out FILE]

Traces each of `CONFIGURATIONS` on no memory, runs two steps of it on the card, each configuration
in a process of its own, and writes a table of traced beside measured bytes: allocated, reserved,
and what the card holds. Nothing else may run on the card meanwhile. Ends with the median and the
worst error of each; without a card it says so and exits with 3.
"""

import argparse
import csv
import functools
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from monai.networks import nets
from torch import Tensor, nn

from effseg.files import written_whole
from effseg.memory import CudaCard, MemoryReport, measure_peak, trace_peak
from effseg.networks import MemoryMode, build_network
from effseg.plans import NetworkConfig
from effseg.types import Shape3

RESULTS = Path(__file__).parent / "results" / "cuda_trace.csv"
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-3)
N_CLASSES = 3
MEASURES = ("allocated", "reserved", "device")
NO_CARD = 3


def dense_unet(
    encoder: tuple[int, ...], growth: int, stem: int, memory: MemoryMode
) -> Callable[[], nn.Module]:
    """A dense U-Net whose decoder is as deep as its encoder, all stages but the first strided."""
    n_stages = len(encoder)
    config = NetworkConfig(
        in_channels=1,
        out_channels=N_CLASSES,
        stem_channels=stem,
        growth_rate=growth,
        encoder_layers=encoder,
        decoder_layers=encoder[:-1],
        strides=((1, 1, 1), *((2, 2, 2),) * (n_stages - 1)),
        kernels=((3, 3, 3),) * n_stages,
        norm="batch",
        act="relu",
        memory=memory,
    )
    return functools.partial(build_network, config)


def dyn_unet() -> nn.Module:
    """As nnU-Net would plan it for 64 voxels a side."""
    strides = [1, 2, 2, 2, 2]
    return nets.DynUNet(
        3, 1, N_CLASSES, [3] * 5, strides, strides[1:], filters=[32, 64, 128, 256, 320]
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DenseUNet-plain": dense_unet((3, 4, 6), 8, 16, "plain"),
    "DenseUNet-shared": dense_unet((3, 4, 6), 8, 16, "shared"),
    "R1-checkpoint": dense_unet((4, 4, 4, 4), 16, 32, "checkpoint"),
    "R1-shared": dense_unet((4, 4, 4, 4), 16, 32, "shared"),
    "SegResNet": functools.partial(nets.SegResNet, 3, 16, 1, N_CLASSES),
    "DynUNet": dyn_unet,
    "BasicUNet": functools.partial(nets.BasicUNet, 3, 1, N_CLASSES),
    "UNet": functools.partial(
        nets.UNet, 3, 1, N_CLASSES, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2
    ),
}


@dataclass(frozen=True)
class Configuration:
    """One training step: a network of `NETWORKS`, its patch, and its type of `DTYPES`."""

    network: str
    patch: Shape3
    batch: int
    dtype: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the whole batch."""
        return (self.batch, 1, *self.patch)

    def build(self) -> nn.Module:
        """The network, fresh."""
        return NETWORKS[self.network]()

    def __str__(self) -> str:
        patch = "x".join(map(str, self.patch))
        return f"{self.network} {self.batch}x{patch} {self.dtype}"


CONFIGURATIONS = (
    *(Configuration(name, (64, 64, 64), 2, dtype) for name in NETWORKS for dtype in DTYPES),
    *(Configuration(name, (32, 32, 32), 2, "fp32") for name in NETWORKS),
    *(Configuration(name, (96, 96, 96), 1, "bf16") for name in NETWORKS),
    *(Configuration(name, (128, 128, 128), 1, "bf16") for name in NETWORKS),
    Configuration("DynUNet", (128, 128, 128), 1, "fp32"),
    Configuration("DenseUNet-shared", (128, 128, 128), 1, "fp32"),
    Configuration("SegResNet", (40, 96, 80), 3, "fp16"),
)


@dataclass(frozen=True)
class Row:
    """A line of the table; bytes, and None where the step did not fit the card."""

    network: str
    patch: str
    batch: int
    dtype: str
    traced_allocated: int
    measured_allocated: int | None
    traced_reserved: int | None
    measured_reserved: int | None
    traced_device: int | None
    measured_device: int | None
    card: str
    driver: str
    torch: str
    cudnn: int | None

    def error(self, measure: str) -> float | None:
        """Traced over measured, less one; below zero where the trace promised too little."""
        traced, measured = (getattr(self, f"{kind}_{measure}") for kind in ("traced", "measured"))
        return traced / measured - 1 if traced and measured else None


def trace(configuration: Configuration, card: CudaCard) -> MemoryReport:
    """The step on no memory."""
    return trace_peak(
        configuration.build(),
        configuration.input_shape,
        optimizer=OPTIMIZER,
        autocast=DTYPES[configuration.dtype],
        card=card,
    )


def measure(configuration: Configuration) -> MemoryReport | None:
    """Two real steps on the card; None where they do not fit."""
    network = configuration.build().cuda()
    batch = torch.zeros(configuration.input_shape, device="cuda")
    stepper = OPTIMIZER(network.parameters())
    dtype = DTYPES[configuration.dtype]

    def two_steps() -> None:
        for _ in range(2):
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                loss = mean(network(batch))
            loss.backward()
            del loss
            stepper.step()
            network.zero_grad()

    try:
        return measure_peak(two_steps)
    except torch.OutOfMemoryError:
        return None


def mean(output: Tensor | list[Tensor]) -> Tensor:
    """What `trace_peak` takes for a loss where none is given."""
    outputs = [output] if isinstance(output, Tensor) else output
    return functools.reduce(torch.add, [part.mean() for part in outputs])


def compare(configuration: Configuration) -> Row:
    """Trace for this kind of card, its context as assumed where there is none, and measure."""
    assumed = {"context_bytes": CudaCard().context_bytes}
    traced = trace(configuration, CudaCard.of_this_machine().model_copy(update=assumed))
    measured = measure(configuration)
    return Row(
        network=configuration.network,
        patch="x".join(map(str, configuration.patch)),
        batch=configuration.batch,
        dtype=configuration.dtype,
        traced_allocated=traced.peak_bytes,
        measured_allocated=measured and measured.peak_bytes,
        traced_reserved=traced.reserved_bytes,
        measured_reserved=measured and measured.reserved_bytes,
        traced_device=traced.device_bytes,
        measured_device=measured and measured.device_bytes,
        card=torch.cuda.get_device_name(),
        driver=driver_version(),
        torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(),
    )


def driver_version() -> str:
    """As nvidia-smi says; empty where it is not installed."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.split("\n")[0].strip()


def summarise(rows: Iterable[Row]) -> list[str]:
    """One line a measure: the median of the errors' sizes, and the worst on either side."""
    lines = []
    for name in MEASURES:
        errors = [error for row in rows if (error := row.error(name)) is not None]
        if not errors:
            lines.append(f"{name:>10}: nothing to compare")
            continue
        median = statistics.median(map(abs, errors))
        lines.append(
            f"{name:>10}: median error {median:.1%}, worst {min(errors):+.1%} to {max(errors):+.1%}"
            f" over {len(errors)} configurations"
        )
    return lines


def write(rows: Iterable[Row], path: Path) -> None:
    names = [field.name for field in fields(Row)]
    with written_whole(path) as partial, partial.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerows([getattr(row, name) for name in names] for row in rows)


def main() -> None:
    """Compare all configurations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA card here: nothing to compare a trace with", file=sys.stderr)
        sys.exit(NO_CARD)
    rows: list[Row] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for configuration, row in zip(
            CONFIGURATIONS, pool.map(compare, CONFIGURATIONS), strict=True
        ):
            rows.append(row)
            errors = (row.error(name) for name in MEASURES)
            cells = (" does not fit" if e is None else f"{e:+13.1%}" for e in errors)
            print(f"{configuration!s:42}" + "".join(cells), flush=True)
            write(rows, options.out)
    print("\n".join(summarise(rows)))


if __name__ == "__main__":
    main()
