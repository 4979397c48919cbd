"""What several test files share: the folder of real data, a seed, a device."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from effseg.io import write_volume
from effseg.planner import plan as make_plan
from effseg.plans import Plan
from effseg.training import train
from effseg.validation import validate
from effseg.volume import AxisOrder, Grid, Volume

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# the same examples on each run, however slow the machine; `--hypothesis-profile explore` looks for
# others
settings.register_profile("guard", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile("guard")


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """`shared("chaos-liver")` is that folder of real data; where it is not there, skip."""

    def find(name: str) -> Path:
        folder = SHARED / name
        if not folder.is_dir():
            pytest.skip(f"no real data here: ../shared/data/{name}")
        return folder

    return find


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cases in an images/ and labels/ folder: a bright ball and a brighter core, oblique."""
    return make_dataset(tmp_path_factory.mktemp("tiny") / "balls", n_cases=6)


def make_dataset(folder: Path, *, n_cases: int) -> Path:
    """Balls of two shells in noise, on grids that are stored in another axis order."""
    turned = AxisOrder(order=(2, 1, 0), flips=(False, True, False))
    for index in range(n_cases):
        rng = np.random.default_rng(index)
        shape = (20, 22, 24)
        axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
        centre = [n / 2 + rng.uniform(-2, 2) for n in shape]
        radius = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)))
        label = (radius < 6).astype(np.uint8) + (radius < 3)
        image = (100 * label + rng.normal(0, 20, shape)).astype(np.float32)
        grid = Grid(shape=shape, spacing=(1.0, 1.0, 1.0), origin=(5.0, -3.0, 11.0))
        for kind, array in (("images", image), ("labels", label)):
            volume = Volume(array=array, grid=grid).reordered(turned)
            write_volume(volume, folder / kind / f"ball_{index}.nii.gz")
    return folder


@pytest.fixture(scope="session")
def tiny_plan(tiny_dataset: Path) -> Plan:
    """A plan of the balls whose network trains in seconds."""
    planned = make_plan(tiny_dataset, memory="1GiB", device="cpu")
    network = planned.network.model_copy(
        update={
            "stem_channels": 8,
            "growth_rate": 8,
            "encoder_layers": (1, 1),
            "decoder_layers": (1,),
            "strides": ((1, 1, 1), (2, 2, 2)),
            "kernels": ((3, 3, 3), (3, 3, 3)),
        }
    )
    training = planned.training.model_copy(
        update={"steps_per_epoch": 6, "validation_patches": 2, "epochs": 2}
    )
    return Plan.model_validate(
        planned.model_copy(
            update={
                "network": network,
                "training": training,
                "patch_size": (16, 16, 16),
                "batch_size": 2,
                "precision": "float32",
            }
        ).model_dump()
    )


@pytest.fixture(scope="session")
def tiny_run(tiny_plan: Plan, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The balls, trained for a few seconds and validated."""
    training = tiny_plan.training.model_copy(update={"epochs": 6})
    plan = tiny_plan.model_copy(update={"training": training})
    run = train(plan, tiny_dataset, out=tmp_path_factory.mktemp("run") / "balls")
    validate(run)
    return run
