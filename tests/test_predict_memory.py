"""Resident memory of whole predictions, each in a process of its own, against the forecast."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from effseg.inference import load_run

AS_IT_LIES = """
import json, sys
import numpy as np, torch
from torch import nn
from effseg.inference import Predictor
from effseg.inference.budget import Forecast
from effseg.memory import PeakResident
from effseg.volume import Grid
from effseg.io import SlabWriter

folder, n_features, n_classes, length, mib = sys.argv[1], *map(int, sys.argv[2:])
path = f"{folder}/image.nii"
with SlabWriter(path, Grid((length, 128, 128)), np.int16) as writer:
    for start in range(0, length, 8):
        slab = np.random.default_rng(start).normal(size=(8, 128, 128))
        writer.write(start, (100 * slab).astype(np.int16))
torch.manual_seed(0)
layers = [nn.Conv3d(1, n_features, 1), nn.ReLU(inplace=True)] if n_features else []
network = nn.Sequential(*layers, nn.Conv3d(n_features or 1, n_classes, 1 if n_features else 3,
                                           padding=0 if n_features else 1))
small = np.zeros((40, 40, 40), np.float32)
Predictor(network, (16, 16, 16), memory="8GiB").predict(small, f"{folder}/first.nii.gz")
ways = []
Forecast.__str__ = lambda way: ways.append(way) or "noted"
import logging
logging.basicConfig(level=logging.INFO)
predictor = Predictor(network, (64, 96, 96), overlap=0.25, memory=mib << 20)
resident = PeakResident().start()
predictor.predict(path, f"{folder}/labels.nii.gz")
peak = resident.stop()
way = ways[-1]
print(json.dumps({"peak": peak, "forecast": way.peak_bytes, "sums": way.sums, "heap": way.heap}))
"""

RUN = """
import json, sys
import numpy as np
from effseg.inference import budget, forecast, load_run, predict
from effseg.io import SlabWriter
from effseg.memory import PeakResident
from effseg.volume import Grid

folder, run = sys.argv[1], load_run(sys.argv[2])
for length, name in ((24, "first"), (320, "image")):
    grid = Grid((length, 150, 150), (0.8, 0.8, 0.8))
    with SlabWriter(f"{folder}/{name}.nii.gz", grid, np.int16) as writer:
        for start in range(0, length, 8):
            slab = np.random.default_rng(start).normal(size=(8, 150, 150))
            writer.write(start, (100 * slab).astype(np.int16))
predict(run, f"{folder}/first.nii.gz", out=f"{folder}/out/first.nii.gz", memory="4GiB")
way = forecast(run, grid, writes=True, file_voxel_bytes=2)
budget.KEPT_WORST = 100.0  # no room to keep what is freed, with fewer windows a pass neither
resident = PeakResident().start()
predict(run, f"{folder}/image.nii.gz", out=f"{folder}/out/image.nii.gz", memory="4GiB")
peak = resident.stop()
print(json.dumps({"peak": peak, "forecast": way.peak_bytes, "sums": way.sums}))
"""


def measured(script: str, *arguments: object) -> dict:
    """What a process of its own says; imports and first calls are before its baseline."""
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its peak")
@pytest.mark.parametrize(
    ("n_features", "n_classes", "mib", "sums"),
    [(0, 25, 500, "host"), (32, 118, 500, "host"), (0, 60, 240, "disk")],
)
def test_resident_memory_is_within_15_percent_of_the_forecast(
    n_features, n_classes, mib, sums, tmp_path: Path
) -> None:
    found = measured(AS_IT_LIES, tmp_path, n_features, n_classes, 192, mib)
    assert (found["heap"], found["sums"]) == ("mapped", sums)
    assert abs(found["peak"] / found["forecast"] - 1) <= 0.15


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its peak")
@pytest.mark.parametrize(("n_features", "n_classes"), [(0, 25), (32, 118)])
def test_a_roomy_budget_keeps_freed_memory_and_what_it_takes_is_no_more_than_the_forecast(
    n_features, n_classes, tmp_path: Path
) -> None:
    found = measured(AS_IT_LIES, tmp_path, n_features, n_classes, 192, 900)
    assert found["heap"] == "kept"
    assert found["peak"] <= found["forecast"] <= 900 << 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its peak")
def test_resident_memory_of_a_run_is_within_15_percent_of_the_forecast(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    plan = load_run(folder).plan
    plan = plan.model_copy(
        update={
            "patch_size": (96, 96, 96),
            "spacing": (1.0, 0.7, 0.7),
            # four windows: beside one, what is put by for components is more than 15 percent
            "inference": plan.inference.model_copy(update={"overlap": 0.2, "window_batch": 4}),
        }
    )
    plan.save(folder / "plan.json")
    found = measured(RUN, tmp_path, folder)
    assert abs(found["peak"] / found["forecast"] - 1) <= 0.15
