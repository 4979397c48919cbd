"""The tuning suite measures what it says, and the one beside nnU-Net compares like with like."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from effseg.errors import MemoryBudgetError
from effseg.io import write_volume
from effseg.memory import apply_policy, mapped_blocks, trace_peak
from effseg.volume import Grid, Volume

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
cases: Any = import_module("tuning_cases")
networks: Any = import_module("plain_networks")
results: Any = import_module("tuning_results")
beside: Any = import_module("beside_nnunet")
processes: Any = import_module("process_tree")

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


@dataclass(frozen=True)
class Tuned:
    """What a tuning tells a run, found by hand."""

    patch: tuple[int, int, int] = (32, 32, 32)
    batch: int = 2
    precision: str = "float32"
    policies: dict[str, str] = field(default_factory=dict)

    def prepare(self, network: torch.nn.Module) -> None:
        apply_policy(network, self.policies)

    def running(self) -> Any:
        return mapped_blocks()


def test_there_are_twelve_networks_and_three_budgets_for_each():
    assert len(cases.NETWORKS) == 12
    for name in cases.NETWORKS:
        budgets = cases.usual_budgets(name)
        assert len(set(budgets)) == 3
        assert budgets[0] > 16 * cases.n_parameters(name)


@pytest.mark.parametrize(
    ("features", "n_blocks", "n_parameters"),
    [
        # convolutions with their biases, norms' gains and biases, ups, head: counted by hand
        ((4, 8), None, 4 * 27 + 4 + 4 * 4 * 27 + 4 + 4 * 8 * 27 + 8 + 8 * 8 * 27 + 8
         + 2 * (4 + 4 + 8 + 8) + 8 * 4 * 8 + 4 + 8 * 4 * 27 + 4 + 4 * 4 * 27 + 4 + 2 * (4 + 4)
         + 4 * 2 + 2),
        ((4, 8), (1, 1), 4 * 27 + 4 + 8 + 2 * (4 * 4 * 27 + 4 + 8)
         + 4 * 8 * 27 + 8 + 16 + 8 * 8 * 27 + 8 + 16 + 4 * 8 + 16
         + 8 * 4 * 8 + 4 + 8 * 4 * 27 + 4 + 8 + 4 * 2 + 2),
    ],
)  # fmt: skip
def test_layouts_have_the_parameters_that_they_should(features, n_blocks, n_parameters):
    network = networks.PlainUNet(features, 2, n_blocks)
    assert sum(parameter.numel() for parameter in network.parameters()) == n_parameters
    assert network(torch.randn(1, 1, 8, 10, 6)).shape == (1, 2, 8, 10, 6)


def test_layouts_take_what_nnunets_own_networks_take():
    pytest.importorskip("dynamic_network_architectures")
    memory: Any = import_module("memory_cases")
    for kind, n_blocks in (("plain", None), ("residual", cases.RESIDUAL_BLOCKS)):
        theirs, mine = (
            trace_peak(network, (1, 1, 64, 64, 64), device="cpu")
            for network in (
                memory.nnunet(kind),
                networks.PlainUNet(memory.FEATURES, memory.N_CLASSES, n_blocks),
            )
        )
        assert mine.peak_bytes == pytest.approx(theirs.peak_bytes, rel=0.001)


def test_a_users_network_keeps_odd_shapes_and_can_be_traced():
    network = networks.UsersUNet(3)
    assert network(torch.randn(1, 1, 17, 20, 9)).shape == (1, 3, 17, 20, 9)
    assert trace_peak(network, (1, 1, 17, 20, 9), device="cpu").saved_bytes > 0


RUN = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_bench_tuning import Tuned, cases, several
cases.NETWORKS["several"] = several
for policies in ({}, {"*": "recompute"}):
    taken = cases.run("several", Tuned((32, 32, 32), 2, policies=policies), most_steps=3)
    print(taken.peak_bytes, len(taken.seconds))
"""


def several() -> nn.Module:
    """Stages of a few convolutions each, then logits."""
    stages = [
        nn.Sequential(*(nn.Conv3d(16 if i + j else 1, 16, 3, padding=1) for j in range(4)))
        for i in range(4)
    ]
    return nn.Sequential(*stages, nn.Conv3d(16, 2, 1))


@linux
@pytest.mark.slow
def test_a_run_takes_its_steps_under_its_policies_and_tells_its_peak():
    """In a process of its own: what earlier tests left on the heap would be used again."""
    command = [sys.executable, "-c", RUN, str(BENCHMARKS), str(Path(__file__).parent)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    (plain, n_steps), (recomputed, _) = (
        map(int, line.split()) for line in said.stdout.splitlines()
    )
    assert n_steps == 3
    expected = trace_peak(
        several(),
        (2, 1, 32, 32, 32),
        loss=cases.CompoundLoss(),
        label_shape=(2, 32, 32, 32),
        label_dtype=torch.uint8,
        optimizer=cases.OPTIMIZER,
        device="cpu",
    )
    assert plain == pytest.approx(expected.device_bytes, rel=0.15)
    assert recomputed < 0.8 * plain


def test_a_run_ends_by_the_clock():
    taken = cases.run("user-written", Tuned(patch=(8, 8, 8)), most_steps=10**6, most_seconds=0.2)
    assert 0.2 <= sum(taken.seconds) < 5
    assert len(taken.seconds) == 2 or sum(taken.seconds[:-1]) < 0.2


def test_the_largest_patch_is_the_last_that_fits():
    patches = []

    def needed(patch):
        patches.append(patch)
        return math.prod(patch)

    assert cases.largest_patch(needed, 16 * 24 * 16, multiple=8, most=64) == (24, 16, 16)
    assert len(patches) <= 6
    assert cases.largest_patch(needed, 10**9, multiple=8, most=64) == (64, 64, 64)
    with pytest.raises(MemoryBudgetError, match="8 voxels a side"):
        cases.largest_patch(needed, 8**3 - 1, multiple=8, most=64)


ROW = results.Row(
    network="one",
    budget_mib=512.0,
    n_parameters=7,
    patch="8 x 8 x 8",
    batch=2,
    policies=3,
    precision="float32",
    heap="mapped",
    predicted_mib=495.0,
    measured_mib=500.0,
    error_percent=-1.0,
    used_percent=97.66,
    over=False,
    search_seconds=3.5,
    search_mib=12.0,
    step_seconds=0.25,
    steps=200,
)
REFUSED = results.Row(
    network="two", budget_mib=256.0, n_parameters=9, search_seconds=31.0, refusal="no room, sorry"
)


def test_a_row_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "results" / "tuning.csv"
    assert results.read_rows(path) == []
    for row in (replace(ROW, steps=5), REFUSED, ROW):
        results.put_row(row, path)
    assert results.read_rows(path) == [ROW, REFUSED]
    with path.open(newline="") as file:
        assert {line["torch"] for line in csv.DictReader(file)} == {torch.__version__}


def test_the_worst_rows_are_named():
    over = replace(ROW, network="three", over=True, error_percent=-6.5, used_percent=103.0)
    found = {name: judge([ROW, REFUSED, over]) for name, judge in results.WORST.items()}
    cells = {name: goal.cells() for name, goal in found.items()}
    assert {name: (cell["value"], cell["met"]) for name, cell in cells.items()} == {
        "worst error of a prediction": (-6.5, "no"),
        "least use of a budget": (0.0, "no"),
        "runs over their budget": (1.0, "no"),
        "searches that refused": (1.0, "no"),
        "slowest search": (31.0, "no"),
    }
    assert cells["least use of a budget"]["note"] == "two in 256 MiB"
    assert all(judge([ROW]).cells()["met"] == "yes" for judge in results.WORST.values())
    assert ROW.goal().cells()["met"] == "yes"
    assert REFUSED.goal().cells()["met"] == "no"


ALLOCATE = """
import subprocess, sys, time
own = bytearray(b"1") * (48 * 2**20)
if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "worker"], check=True)
else:
    time.sleep(0.6)
"""


@linux
def test_a_commands_workers_count(tmp_path):
    script = tmp_path / "allocate.py"
    script.write_text(ALLOCATE)
    alone, both = (
        processes.watched([sys.executable, script, *arguments], pause_seconds=0.02)
        for arguments in (["worker"], [])
    )
    assert 48 * MIB < alone.peak_bytes < 72 * MIB
    assert 96 * MIB < both.peak_bytes < 144 * MIB
    assert 0.6 < alone.seconds < 10
    with pytest.raises(subprocess.CalledProcessError):
        processes.watched([sys.executable, "-c", "raise SystemExit(3)"])
    assert processes.imported_bytes(Path(sys.executable), "json, csv") < 32 * MIB


def test_nnunet_gets_the_cases_that_effseg_learns_from(tmp_path, tiny_dataset, tiny_plan):
    dataset = beside.read_dataset(tiny_dataset)
    listed = beside.listed(beside.hold_out(dataset, tmp_path, share=0.34, seed=0), tmp_path)
    job = beside.NnUNetJob(tmp_path / "nnunet", tmp_path / "venv")
    job.lay_out(beside.read_dataset(listed).cases, tmp_path / "images", tiny_plan)
    (raw,) = (job.home / "raw").iterdir()
    seen = {path.name for path in (raw / "imagesTr").iterdir()}
    unseen = {path.name for path in (tmp_path / "nnunet" / "images").iterdir()}
    assert (len(seen), len(unseen)) == (4, 2)
    assert seen | unseen == {f"ball_{index}_0000.nii.gz" for index in range(6)}
    labels = {path.name for path in (raw / "labelsTr").iterdir()}
    assert labels == {name.replace("_0000", "") for name in seen}
    said = json.loads((raw / "dataset.json").read_text())
    assert said["numTraining"] == 4
    assert said["labels"]["background"] == 0
    assert sorted(said["labels"].values()) == [0, 1, 2]
    assert said["file_ending"] == ".nii.gz"


def test_a_tools_row_is_scored_and_told_above_its_imports(tmp_path):
    took = processes.Took
    facts = {
        "tool": "mine",
        "seen_cases": 3,
        "minutes": 2.004,
        "steps": 9,
        "budget_mib": 64.0,
        "patch": "8 x 8 x 8",
        "batch": 2,
        "parameters": 5,
    }
    run = beside.Run(
        predictions=tmp_path / "test",
        commands=[took(60, 900 * MIB), took(120, 300 * MIB)],
        predicted=took(30, 150 * MIB),
        imports_bytes=100 * MIB,
        facts=facts,
    )
    ball = np.zeros((6, 6, 6), np.uint8)
    ball[2:4, 2:4, 2:4] = 1
    for folder in ("test", "labels"):
        write_volume(Volume(ball, Grid(ball.shape)), tmp_path / folder / "a.nii.gz")
    row = beside.row_of(run, "balls", tmp_path)
    assert (row.dice, row.unseen_cases) == (1.0, 1)
    assert (row.train_mib, row.imports_mib) == (200.0, 100.0)
    assert (row.minutes, row.other_minutes, row.predict_minutes) == (2.0, 1.0, 0.5)
    table = tmp_path / "new" / "table.csv"
    beside.put_row(replace(row, steps=1), table)
    beside.put_row(replace(row, tool="theirs"), table)
    rows = beside.put_row(row, table)  # a newer run of the same tool
    with table.open(newline="") as file:
        lines = [(line["tool"], line["steps"]) for line in csv.DictReader(file)]
    assert lines == [("theirs", "9"), ("mine", "9")]
    assert "theirs" in beside.as_text(rows).splitlines()[0]
