"""Several models through one network: weights that take turns, folds, seeds and snapshots."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from effseg.cli.application import app
from effseg.errors import CheckpointError, PlanError
from effseg.inference import Predictor, Run, forecast, load_run, load_runs, predict
from effseg.io import read_volume
from effseg.memory import measure_peak
from effseg.networks import WeightsFile, build_network
from effseg.plans import Plan
from effseg.training import train

PATCH = (8, 8, 8)


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)


def networks_of(n: int, *, out_channels: int = 3) -> list[nn.Module]:
    return [
        nn.Sequential(
            nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, out_channels, 1)
        ).eval()
        for _ in range(n)
    ]


def files_of(networks: list[nn.Module], folder: Path) -> list[WeightsFile]:
    folder.mkdir(parents=True, exist_ok=True)
    for index, network in enumerate(networks):
        save_file(network.state_dict(), folder / f"{index}.safetensors")
    return [WeightsFile.open(folder / f"{index}.safetensors") for index in range(len(networks))]


@pytest.mark.parametrize("out_channels", [3, 40])  # logits are blended, or features and a head
def test_weights_that_take_turns_give_the_mean_of_several_networks(
    tmp_path: Path, out_channels
) -> None:
    networks, x = networks_of(3, out_channels=out_channels), image(12, 10, 9)
    files = files_of(networks, tmp_path)
    expected = Predictor(networks, PATCH, window_batch=3).logits(x)
    one = networks_of(1, out_channels=out_channels)
    predictor = Predictor(one, PATCH, weights=[files], window_batch=3)
    np.testing.assert_array_equal(predictor.logits(x), expected)
    np.testing.assert_array_equal(predictor.logits(x), expected)  # whoever was in it last
    assert (predictor.slabs(x).head is not None) == (out_channels == 40)
    alone = [Predictor(network, PATCH).logits(x) for network in networks]
    np.testing.assert_allclose(expected, np.mean(alone, axis=0), atol=1e-4)
    mixed = Predictor([networks[2], one[0]], PATCH, weights=[[], files[:2]]).logits(x)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_memory_does_not_grow_with_the_models(tmp_path: Path) -> None:
    x, files = image(24, 16, 16), files_of(networks_of(6), tmp_path)

    def peak_bytes(n_models: int) -> int:
        (network,) = networks_of(1)
        predictor = Predictor(network, (16, 16, 16), weights=[files[:n_models]])
        predictor.slabs(x)  # what is blended is found before

        def run() -> None:
            for _, part in predictor.slabs(x).parts:
                del part

        return measure_peak(run).peak_bytes

    assert peak_bytes(2) == peak_bytes(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_come_as_they_were_written(tmp_path: Path, dtype, monkeypatch) -> None:
    monkeypatch.setattr("effseg.networks.weights.STAGED_BYTES", 100)
    state = {
        "weight": torch.randn(5, 3, 3, 3, 3),
        "bias": torch.randn(5),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = WeightsFile.open(tmp_path / "a.safetensors")

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in state.items():
                fresh = torch.empty_like(tensor)
                self.register_buffer(name, fresh.to(dtype) if fresh.is_floating_point() else fresh)

    network = Network()
    network.weight = network.weight.to(memory_format=torch.channels_last_3d)
    file.check(network, of="the test")
    file.fill(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype))
        assert torch.equal(file.tensor(name), state[name])
    with pytest.raises(CheckpointError, match="no tensor other"):
        file.tensor("other")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-4], "cut short"),
        (lambda content: content[:40], "no header of a safetensors file"),
        (lambda content: content.replace(b'"F32"', b'"F99"', 1), "numbers of type F99"),
        (lambda content: content[:8] + b"[" + content[9:], "cannot be read"),
        (lambda content: b"", "no header"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change, words) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(30)}, path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=words) as caught:
        WeightsFile.open(path)
    assert str(path) in str(caught.value)


def test_a_file_that_shrinks_later_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    network = nn.Conv3d(1, 2, 3)
    save_file(network.state_dict(), path)
    file = WeightsFile.open(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cut short"):
        file.fill(network)


@pytest.fixture
def folds(tiny_run: Path, tmp_path: Path) -> list[Path]:
    """Three runs of one plan, as of three seeds."""
    runs = [tiny_run]
    for index in (1, 2):
        run = shutil.copytree(tiny_run, tmp_path / f"run_{index}")
        state = load_file(run / "model.safetensors")
        noise = torch.Generator().manual_seed(index)
        changed = {
            name: t + 0.05 * torch.randn(t.shape, generator=noise) * t.abs().mean()
            for name, t in state.items()
        }
        save_file(changed, run / "model.safetensors")
        runs.append(run)
    return runs


def test_runs_of_one_network_are_one_run_whose_weights_take_turns(
    folds: list[Path], tiny_dataset: Path
) -> None:
    path = tiny_dataset / "images" / "ball_0.nii.gz"
    (joined,) = load_runs(folds)
    assert joined.n_models == 3
    apart = [load_run(folder) for folder in folds]
    state = {name: t.clone() for name, t in apart[0].network.state_dict().items()}
    by_files = predict(folds, path).array
    # runs without files are networks of their own, all in memory
    networks = [Run(folder=one.folder, plan=one.plan, network=one.network) for one in apart]
    assert len(load_runs(networks)) == 3
    np.testing.assert_array_equal(by_files, predict(networks, path).array)
    np.testing.assert_array_equal(by_files, predict(apart, path).array)
    # and a loaded run stays what it was
    assert all(torch.equal(t, state[name]) for name, t in apart[0].network.state_dict().items())
    grid = read_volume(path).grid
    assert forecast(folds, grid).parts == forecast(folds[:2], grid).parts
    assert forecast(networks, grid).parts["weights"] == 3 * forecast(folds, grid).parts["weights"]


def test_a_stopped_prediction_goes_on_only_with_the_same_models(
    folds: list[Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    case, out = tiny_dataset / "images" / "ball_0.nii.gz", tmp_path / "out" / "a.nii.gz"
    expected = predict(folds, case).array

    def stop(done: int, total: int) -> None:
        if done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(folds, case, out=out, resume=True, progress=stop)
    np.testing.assert_array_equal(predict(folds, case, out=out, resume=True).array, expected)


def test_misfits_are_refused(folds: list[Path]) -> None:
    plan = Plan.load(folds[2] / "plan.json")
    plan.model_copy(update={"spacing": (9.0, 9.0, 9.0)}).save(folds[2] / "plan.json")
    with pytest.raises(CheckpointError, match="differ in spacing"):
        load_runs(folds)
    with pytest.raises(CheckpointError, match="no run"):
        load_runs([])
    with pytest.raises(CheckpointError, match=r"training\.snapshots"):
        load_run(folds[0], snapshots=True)
    state = load_file(folds[1] / "model.safetensors")
    save_file(state | {"more": torch.zeros(1)}, folds[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor more is not in"):
        load_runs(folds[:2])
    with pytest.raises(PlanError, match="weights of 1 networks for 2"):
        Predictor(networks_of(2), PATCH, weights=[[]])


def test_a_training_keeps_snapshots_to_average(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    training = tiny_plan.training.model_copy(update={"epochs": 4, "snapshots": 2})
    plan = tiny_plan.model_copy(update={"training": training})
    run = train(plan, tiny_dataset, out=tmp_path / "run")
    files = sorted((run / "snapshots").iterdir())
    assert [file.name for file in files] == ["1.safetensors", "2.safetensors"]
    states: list[dict[str, Tensor]] = [load_file(file) for file in files]
    assert any(not torch.equal(states[0][name], t) for name, t in states[1].items())
    loaded = load_run(run, snapshots=True)
    assert loaded.n_models == 2
    path = tiny_dataset / "images" / "ball_0.nii.gz"
    networks = []
    for state in states:
        network = build_network(plan.network)
        network.load_state_dict(state)
        networks.append(Run(folder=run, plan=loaded.plan, network=network.eval()))
    np.testing.assert_array_equal(predict(loaded, path).array, predict(networks, path).array)


def test_the_command_line_averages_runs(
    folds: list[Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    image = tiny_dataset / "images" / "ball_0.nii.gz"
    also = [word for run in folds[1:] for word in ("--also", str(run))]
    out = ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["predict", str(folds[0]), str(image), *out, *also])
    assert done.exit_code == 0, done.output
    assert "3 models are averaged" in done.output
    written = read_volume(tmp_path / "out" / "ball_0.nii.gz").array
    np.testing.assert_array_equal(written, predict(folds, image).array)
