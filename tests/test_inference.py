"""Sliding windows against MONAI's, and runs against new images."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effseg.dataset import Case
from effseg.errors import CheckpointError, DataError, MemoryBudgetError, PlanError
from effseg.inference import Predictor, find_images, forecast, load_run, predict
from effseg.io import read_volume, write_volume
from effseg.memory import trace_forward
from effseg.plans import PostprocessConfig
from effseg.tiling import gaussian_weights
from effseg.volume import Grid, Volume


class Pointwise(nn.Module):
    """Three logits that depend on the voxel alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x * x - 1, 0.5 - x), dim=1)


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(9, 10, 11), (3, 10, 4), (8, 8, 8), (17, 9, 8)])
@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("window_batch", [1, 3])
def test_a_pointwise_network_comes_through(shape, tta, window_batch) -> None:
    x = image(1, *shape)
    predictor = Predictor(Pointwise(), (8, 8, 8), tta=tta, window_batch=window_batch)
    expected = Pointwise()(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(predictor.logits(x), expected, atol=1e-5)


def test_blending_agrees_with_monai() -> None:
    from monai.inferers import sliding_window_inference

    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 5, padding=2)
    x = image(1, 12, 16, 20)
    # lengths at which both place the same windows
    expected = sliding_window_inference(
        torch.from_numpy(x)[None],
        (8, 8, 8),
        1,
        network,
        overlap=0.5,
        roi_weight_map=torch.from_numpy(gaussian_weights((8, 8, 8))),
    )
    got = Predictor(network, (8, 8, 8)).logits(x)
    np.testing.assert_allclose(got, expected[0].detach().numpy(), atol=1e-5)


def test_mirrors_average_what_the_network_sees_mirrored() -> None:
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 3, padding=1)
    x = torch.from_numpy(image(1, 6, 6, 6))
    axes = [(), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)]
    expected = torch.stack([network(x.flip(a)[None])[0].flip(a) for a in axes]).mean(0)
    got = Predictor(network, (6, 6, 6), tta=True).logits(x.numpy())
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)


def test_labels_lie_on_the_image(tmp_path: Path) -> None:
    volume = Volume(array=image(9, 9, 9), grid=Grid(shape=(9, 9, 9), spacing=(2, 1, 1)))
    labels = Predictor(Pointwise(), (8, 8, 8)).predict(volume, tmp_path / "out.nii.gz")
    assert labels.grid == volume.grid
    assert labels.array.dtype == np.uint8
    np.testing.assert_array_equal(read_volume(tmp_path / "out.nii.gz").array, labels.array)


def test_the_first_of_several_outputs_counts() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [Pointwise()(x), x[:, :, ::2]]

    x = image(1, 8, 8, 8)
    got = Predictor(Several(), (8, 8, 8)).logits(x)
    np.testing.assert_allclose(got, Pointwise()(torch.from_numpy(x)[None])[0], atol=1e-6)


def test_logits_that_are_not_finite_are_refused() -> None:
    x = image(1, 8, 8, 8)
    x[0, 3, 3, 3] = np.inf
    with pytest.raises(DataError, match="not finite"):
        Predictor(Pointwise(), (8, 8, 8)).logits(x)


@pytest.mark.parametrize(
    "arguments",
    [{"overlap": 1.0}, {"window_batch": 0}, {"device": "abacus"}, {"patch_size": (0, 8, 8)}],
)
def test_choices_out_of_range_are_refused(arguments) -> None:
    with pytest.raises(PlanError):
        Predictor(Pointwise(), **({"patch_size": (8, 8, 8)} | arguments))


def test_a_run_labels_an_image_on_its_own_grid(
    tiny_run: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    path = tiny_dataset / "images" / "ball_0.nii.gz"
    labels = predict(tiny_run, path, out=tmp_path / "ball_0.nii.gz")
    assert labels.grid.difference(read_volume(path).grid, tolerance=1e-6) is None
    case = Case(name="ball_0", images=(path,), label=None)
    np.testing.assert_array_equal(predict(tiny_run, case).array, labels.array)


def test_postprocessing_may_be_chosen_anew(tiny_run: Path, tiny_dataset: Path) -> None:
    path = tiny_dataset / "images" / "ball_0.nii.gz"
    nothing_left = predict(tiny_run, path, postprocess=PostprocessConfig(minimum_mm3=1e9))
    assert not nothing_left.array.any()


def test_a_budget_is_kept_or_refused_before_anything_is_read(
    tiny_run: Path, tiny_dataset: Path
) -> None:
    path = tiny_dataset / "images" / "ball_0.nii.gz"
    needed = forecast(tiny_run, read_volume(path).grid, file_voxel_bytes=4).peak_bytes
    assert predict(tiny_run, path, memory=needed).array.any()
    with pytest.raises(MemoryBudgetError, match=r"--memory \d+MiB would do") as caught:
        predict(tiny_run, path, memory="1MiB")
    least = re.search(r"--memory (\d+MiB)", str(caught.value))
    assert least is not None
    assert predict(tiny_run, path, memory=least[1]).array.any()


def test_a_forecast_grows_with_the_image(tiny_run: Path) -> None:
    run = load_run(tiny_run)
    small, large = (forecast(run, Grid(shape=(n, n, n))).peak_bytes for n in (32, 64))
    assert large > small


def test_a_run_is_traced_once_for_all_its_images(
    tiny_run: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []

    def counted(*args, **kwargs):
        traced.append(kwargs["device"])
        return trace_forward(*args, **kwargs)

    monkeypatch.setattr("effseg.inference.tracing.trace_forward", counted)
    run = load_run(tiny_run)
    predict(run, tiny_dataset / "images" / "ball_0.nii.gz")
    predict(run, tiny_dataset / "images" / "ball_1.nii.gz")
    forecast(run, Grid(shape=(64, 64, 64)), device="cuda")
    forecast(run, Grid(shape=(96, 64, 64)), device="cuda:1")
    assert traced == ["cpu", "cuda"]


def test_where_the_planned_device_is_not_here_the_cpu_predicts_and_it_is_said(
    tiny_run: Path,
    tiny_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    path = tiny_dataset / "images" / "ball_0.nii.gz"
    here = load_run(tiny_run)
    expected = predict(here, path)
    assert not caplog.records
    away = dataclasses.replace(here, plan=here.plan.model_copy(update={"device": "cuda:1"}))
    for _ in range(2):
        np.testing.assert_array_equal(predict(away, path).array, expected.array)
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "planned for cuda:1, which is not here" in warning.getMessage()
    assert forecast(away, expected.grid) == forecast(here, expected.grid)
    with pytest.raises(PlanError, match="sees 0 CUDA devices here"):
        predict(here, path, device="cuda")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: (run / "model.safetensors").unlink(), "has not finished an epoch"),
        (lambda run: (run / "plan.json").unlink(), "not a run that can be used"),
        (lambda run: (run / "model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    ],
)
def test_broken_runs_are_refused_by_name(tiny_run: Path, tmp_path: Path, change, words) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    change(run)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_run(run)
    assert str(run) in str(caught.value)


def test_weights_of_another_network_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    state = load_file(run / "model.safetensors")
    state["stem.weight"] = state["stem.weight"][:4].clone()
    save_file(state, run / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"stem.weight has shape"):
        load_run(run)


def test_inputs_are_found(tmp_path: Path) -> None:
    volume = Volume(array=np.zeros((4, 4, 4), np.int16), grid=Grid(shape=(4, 4, 4)))
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        write_volume(volume, tmp_path / "in" / f"{name}.nii.gz")
    cases = find_images([tmp_path / "in"], n_channels=2)
    assert list(cases) == ["a", "b"]
    assert [path.name for path in cases["a"].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    with pytest.raises(DataError, match="2 channel files; the network takes 3"):
        find_images([tmp_path / "in"], n_channels=3)
    with pytest.raises(DataError, match="no such file"):
        find_images([tmp_path / "none"])


def test_a_folder_of_images_is_listed_as_a_data_set_is(tmp_path: Path) -> None:
    volume = Volume(array=np.zeros((4, 4, 4), np.int16), grid=Grid(shape=(4, 4, 4)))
    path = write_volume(volume, tmp_path / "a.nii.gz")
    path.rename(tmp_path / "A.NII.GZ")
    (tmp_path / "._A.NII.GZ").write_bytes(b"of another disk")
    (tmp_path / "notes.txt").write_text("no volume")
    (tmp_path / "folder.zip").mkdir()
    (case,) = find_images([tmp_path]).values()
    assert (case.name, case.images) == ("A", (tmp_path / "A.NII.GZ",))
    (folder,) = find_images([tmp_path / "folder.zip"]).values()
    assert folder.images == (tmp_path / "folder.zip",)
