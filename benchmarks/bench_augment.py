"""What changing a patch takes, each transform and each policy: processor seconds and bytes.

    effseg benchmark --suite augment

A patch of 96^3 voxels with its label, one channel. Transforms happen with certainty, and MONAI's
way to do the same stands beside each; policies change 24 patches by their own chances. Seconds
are of the processor, all threads together, the best of some rounds: others who use the machine
count little. Between machines `ratio_to_monai` (over MONAI's seconds in the same run) tells most.
Bytes are the peak of resident memory beyond the patch that is given, what is returned included. A
complete run leaves its rows in `benchmarks/results/augment.csv`.
"""

import csv
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.transforms import (
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotate90d,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
    RandStdShiftIntensityd,
)
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from effseg.augment import build_augmentation
from effseg.memory import PeakResident, give_back_memory, mapped_blocks
from effseg.plans import CHANGES, AugmentConfig
from effseg.types import Shape3

RESULTS = Path(__file__).parent / "results"
SIDE = 96
POLICIES = ("off", "light", "default", "strong")
N_PATCHES = 24
ROUNDS = 5
BOTH = ("image", "label")
EQUAL_MM = (1.0, 1.0, 1.0)

Patch = tuple[Tensor, Tensor]
Change = Callable[[Patch, int], Patch]


@dataclass(frozen=True)
class Row:
    """What was found.

    Attributes:
        change: a transform, or a policy.
        tool: that did it.
        mvoxels_per_s: 10^6 voxels of patches a second of a processor.
        bytes_per_voxel: of the patch, at the peak; the patch that is given takes 5.
        ratio_to_monai: seconds over MONAI's, where it has the same.
    """

    change: str
    tool: str
    mvoxels_per_s: float
    bytes_per_voxel: float
    ratio_to_monai: float | None


def by_effseg(name: str) -> Change:
    """A transform with certainty, or a policy by its chances."""
    chosen: dict[str, Any] = {"policy": name} if name in POLICIES else {"policy": "off", name: 1.0}
    augment = build_augmentation(AugmentConfig.model_validate(chosen), spacing=EQUAL_MM)
    return lambda patch, seed: augment(*patch, seed=seed)


def by_monai(name: str) -> Change:
    """MONAI's transform with the same range, on a copy: some work in place."""
    usual = AugmentConfig()
    turn, (small, large) = math.radians(usual.rotate_degrees), usual.scale
    transform = {
        "flip": RandFlipd(BOTH, prob=1, spatial_axis=2),
        "rotate90": RandRotate90d(BOTH, prob=1, spatial_axes=(1, 2)),
        "affine": RandAffined(
            BOTH,
            prob=1,
            rotate_range=(turn,) * 3,
            scale_range=((small - 1, large - 1),) * 3,
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        "gamma": RandAdjustContrastd("image", prob=1, gamma=(0.7, 1.5), retain_stats=True),
        "brightness": RandStdShiftIntensityd("image", prob=1, factors=0.25),
        "contrast": RandScaleIntensityFixedMeand("image", prob=1, factors=0.25),
        "noise": RandGaussianNoised("image", prob=1, std=0.3),
        "blur": RandGaussianSmoothd(
            "image", prob=1, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)
        ),
        "low_resolution": RandSimulateLowResolutiond("image", prob=1, zoom_range=(0.5, 1)),
    }[name]

    def change(patch: Patch, seed: int) -> Patch:
        transform.set_random_state(seed)
        image, label = patch
        done = transform({"image": image.clone(), "label": label[None].clone()})
        return done["image"], done["label"][0]

    return change


TOOLS = {"effseg": by_effseg, "monai": by_monai}
CASES = [
    *((change, tool) for change in CHANGES for tool in ("monai", "effseg")),
    *((policy, "effseg") for policy in POLICIES),
]


def make_patch(shape: Shape3) -> Patch:
    """Noise, and a label of a ball in it."""
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    return image, (sum(axis**2 for axis in axes) < 0.3).to(torch.uint8)


def peak_bytes(change: Change, patch: Patch, n_patches: int) -> int:
    """The most that changing one of the patches holds beyond the patch given."""
    with mapped_blocks():
        change(patch, 0)
        give_back_memory()  # what is free would be taken again unseen
        resident = PeakResident().start()
        for seed in range(n_patches):
            change(patch, seed)
        return resident.stop()


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """What was found; written down in the end, if nothing is missing."""
    found: list[Row] = []
    yield found
    if len(found) == len(CASES) and request.config.getoption("benchmark_enable"):
        write_rows(found, RESULTS / "augment.csv")


@pytest.mark.parametrize(("name", "tool"), CASES)
def test_change(benchmark: BenchmarkFixture, name: str, tool: str, rows: list[Row]) -> None:
    """A transform or a policy."""
    change, patch = TOOLS[tool](name), make_patch((SIDE, SIDE, SIDE))
    n_patches = N_PATCHES if name in POLICIES else 1

    took: list[float] = []

    def call() -> None:
        started = time.process_time()
        for seed in range(n_patches):
            change(patch, seed)
        took.append(time.process_time() - started)

    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    if not benchmark.enabled:
        return
    speed = n_patches * SIDE**3 / min(took) / 1e6
    monai = next((r for r in rows if (r.change, r.tool) == (name, "monai")), None)
    row = Row(
        change=name,
        tool=tool,
        mvoxels_per_s=round(speed, 1),
        bytes_per_voxel=round(peak_bytes(change, patch, n_patches) / SIDE**3, 1),
        ratio_to_monai=None if monai is None else round(monai.mvoxels_per_s / speed, 2),
    )
    rows.append(row)
    cells = asdict(row)
    benchmark.extra_info |= {name: cells[name] for name in list(cells)[2:]}  # its id says the rest


def write_rows(rows: list[Row], path: Path) -> None:
    """One line a row, and the machine they were made on."""
    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = [asdict(row) | machine for row in rows]
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
