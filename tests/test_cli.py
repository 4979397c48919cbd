"""The command line as a person meets it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effseg import cli
from effseg.dataset import Dataset, layouts
from effseg.errors import PlanError
from effseg.io import read_grid, write_volume
from effseg.plans import Plan
from effseg.volume import Grid, Volume


def effseg(*arguments: object, expect: int = 0) -> str:
    """Run the command; what it printed on both channels, spaces folded."""
    done = subprocess.run(
        [sys.executable, "-m", "effseg.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == expect, said
    assert "Traceback" not in said
    return said


def test_help_lists_the_verbs() -> None:
    said = effseg("--help")
    for verb in ("check", "plan", "train", "predict", "evaluate", "report", "benchmark"):
        assert verb in said


def test_the_whole_way(tiny_dataset: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    assert "ready to plan" in effseg("check", tiny_dataset)
    said = effseg("plan", tiny_dataset, "--memory", "1GiB", "--out", tmp_path / "p.json")
    assert "patch_size" in said
    assert Plan.load(tmp_path / "p.json").memory.budget_bytes == 2**30
    plan = tiny_plan.save(tmp_path / "tiny.json")
    run = tmp_path / "run"
    said = effseg("train", tiny_dataset, "--out", run, "--plan", plan, "--epochs", 2)
    assert f"report {run / 'report.html'}" in said
    assert (run / "report.html").stat().st_size > 10_000
    out = tmp_path / "predictions"
    said = effseg("predict", run, tiny_dataset / "images", "--out", out, "--memory", "1GiB")
    assert "6 of 6 label maps" in said
    assert "peak memory" in said
    image = tiny_dataset / "images" / "ball_3.nii.gz"
    np.testing.assert_allclose(
        read_grid(out / "ball_3.nii.gz")[0].affine, read_grid(image)[0].affine, atol=1e-6
    )
    effseg("evaluate", out, tiny_dataset / "labels", "--out", tmp_path / "metrics.json")
    assert len(json.loads((tmp_path / "metrics.json").read_text())["cases"]) == 6
    assert "report.html" in effseg("report", run)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("frobnicate",), 1, "No such command"),
        (("train", "x", "--out", "y"), 1, "--plan PLAN or --memory SIZE"),
        (("check", "/nowhere/at/all"), 2, "/nowhere/at/all"),
        (("plan", ".", "--memory", "lots"), 2, "expected a size"),
        (("predict", "/no/run", "x.nii.gz", "--out", "o"), 2, "no such run"),
        (("evaluate", "/no/predictions", "/no/references"), 2, "/no/predictions"),
    ],
)
def test_mistakes_get_one_line_and_their_exit_code(arguments, code, words) -> None:
    assert words in effseg(*arguments, expect=code)


def test_a_data_set_is_looked_at_once_before_training(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, trained = [], []

    def looking(path: Path) -> Dataset:
        looked.append(path)
        return read(path)

    def training(plan: Plan, dataset: Dataset, **choices: object) -> None:
        trained.append((plan.dataset, dataset.name))
        raise PlanError("far enough")

    read = layouts._read
    monkeypatch.setattr(layouts, "_read", looking)
    monkeypatch.setattr("effseg.training.train", training)
    arguments = ["train", str(tiny_dataset), "--out", str(tmp_path / "r"), "--memory", "1GiB"]
    with pytest.raises(PlanError, match="far enough"):
        cli.app(arguments, standalone_mode=False)
    assert looked == [tiny_dataset]
    assert trained == [("balls", "balls")]


def test_a_budget_too_small_is_out_of_resources(tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    said = effseg("plan", tiny_dataset, "--memory", "1MiB", "--out", out, expect=3)
    assert "would do" in said
    assert not out.exists()


def test_choices_that_cannot_work_are_bad_input(
    tiny_dataset: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    plan, run = tiny_plan.save(tmp_path / "p.json"), tmp_path / "run"
    choices = ("--device", "abacus", "--seed", -1)
    said = effseg("train", tiny_dataset, "--out", run, "--plan", plan, *choices, expect=2)
    for words in ("training.seed: ", "device: ", "got 'abacus'"):
        assert words in said
    choices = ("--minutes", 1, "--epochs", 1)
    said = effseg("train", tiny_dataset, "--out", run, "--plan", plan, *choices, expect=2)
    assert "set one of the two" in said
    assert not run.exists()


def test_a_failing_case_is_named_and_the_others_go_on(
    tiny_run: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    good = tiny_dataset / "images" / "ball_0.nii.gz"
    bad = tmp_path / "cut.nii.gz"
    bad.write_bytes(good.read_bytes()[:-200])
    out = tmp_path / "out"
    said = effseg("predict", tiny_run, good, bad, "--out", out, expect=2)
    assert "failed cut" in said
    assert "1 of 2 label maps" in said
    assert [path.name for path in out.iterdir()] == ["ball_0.nii.gz"]


def test_a_wrong_pair_is_found_by_check(tmp_path: Path) -> None:
    array = np.zeros((6, 6, 6), np.uint8)
    array[2:4, 2:4, 2:4] = 1
    for index, spacing in enumerate((1.0, 0.8)):
        grid = Grid(shape=(6, 6, 6), spacing=(spacing, 1.0, 1.0))
        image = Volume(array=array.astype(np.float32) + index, grid=Grid(shape=(6, 6, 6)))
        write_volume(image, tmp_path / "images" / f"case_{index}.nii.gz")
        write_volume(Volume(array=array, grid=grid), tmp_path / "labels" / f"case_{index}.nii.gz")
    said = effseg("check", tmp_path, expect=2)
    assert "case_1" in said
    assert "spacing" in said
    assert "case_1" in effseg("plan", tmp_path, "--memory", "1GiB", expect=2)
