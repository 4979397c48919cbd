"""Zarr stores as images and as label maps of a prediction."""

import sys
from pathlib import Path

import numpy as np
import pytest
from test_stream_files import Counting, image, stopped
from typer.testing import CliRunner

from effseg import evaluate
from effseg.cli.application import app
from effseg.errors import DataError, PlanError
from effseg.inference import Predictor, find_images, load_run, predict, predict_cases
from effseg.io import StoredVolume, read_volume, write_volume
from effseg.volume import Grid, Volume

GRID = Grid((40, 9, 11), spacing=(2.0, 1.0, 1.5), origin=(4.0, 5.0, -6.0))


def test_without_zarr_the_way_to_have_it_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    (tmp_path / "in.zarr").mkdir()
    for given, out in ((tmp_path / "in.zarr", None), (image(9, 9, 9), tmp_path / "out.zarr")):
        with pytest.raises(DataError, match=r'pip install "effseg\[zarr\]"'):
            Predictor(Counting(), (8, 8, 8)).predict(given, out)


@pytest.mark.parametrize("shape", [(24, 9, 11), (9, 11, 24)])
def test_labels_are_those_of_memory(shape, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    volume = Volume(array=image(*shape), grid=Grid(shape=shape, spacing=(2, 1, 1)))
    expected = Predictor(Counting(), (8, 8, 8)).predict(volume)
    path = write_volume(volume, tmp_path / "in.zarr")
    array = zarr.create_array(tmp_path / "array.zarr", data=volume.array, chunks=(16, 4, 3))
    predictor = Predictor(Counting(), (8, 8, 8))
    for given in (volume, path, array):
        got = predictor.predict(given, tmp_path / "out.zarr")
        assert isinstance(got, StoredVolume)
        assert given is array or got.grid == volume.grid
        np.testing.assert_array_equal(got.array, expected.array)
    assert got.array.dtype == np.uint8


def test_a_stopped_prediction_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    x, out, whole = image(64, 12, 12), tmp_path / "out.zarr", Counting()
    expected = Predictor(whole, (8, 8, 8)).predict(x).array
    stopped(Counting(stop=40), x, out, resume=True)
    assert not out.exists()
    again = Counting()
    got = Predictor(again, (8, 8, 8)).predict(x, out, resume=True)
    np.testing.assert_array_equal(got.array, expected)
    assert again.n_windows < whole.n_windows - 8  # 4 a layer: a row of chunks was there at least
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_a_folder_of_stores_is_labelled_and_scored(
    tiny_run: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    pytest.importorskip("zarr")
    for n in range(2):
        for kind in ("images", "labels"):
            volume = read_volume(tiny_dataset / kind / f"ball_{n}.nii.gz")
            write_volume(volume, tmp_path / kind / f"ball_{n}.zarr")
    run = load_run(tiny_run)
    cases = list(find_images([tmp_path / "images"]).values())
    assert [case.name for case in cases] == ["ball_0", "ball_1"]
    out = tmp_path / "out"
    results = predict_cases(run, cases, out=out, suffix=".zarr", memory="200MiB")
    assert [result.path.name for result in results] == ["ball_0.zarr", "ball_1.zarr"]
    assert all(result.error is None for result in results)
    for n in range(2):
        alone = predict(run, tiny_dataset / "images" / f"ball_{n}.nii.gz")
        got = read_volume(out / f"ball_{n}.zarr")
        np.testing.assert_array_equal(got.array, alone.array)
        assert got.grid.difference(alone.grid) is None
    again = predict_cases(run, cases, out=out, suffix=".zarr", skip_existing=True)
    assert all(result.kept for result in again)
    assert evaluate(out, tmp_path / "labels").cases
    one = evaluate(out / "ball_0.zarr", tiny_dataset / "labels" / "ball_0.nii.gz")
    assert len(one.cases) == 1
    with pytest.raises(PlanError, match=r"suffix '\.tif'; expected one of \.nii\.gz"):
        predict_cases(run, cases, out=out, suffix=".tif")


def test_the_command_line_writes_stores(tiny_run: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    case = tiny_dataset / "images" / "ball_0.nii.gz"
    arguments = ("predict", tiny_run, case, "--out", tmp_path, "--suffix", ".zarr")
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["ball_0.zarr"]
    assert read_volume(tmp_path / "ball_0.zarr").array.any()
