"""The command line as a person meets it."""

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from effseg import cli
from effseg.cli.budgets import describe
from effseg.cli.plan_tables import print_plan
from effseg.dataset import Dataset, layouts
from effseg.errors import PlanError
from effseg.inference import CaseResult
from effseg.io import read_grid, read_volume, write_volume
from effseg.planner import facts
from effseg.plans import Alternative, Fingerprint, Plan
from effseg.record import RunRecord
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
    for verb in (
        "check",
        "plan",
        "train",
        "predict",
        "evaluate",
        "test",
        "thresholds",
        "distill",
        "report",
        "compare",
        "suspects",
        "benchmark",
    ):
        assert verb in said


def test_help_waits_for_no_heavy_library() -> None:
    code = (
        "import effseg.cli, sys\n"
        "heavy = {'torch', 'numpy', 'lightning', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
    assert f"line {tmp_path / 'runs.csv'}: the first run on these data here" in said
    out = tmp_path / "predictions"
    said = effseg("predict", run, tiny_dataset / "images", "--out", out, "--memory", "1GiB")
    assert f"6 predicted, 0 failed; label maps in {out}" in said
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
        (("train", "x"), 1, "give DATASET and --out RUN, or --resume RUN"),
        (("train", "--resume", "r", "--epochs", "3"), 1, "leave epochs out"),
        (("train", "--resume", "/no/run"), 2, "no such record"),
        (("check", "/nowhere/at/all"), 2, "/nowhere/at/all"),
        (("plan", ".", "--memory", "lots"), 2, "expected a size"),
        (("plan", ".", "--memory", "1GiB,lots"), 2, "memory 'lots'; expected a size"),
        (("plan", ".", "--memory", "1GiB,"), 2, "memory ''; expected a size"),
        (("plan", ".", "--memory", "1GiB,2GiB", "--out", "p"), 1, "--out p beside 2 budgets"),
        (("plan", ".", "--memory", "1GiB", "--size", "b9"), 1, "'b9' is not one of 'b0'"),
        (("train", "x", "--out", "y", "--plan", "p", "--size", "b1"), 1, "a --plan has its own"),
        (("plan", ".", "--memory", "1GiB", "--device", "abacus"), 2, "device 'abacus'; expected"),
        (("predict", "/no/run", "x.nii.gz", "--out", "o"), 2, "no such run"),
        (("evaluate", "/no/predictions", "/no/references"), 2, "/no/predictions"),
    ],
)
def test_mistakes_get_one_line_and_their_exit_code(arguments, code, words) -> None:
    assert words in effseg(*arguments, expect=code)


def test_budgets_stand_side_by_side_from_one_look_at_the_data(
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    looked = []

    def looking(dataset: Dataset, **choices: object) -> Fingerprint:
        looked.append(dataset.name)
        return facts.fingerprint(dataset)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("effseg.planner.fingerprint", looking)
    monkeypatch.setattr("effseg.cli.budgets.console", Console(width=160))
    budgets = ["--memory", "1MiB, 400MiB,1GiB", "--device", "cpu"]
    cli.app(["plan", str(tiny_dataset), *budgets], standalone_mode=False)
    table = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines()]
    by_name = {row[0]: row[1:] for row in rows if row and row[0]}
    assert "┃ 1MiB" in table
    assert by_name["budget"] == ["-", "400 MiB", "1.00 GiB"]
    assert by_name["patch"][0] == "-"
    small, large = (int(cell.replace(",", "")) for cell in by_name["context, voxels"][1:])
    assert 0 < small <= large
    assert all(0 < int(share.rstrip("%")) <= 100 for share in by_name["of the budget"][1:])
    assert "smallest patch" in by_name["cannot be met"][0]
    assert looked == ["balls"]
    assert list(tmp_path.iterdir()) == []
    arguments = ["plan", str(tiny_dataset), "--memory", "1MiB,2MiB"]
    assert cli.app(arguments, standalone_mode=False) == 3


def test_a_plan_in_a_column_names_what_is_kept_otherwise(tiny_plan: Plan) -> None:
    taken = Alternative(choice="patch", peak_bytes=2**28, seconds=0.25, taken=True)
    left = Alternative(choice="batch 4", peak_bytes=2**29, seconds=9.0, why="too much")
    policies = {"encoder.0": "recompute", "encoder.1": "keep", "decoder.0": "recompute"}
    update = {"policies": policies, "alternatives": (left, taken)}
    column = describe(tiny_plan.model_copy(update=update))
    assert column["policies"] == f"{tiny_plan.network.memory}, recompute 2"
    assert column["seconds a step"] == "0.25"
    assert column["context, mm"] == "16 x 16 x 16"
    unknown = tiny_plan.model_copy(update={"alternatives": ()})
    assert describe(unknown)["seconds a step"] == "-"


def test_what_else_was_weighed_is_printed(
    tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("effseg.cli.plan_tables.console", Console(width=160))
    other = Alternative(choice="patch 9 x 9 x 9", peak_bytes=3 * 2**29, why="over [the] budget")
    print_plan(tiny_plan.model_copy(update={"alternatives": (other,)}))
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "patch 9 x 9 x 9 1.50 GiB 150% - over [the] budget" in said
    print_plan(tiny_plan.model_copy(update={"alternatives": ()}))
    assert "weighed" not in capsys.readouterr().out


def test_size_learning_rate_and_policy_are_passed_on(
    tiny_dataset: Path, tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def planning(dataset: Dataset, *, progress: object = None, **choices: object) -> Plan:
        asked.append(choices)
        return tiny_plan

    def training(plan: Plan, dataset: Dataset, **choices: object) -> None:
        asked.append({name: choices.get(name) for name in ("find_lr", "augment")})
        raise PlanError("far enough")

    monkeypatch.setattr("effseg.planner.plan", planning)
    monkeypatch.setattr("effseg.training.train", training)
    arguments = ["train", str(tiny_dataset), "--out", str(tmp_path / "r"), "--memory", "auto"]
    options = ["--network-option", "decoder=linknet", "--network-option", "residual=true"]
    for more in ([], ["--size", "b3", "--find-lr", "--augment", "strong", *options]):
        with pytest.raises(PlanError, match="far enough"):
            cli.app([*arguments, *more], standalone_mode=False)
    usual = {"memory": "auto", "device": None, "size": None, "augment": "default"}
    usual |= {"network": None, "network_options": {}}
    assert asked == [
        usual,
        {"find_lr": False, "augment": None},
        usual
        | {"size": "b3", "augment": "strong"}
        | {"network_options": {"decoder": "linknet", "residual": True}},
        {"find_lr": True, "augment": "strong"},
    ]


def test_a_plan_for_a_device_that_is_not_here_is_refused_by_its_file(
    tiny_dataset: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    plan = tiny_plan.model_copy(update={"device": "cuda:99"}).save(tmp_path / "p.json")
    arguments = ["train", tiny_dataset, "--out", tmp_path / "run", "--plan", plan]
    with pytest.raises(PlanError, match=r"p.json: device: 'cuda:99' is not in this machine"):
        cli.app([*map(str, arguments)], standalone_mode=False)
    assert not (tmp_path / "run").exists()


def test_a_misfit_that_was_edited_is_out_of_resources(
    tiny_dataset: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    memory = tiny_plan.memory.model_copy(update={"budget_bytes": 2**26})
    plan = tiny_plan.model_copy(update={"memory": memory}).save(tmp_path / "p.json")
    said = effseg("train", tiny_dataset, "--out", tmp_path / "r", "--plan", plan, expect=3)
    assert f"error {plan}: patch 16 x 16 x 16 at batch 2 takes" in said
    assert "its budget is 64 MiB" in said


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


def test_a_prediction_takes_a_coarse_run_and_writes_maps(
    tiny_run: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["predict", tiny_run, tiny_dataset / "images" / "ball_0.nii.gz", "--out", out]
    arguments += ["--coarse", tiny_run, "--resume", "--skip-constant", "--entropy"]
    effseg(*arguments, "--probabilities", "1", "--probabilities", "2")
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    folders = ("", "entropy/", "probability_1/", "probability_2/")
    assert found == {f"{folder}ball_0.nii.gz" for folder in folders}
    said = effseg(*arguments, "--probabilities", "7", expect=2)
    assert "no label 7 to give probabilities of" in said


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
    tiny_run: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = tiny_dataset / "images" / "ball_0.nii.gz"
    bad, twin = tmp_path / "cut.nii.gz", tmp_path / "ball_0.mha"
    bad.write_bytes(good.read_bytes()[:-200])
    write_volume(read_volume(good), twin)
    out = tmp_path / "out"
    for code, words, inputs, choices in (
        (2, "1 predicted, 1 failed (cut); label maps in", (good, bad), ()),
        (2, f"failed cut: {bad}: ", (good, bad), ()),
        (2, "0 predicted, 1 kept as they were, 1 failed (cut)", (good, bad), ("--skip-existing",)),
        (0, "shard 1/2: 1 of 2 cases 1 predicted, 0 failed", (good, bad), ("--shard", "1/2")),
        (0, "shard 3/3: none of 1 cases", (good,), ("--shard", "3/3")),
        (2, "expected i/n with i from 1 to n", (good,), ("--shard", "2/1")),
        (3, "failed ball_0: an image of (24, 22, 20) voxels takes", (good,), ("--memory", "1MiB")),
        (2, "label maps cannot be written there", (good,), ("--out", bad)),
        (2, "are both case ball_0", (good, twin), ()),
    ):
        arguments = ["effseg", "predict", tiny_run, *inputs, "--out", out, *choices]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        assert caught.value.code == code
        assert words in " ".join((said.out + said.err).split())
    assert [path.name for path in out.iterdir()] == ["ball_0.nii.gz"]


def test_the_gravest_failure_of_many_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last: list[Exception] = []

    def many(*_: object, report: Callable[[CaseResult], None], **__: object) -> None:
        for number, error in enumerate([None, PlanError("wrong"), MemoryError(), *last]):
            report(CaseResult(f"case_{number}", tmp_path, error=error))
        if not last:
            raise KeyboardInterrupt

    monkeypatch.setattr("effseg.inference.load_runs", lambda *_, **__: (FakeRun(),))
    monkeypatch.setattr(
        "effseg.inference.find_images", lambda *_, **__: dict.fromkeys("abcd", None)
    )
    monkeypatch.setattr("effseg.inference.predict_cases", many)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["effseg", "predict", "run", "x", "--out", "o"])
    for code, words in (
        (130, "1 predicted, 2 failed (case_1, case_2), 1 not begun"),
        (4, "1 predicted, 3 failed (case_1, case_2, case_3)"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == code
        said = capsys.readouterr()
        assert words in " ".join(said.out.split())
        assert "failed case_1: wrong" in said.err
        assert "failed case_2: out of memory" in said.err
        last = [ZeroDivisionError("by zero")]
    assert len(list(tmp_path.glob("effseg-traceback-*"))) == 1


class FakeRun:
    """As much of a run as the command line looks at."""

    n_models = 1

    class plan:  # noqa: N801
        channels = ("image",)


def test_an_interrupted_prediction_keeps_what_is_done(
    tiny_run: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(300):
        source = tiny_dataset / "images" / f"ball_{number % 6}.nii.gz"
        (images / f"ball_{number:03d}.nii.gz").symlink_to(source)
    command = [sys.executable, "-m", "effseg.cli", "predict", str(tiny_run), str(images)]
    with subprocess.Popen(
        [*command, "--out", str(out), "--tta"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as going:
        try:
            while going.poll() is None and len(list(out.glob("ball_*"))) < 2:
                time.sleep(0.02)
            going.send_signal(signal.SIGINT)
            told, said = going.communicate(timeout=120)
        finally:
            going.kill()
    assert going.returncode == 130, said
    assert said.strip().endswith("stopped")
    assert "Traceback" not in said
    done = sorted(path.name for path in out.iterdir())
    assert 2 <= len(done) < 300
    assert done == [f"ball_{number:03d}.nii.gz" for number in range(len(done))]
    for name in done:
        read_volume(out / name)
    assert f"{len(done)} predicted, 0 failed, {300 - len(done)} not begun" in told


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


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ZeroDivisionError("by\nzero"), 4, "bug of effseg.* ZeroDivisionError: by zero"),
        (MemoryError(), 3, "out of memory; give a smaller --memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 3, "give a smaller --memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "smaller --memory"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error .*Permission denied: '/x'"),
        (OSError(28, "No space left on device"), 3, "error .*No space left on device"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_nobody_expected_is_one_line_and_an_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    words: str,
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("effseg.dataset.read_dataset", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["effseg", "check", "x"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    said = capsys.readouterr().err.strip()
    assert re.search(words, said)
    assert "\n" not in said
    assert "Traceback" not in said
    written = list(tmp_path.iterdir())
    if code == 4:
        assert str(written[0]) in said
        assert "ZeroDivisionError" in written[0].read_text().splitlines()[-2]
    assert len(written) == (code == 4)


def test_an_interrupted_training_says_so_and_keeps_its_run(
    tiny_dataset: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    plan, run = tiny_plan.save(tmp_path / "tiny.json"), tmp_path / "run"
    command = [sys.executable, "-m", "effseg.cli", "train", str(tiny_dataset), "--out", str(run)]
    command += ["--plan", str(plan), "--epochs", "10000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as going:
        try:
            while going.poll() is None and not (run / "run.json").exists():
                time.sleep(0.1)
            going.send_signal(signal.SIGINT)
            _, said = going.communicate(timeout=120)
        finally:
            going.kill()
    assert going.returncode == 130, said
    assert said.strip().endswith("stopped")
    assert "Traceback" not in said
    assert RunRecord.load(run / "run.json").stopped_by == "interrupt"
