"""Places where models agree against a reference: worked phantoms, and runs that judge."""

import csv
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from effseg import cli
from effseg.errors import DataError, GeometryError
from effseg.evaluation.disagreement import Place, Vote, find_places
from effseg.inference import predict
from effseg.io import read_volume, write_volume
from effseg.plans import Plan
from effseg.record import PLAN, RECORD, WEIGHTS
from effseg.suspects import find_suspects
from effseg.types import Array
from effseg.volume import Grid, Volume

GRID = Grid(shape=(20, 22, 24), spacing=(2.0, 1.0, 1.0), origin=(5.0, -3.0, 10.0))
BALL = (slice(4, 8), slice(6, 12), slice(6, 12))
EXTRA = (slice(13, 16), slice(15, 18), slice(16, 20))


def vote(folder: Path, labels: Array, confidence: float | Array, *, grid: Grid = GRID) -> Vote:
    shares = np.broadcast_to(np.float32(confidence), grid.shape).astype(np.float32)
    n = len(list(folder.iterdir()))
    return Vote(
        write_volume(Volume(labels.astype(np.uint8), grid), folder / f"{n}_labels.nii.gz"),
        write_volume(Volume(shares, grid), folder / f"{n}_confidence.nii.gz"),
    )


def places_of(
    reference: Array,
    votes: list[Vote],
    *,
    agreement: float = 0.75,
    tolerance_mm: float = 0.0,
    ignore_label: int | None = None,
) -> tuple[Place, ...]:
    return find_places(
        Volume(reference.astype(np.uint8), GRID),
        votes,
        agreement=agreement,
        tolerance_mm=tolerance_mm,
        ignore_label=ignore_label,
    )


def test_a_place_has_the_volume_the_votes_and_the_probability_of_its_voxels(
    tmp_path: Path,
) -> None:
    reference = np.zeros(GRID.shape)
    reference[BALL] = 1
    right, wrong = reference.copy(), reference.copy()
    wrong[EXTRA] = 2
    less = wrong.copy()
    less[15, 15:18, 16:20] = 0  # one model finds two of the three planes
    votes = [
        vote(tmp_path, array, share)
        for array, share in ((wrong, 0.9), (wrong, 0.8), (wrong, 0.7), (less, 0.6))
    ]
    (place,) = places_of(reference, votes)
    n = 3 * 3 * 4
    assert (place.reference_label, place.models_label) == (0, 2)
    assert place.volume_mm3 == 2.0 * n
    assert place.agreement == pytest.approx((3 * n + 24) / (4 * n))
    assert place.mean_probability == pytest.approx((2.4 * n + 0.6 * 24) / (3 * n + 24))
    assert place.score == pytest.approx(2.0 * n * place.agreement * place.mean_probability)
    index = GRID.world_to_index(np.asarray(place.point_mm)).round().astype(int)
    assert wrong[tuple(index)] == 2
    assert index[0] == 14  # the middle plane
    (all_agree,) = places_of(reference, votes, agreement=1.0)
    assert all_agree.volume_mm3 == 2.0 * 24
    votes = [vote(tmp_path, array, 0.9) for array in (wrong, wrong, right, right)]
    assert places_of(reference, votes) == ()  # half are no majority


def test_an_outline_that_runs_a_little_differently_is_no_mistake(tmp_path: Path) -> None:
    reference = np.zeros(GRID.shape)
    reference[BALL] = 1
    wider = np.zeros(GRID.shape)
    wider[4:8, 4:14, 6:12] = 1  # two voxels of 1 mm to either side
    one = [vote(tmp_path, wider, 0.9)]
    assert sum(place.volume_mm3 for place in places_of(reference, one)) == 2.0 * 4 * 4 * 6
    beyond = places_of(reference, one, tolerance_mm=1.0)
    assert [place.volume_mm3 for place in beyond] == [2.0 * 4 * 6] * 2
    assert places_of(reference, one, tolerance_mm=2.0) == ()
    missed = [vote(tmp_path, np.zeros(GRID.shape), 0.9)]
    (core,) = places_of(reference, missed, tolerance_mm=2.0)  # what is deep inside of the ball
    assert core.volume_mm3 == 2.0 * 2 * 2 * 2
    assert (core.reference_label, core.models_label) == (1, 0)


def test_places_of_two_pairs_of_labels_are_apart_and_the_unknown_is_no_place(
    tmp_path: Path,
) -> None:
    reference = np.zeros(GRID.shape)
    reference[BALL] = 1
    reference[EXTRA] = 9
    found = np.zeros(GRID.shape)
    found[4:8, 6:12, 6:14] = 3  # on the ball, and two columns beside it
    found[EXTRA] = 3
    made = places_of(reference, [vote(tmp_path, found, 1.0)], ignore_label=9)
    assert [(place.reference_label, place.volume_mm3) for place in made] == [
        (1, 2.0 * 4 * 6 * 6),
        (0, 2.0 * 4 * 6 * 2),
    ]
    assert places_of(found, [vote(tmp_path, found, 1.0)]) == ()


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    empty = np.zeros(GRID.shape)
    one = [vote(tmp_path, empty, 1.0)]
    with pytest.raises(DataError, match="no model to judge by"):
        places_of(empty, [])
    with pytest.raises(DataError, match=r"agreement 0.5; expected a share above 0.5"):
        places_of(empty, one, agreement=0.5)
    with pytest.raises(DataError, match="tolerance_mm -1; expected"):
        places_of(empty, one, tolerance_mm=-1)
    other = Grid(shape=GRID.shape)
    with pytest.raises(GeometryError, match="differ in spacing"):
        places_of(empty, [vote(tmp_path, empty, 1.0, grid=other)])


def test_a_whole_organ_of_disagreement_takes_a_few_maps_of_memory(tmp_path: Path) -> None:
    grid = Grid(shape=(96, 128, 128))
    reference, found = (np.zeros(grid.shape, np.uint8) for _ in range(2))
    reference[20:30, 20:30, 20:30] = 1
    found[10:90, 10:120, 10:120] = 1  # six voxels of ten
    votes = [vote(tmp_path, found, 0.9, grid=grid) for _ in range(3)]
    tracemalloc.start()
    places = find_places(Volume(reference, grid), votes, agreement=1.0, tolerance_mm=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert places[0].volume_mm3 > found.sum() * 0.9
    assert peak < 16 * grid.n_voxels  # a coordinate of every voxel alone would be 24


def test_how_sure_a_network_is_lies_beside_its_labels(
    tiny_run: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    image, out = tiny_dataset / "images" / "ball_0.nii.gz", tmp_path / "a.nii.gz"
    labels = predict(tiny_run, image, out=out, probabilities=(0, 1, 2), confidence=True)
    shares = [read_volume(tmp_path / f"probability_{i}" / out.name).array for i in range(3)]
    sure = read_volume(tmp_path / "confidence" / out.name).array
    np.testing.assert_allclose(sure, np.max(shares, axis=0), atol=1e-5)
    assert labels.array.max() > 0


@pytest.fixture
def judged(tiny_run: Path, tiny_dataset: Path, tmp_path: Path) -> tuple[list[Path], Path]:
    """Two runs of different folds, and the balls with a planted mistake in a case of each."""
    data = shutil.copytree(tiny_dataset, tmp_path / "balls")
    runs = []
    for number, held_out in enumerate((("ball_0", "ball_1"), ("ball_1", "ball_2"))):
        run = tmp_path / "runs" / f"fold_{number}"
        run.mkdir(parents=True)
        for name in (PLAN, WEIGHTS):
            shutil.copy(tiny_run / name, run / name)
        record = json.loads((tiny_run / RECORD).read_text())
        names = [f"ball_{i}" for i in range(6)]
        record["train"] = [name for name in names if name not in held_out]
        record["validation"] = list(held_out)
        (run / RECORD).write_text(json.dumps(record))
        runs.append(run)
    # the reference of ball_1 is empty but for a corner: the models will miss the ball in it
    path = data / "labels" / "ball_1.nii.gz"
    label = read_volume(path)
    planted = np.zeros_like(label.array)
    planted[0, 0, 0] = 1
    write_volume(Volume(planted, label.grid), path)
    return runs, data


def test_each_case_is_judged_by_the_runs_that_did_not_train_on_it(
    judged: tuple[list[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, data = judged
    out = tmp_path / "out"
    arguments = ["suspects", *map(str, runs), "--data", str(data), "--out", str(out)]
    cli.app([*arguments, "--memory", "1GiB"], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "3 judged cases; 3 could not be judged: every run trained on them" in said
    found = sorted(str(path.relative_to(out)) for path in out.rglob("ball_*.nii.gz"))
    assert found == sorted(
        f"predictions/{judge}/{part}{case}.nii.gz"
        for judge, cases in (("1_fold_0", (0, 1)), ("2_fold_1", (1, 2)))
        for part in ("", "confidence/")
        for case in (f"ball_{i}" for i in cases)
    )
    with (out / "suspects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["case"] == "ball_1"
    assert (rows[0]["reference_label"], rows[0]["n_models"]) == ("background", "2")
    assert float(rows[0]["volume_mm3"]) > 100
    page = (out / "suspects.html").read_text()
    assert re.findall(r'data-case="(\w+)"', page)[0] == "ball_1"
    assert page.count('class="prediction"') >= 3
    assert page.count('class="other"') >= 3
    # a prediction that is lost is made again, the others stay; another run's folder is refused
    lost, kept = (out / "predictions" / "2_fold_1" / f"ball_{i}.nii.gz" for i in (1, 2))
    lost.unlink()
    before = kept.stat().st_mtime_ns
    again = find_suspects(runs, data, out=out, tolerance_mm=500.0)
    assert lost.exists()
    assert kept.stat().st_mtime_ns == before
    assert {place.models_label for case in again.cases for place in case.places} <= {2}
    with pytest.raises(DataError, match="not empty, and not of these runs and data"):
        find_suspects(runs[:1], data, out=out)


def test_runs_of_other_data_or_labels_do_not_judge(
    judged: tuple[list[Path], Path], tmp_path: Path
) -> None:
    runs, data = judged
    record = json.loads((runs[0] / RECORD).read_text())
    (runs[0] / RECORD).write_text(json.dumps(record | {"train": ["lung_1", "ball_0"]}))
    with pytest.raises(DataError, match="1 of its 2 training cases, lung_1 for one, are not in"):
        find_suspects(runs, data, out=tmp_path / "out")
    everything = [f"ball_{i}" for i in range(6)]
    (runs[0] / RECORD).write_text(json.dumps(record | {"train": everything}))
    with pytest.raises(DataError, match="each of 1 runs trained on all of 6 cases"):
        find_suspects(runs[:1], data, out=tmp_path / "out")
    plan = Plan.load(runs[1] / PLAN)
    named = plan.labels[1].model_copy(update={"name": "shell"})
    labels = (plan.labels[0], named, *plan.labels[2:])
    plan.model_copy(update={"labels": labels}).save(runs[1] / PLAN)
    with pytest.raises(DataError, match="only runs of the same labels can judge together"):
        find_suspects(runs, data, out=tmp_path / "out")
