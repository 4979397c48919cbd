"""The augmentation suite compares the same changes, on a patch that takes no time."""

import csv
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
suite: Any = import_module("bench_augment")

GEOMETRY = ("flip", "rotate90", "affine")


@pytest.mark.parametrize(("name", "tool"), suite.CASES)
def test_each_way_changes_what_its_name_says(name: str, tool: str) -> None:
    image, label = patch = suite.make_patch((12, 12, 12))
    label[:2, :3, :4] = 1  # no longer the same from all sides
    kept = image.clone(), label.clone()
    change = suite.TOOLS[tool](name)
    results = [change(patch, seed) for seed in range(40 if name in suite.POLICIES else 4)]
    assert torch.equal(image, kept[0])
    assert torch.equal(label, kept[1])
    assert all(a.shape == image.shape and b.shape == label.shape for a, b in results)
    images = any(not torch.equal(a, image) for a, _ in results)
    labels = any(not torch.equal(b, label) for _, b in results)
    assert images == (name != "off")
    assert labels == (name in (*GEOMETRY, "light", "default", "strong"))


def test_rows_are_written_with_their_machine(tmp_path: Path) -> None:
    row = suite.Row("gamma", "effseg", 12.5, 20.0, None)
    suite.write_rows([row], tmp_path / "augment.csv")
    (read,) = csv.DictReader((tmp_path / "augment.csv").read_text().splitlines())
    assert (read["change"], read["mvoxels_per_s"], read["ratio_to_monai"]) == ("gamma", "12.5", "")
    assert read["torch"] == torch.__version__
