import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effseg.dataset import (
    Case,
    Dataset,
    audit,
    case_and_channel,
    folds,
    read_case,
    read_dataset,
    read_image,
    read_label,
)
from effseg.errors import DataError, GeometryError
from effseg.io import write_volume
from effseg.volume import Grid, Volume

GRID = Grid(shape=(4, 5, 6), spacing=(2.5, 0.7, 0.7), origin=(10.0, -20.0, 30.0))
LABELS = {"background": 0, "liver": 1, "tumour": 2}


def image_array(seed: int = 0, *, dtype: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, GRID.shape).astype(dtype)


def label_array(*, dtype: Any = np.uint8) -> np.ndarray:
    array = np.zeros(GRID.shape, dtype)
    array[1:3, 1:3, 1:3], array[2, 2, 2:4] = 1, 2
    return array


def put(path: Path, array: np.ndarray, grid: Grid = GRID) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(Volume(array=array, grid=grid), path)
    return path


def describe(root: Path, **content: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def make_folders(
    root: Path, names: tuple[str, ...] = ("case_01", "case_07"), *, suffix: str = ".nii.gz"
) -> Path:
    for number, name in enumerate(names):
        put(root / "images" / f"{name}{suffix}", image_array(number))
        put(root / "labels" / f"{name}{suffix}", label_array())
    return root


def make_nnunet(root: Path, *, n_channels: int = 2, n_cases: int = 2, **content: Any) -> Path:
    for number in range(n_cases):
        for channel in range(n_channels):
            file = root / "imagesTr" / f"case_{number:02d}_{channel:04d}.nii.gz"
            put(file, image_array(10 * number + channel))
        put(root / "labelsTr" / f"case_{number:02d}.nii.gz", label_array())
    facts: dict[str, Any] = {
        "channel_names": {str(channel): f"T{channel}" for channel in range(n_channels)},
        "labels": LABELS,
        "numTraining": n_cases,
        "file_ending": ".nii.gz",
    }
    describe(root, **{**facts, **content})
    return root


def make_msd(root: Path, **content: Any) -> Path:
    training = []
    for number, name in enumerate(("hippo_003", "hippo_001")):
        put(root / "imagesTr" / f"{name}.nii.gz", image_array(number))
        put(root / "labelsTr" / f"{name}.nii.gz", label_array())
        training.append(
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        )
    facts: dict[str, Any] = {
        "modality": {"0": "MRI"},
        "labels": {str(value): name for name, value in LABELS.items()},
        "numTraining": 2,
        "training": training,
        "test": ["./imagesTs/hippo_002.nii.gz"],
    }
    describe(root, **{**facts, **content})
    return root


# Layouts


def test_nnunet_raw(tmp_path: Path) -> None:
    root = make_nnunet(tmp_path / "Dataset004_Two")
    (root / "labelsTr" / "._case_00.nii.gz").write_bytes(b"left by macOS")
    dataset = read_dataset(root)
    assert (dataset.name, dataset.layout, dataset.root) == ("Dataset004_Two", "nnunet", root)
    assert [case.name for case in dataset.cases] == ["case_00", "case_01"]
    assert [file.name for file in dataset.cases[1].images] == [
        "case_01_0000.nii.gz",
        "case_01_0001.nii.gz",
    ]
    assert dataset.channel_names == ("T0", "T1")
    assert dataset.labels == {0: "background", 1: "liver", 2: "tumour"}
    assert dataset.ignore_label is None
    image, label = read_case(dataset.cases[0])
    assert image.array.shape == (2, *GRID.shape)
    np.testing.assert_array_equal(image.array[1], image_array(1))
    np.testing.assert_array_equal(label.array, label_array())
    assert image.grid.difference(GRID) is None


def test_nnunet_ignore_label_is_no_label(tmp_path: Path) -> None:
    dataset = read_dataset(make_nnunet(tmp_path, labels={**LABELS, "ignore": 3}))
    assert dataset.ignore_label == 3
    assert dataset.labels == {0: "background", 1: "liver", 2: "tumour"}


def test_nnunet_files_listed_in_the_description(tmp_path: Path) -> None:
    files = {
        "p1": {
            "images": ["imagesTr/case_00_0000.nii.gz", "imagesTr/case_00_0001.nii.gz"],
            "label": "labelsTr/case_00.nii.gz",
        }
    }
    dataset = read_dataset(make_nnunet(tmp_path, dataset=files))
    assert [case.name for case in dataset.cases] == ["p1"]
    assert len(dataset.cases[0].images) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, r"'whole' is a region, \[1, 2\]"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "'a' and 'b' both have the value 1"),
        ({"labels": {"a": 1}}, "no label has the value 0"),
        ({"labels": {"background": 0, "a": 1.5}}, "labels .* expected"),
        ({"labels": {"background": 0, "a": True}}, "labels .* expected"),
        ({"labels": {"background": 0, "a": -1}}, "labels .* expected"),
        ({"labels": ["background", "a"]}, "labels .* expected"),
        ({"labels": {"0": "background", "1": "ignore", "2": "ignore"}}, "all named"),
        ({"channel_names": {"1": "CT"}}, r"channel_names numbered \[1\]"),
        ({"channel_names": ["CT"]}, "channel_names .* expected"),
        ({"file_ending": ".png"}, "file_ending '.png'; expected one of .*nii.gz"),
        ({"file_ending": ["x"]}, "file_ending"),
        ({"dataset": ["case_00"]}, '"dataset" is no object'),
    ],
)
def test_a_wrong_description_is_refused_by_name(
    tmp_path: Path, content: dict[str, Any], words: str
) -> None:
    root = make_nnunet(tmp_path, **content)
    with pytest.raises(DataError, match=words) as error:
        read_dataset(root)
    assert "dataset.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_nnunet_missing_parts_are_named(tmp_path: Path) -> None:
    root = make_nnunet(tmp_path, n_cases=3)
    (root / "imagesTr" / "case_00_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"channels _0000 to _0001: case_00 has _0000"):
        read_dataset(root)
    (root / "imagesTr" / "case_00_0000.nii.gz").unlink()
    (root / "labelsTr" / "case_02.nii.gz").unlink()
    with pytest.raises(DataError, match=r"without a label in labelsTr/: case_02; 1 .*: case_00"):
        read_dataset(root)


def test_nnunet_image_without_channel_number_is_named(tmp_path: Path) -> None:
    root = make_nnunet(tmp_path, n_channels=1)
    put(root / "imagesTr" / "case_09.nii.gz", image_array())
    with pytest.raises(DataError, match=r"case_09.nii.gz: no channel in the name"):
        read_dataset(root)


def test_decathlon(tmp_path: Path) -> None:
    root = make_msd(tmp_path / "Task04")
    content = json.loads((root / "dataset.json").read_text())
    content["training"].append(
        {"image": "./imagesTr/._hippo_001.nii.gz", "label": "./labelsTr/._hippo_001.nii.gz"}
    )
    describe(root, **content)
    dataset = read_dataset(root)
    assert (dataset.name, dataset.layout) == ("Task04", "msd")
    assert [case.name for case in dataset.cases] == ["hippo_003", "hippo_001"]
    assert dataset.labels == {0: "background", 1: "liver", 2: "tumour"}
    assert dataset.channel_names == ("MRI",)
    assert audit(dataset).findings == ()


def test_decathlon_channels_in_one_file(tmp_path: Path) -> None:
    root = make_msd(tmp_path, modality={"0": "T2", "1": "ADC"})
    both = np.stack([image_array(1), image_array(2)])
    put(root / "imagesTr" / "hippo_003.nii.gz", both)
    case = read_dataset(root).cases[0]
    np.testing.assert_array_equal(read_image(case).array, both)


def test_decathlon_list_over_files_split_in_channels(tmp_path: Path) -> None:
    root = make_msd(tmp_path)
    for name in ("hippo_001", "hippo_003"):
        file = root / "imagesTr" / f"{name}.nii.gz"
        file.rename(file.with_name(f"{name}_0000.nii.gz"))
    case = read_dataset(root).cases[0]
    assert case.name == "hippo_003"
    assert [file.name for file in case.images] == ["hippo_003_0000.nii.gz"]


@pytest.mark.parametrize(
    "entry",
    ["../secret.nii.gz", "imagesTr/../../secret.nii.gz", "/etc/passwd", ".", "", 7, None, []],
)
def test_an_entry_never_leads_out_of_the_folder(tmp_path: Path, entry: Any) -> None:
    root = make_msd(tmp_path / "data")
    put(tmp_path / "secret.nii.gz", image_array())
    label = "labelsTr/hippo_001.nii.gz"
    describe(root, labels=LABELS, training=[{"image": entry, "label": label}])
    with pytest.raises(DataError, match=r"dataset.json: entry .*; expected"):
        read_dataset(root)


def test_files_listed_but_absent_are_named_up_to_five(tmp_path: Path) -> None:
    training = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in "abcd"]
    root = make_msd(tmp_path, training=training)
    with pytest.raises(DataError, match=r"8 listed .*imagesTr/a.nii.gz, .* and 3 more; put") as e:
        read_dataset(root)
    assert "labelsTr/c.nii.gz" not in str(e.value)


def test_folders_with_and_without_suffix_differences(tmp_path: Path) -> None:
    root = make_folders(tmp_path)
    put(root / "images" / "case_09.nii", image_array(9))
    put(root / "labels" / "case_09.nii.gz", label_array())
    (root / "images" / "notes.txt").write_text("no volume")
    dataset = read_dataset(root)
    assert dataset.layout == "folders"
    assert [case.name for case in dataset.cases] == ["case_01", "case_07", "case_09"]
    assert (dataset.labels, dataset.channel_names) == (None, None)


def test_folders_with_channel_numbers_on_the_images(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        put(tmp_path / "images" / f"{name}.nii.gz", image_array())
    for name in "ab":
        put(tmp_path / "labels" / f"{name}.nii.gz", label_array())
    dataset = read_dataset(tmp_path)
    assert [len(case.images) for case in dataset.cases] == [2, 2]
    (tmp_path / "images" / "b_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"_0000 to _0001: b has _0000"):
        read_dataset(tmp_path)


def test_a_number_that_belongs_to_the_name_is_no_channel(tmp_path: Path) -> None:
    make_folders(tmp_path, ("scan_0001", "scan_0002"))
    assert [case.name for case in read_dataset(tmp_path).cases] == ["scan_0001", "scan_0002"]


def test_a_description_beside_the_folders_is_honoured(tmp_path: Path) -> None:
    root = make_folders(tmp_path)
    describe(root, labels={**LABELS, "ignore": 255}, modality={"0": "CT"})
    dataset = read_dataset(root)
    assert dataset.layout == "folders"
    assert dataset.channel_names == ("CT",)
    assert dataset.labels == {0: "background", 1: "liver", 2: "tumour"}
    assert dataset.ignore_label == 255


def test_missing_partners_are_named_up_to_five_a_side(tmp_path: Path) -> None:
    root = make_folders(tmp_path)
    for number in range(7):
        put(root / "images" / f"i{number}.nii.gz", image_array())
    put(root / "labels" / "lonely.nii.gz", label_array())
    with pytest.raises(DataError, match=r"7 without a label .*i0, .*i4 and 2 more; 1 .*lonely"):
        read_dataset(root)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    root = make_folders(tmp_path)
    put(root / "images" / "case_01.nii", image_array())
    with pytest.raises(DataError, match=r"case_01.nii and case_01.nii.gz are one name"):
        read_dataset(root)


def write_csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path


def test_csv_with_patients_and_names(tmp_path: Path) -> None:
    make_folders(tmp_path / "data")
    table = write_csv(
        tmp_path / "pairs.csv",
        "image,label,patient,name",
        "data/images/case_01.nii.gz,data/labels/case_01.nii.gz,anna,first",
        f"{tmp_path}/data/images/case_07.nii.gz,data/labels/case_07.nii.gz,,",
    )
    dataset = read_dataset(table)
    assert (dataset.name, dataset.layout, dataset.root) == ("pairs", "csv", tmp_path / "pairs.csv")
    assert [(case.name, case.patient) for case in dataset.cases] == [
        ("first", "anna"),
        ("case_07", None),
    ]
    assert audit(dataset).ok


def test_csv_names_take_in_folders_where_they_repeat(tmp_path: Path) -> None:
    lines = []
    for patient in ("p1", "p2"):
        image = put(tmp_path / patient / "T1.nii.gz", image_array()).relative_to(tmp_path)
        label = put(tmp_path / patient / "mask.nii.gz", label_array()).relative_to(tmp_path)
        lines.append(f"{image},{label}")
    dataset = read_dataset(write_csv(tmp_path / "t.csv", "image,label", *lines))
    assert [case.name for case in dataset.cases] == ["p1_T1", "p2_T1"]
    twice = write_csv(tmp_path / "twice.csv", "image,label", lines[0], lines[0])
    with pytest.raises(DataError, match="more than one case"):
        read_dataset(twice)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["image,label,pateint", "a,b,c"], "columns 'image', 'label', 'pateint'; expected"),
        (["image;label", "a;b"], "columns 'image;label'; expected"),
        (["image,image,label", "a,a,b"], "columns"),
        ([""], "columns none"),
        (["image,label", "a.nii.gz,"], "line 2 has no label"),
        (["image,label", "a.nii.gz"], "line 2 has no label"),
        (["image,label", "a,b,c"], "line 2 .* more than its 2 columns"),
        (["image,label", "a.nii.gz,b.nii.gz"], r"2 files are not there: a.nii.gz \(line 2\)"),
        (["image,label"], "without a case"),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        read_dataset(write_csv(tmp_path / "t.csv", *lines))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "..", " ", "a\tb"])
def test_a_case_name_is_fit_for_a_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="case name"):
        Case(name=name, images=(tmp_path / "a.nii.gz",), label=None)


def test_what_is_no_data_set_is_told_the_four_layouts(tmp_path: Path) -> None:
    (tmp_path / "stray.txt").write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, found in [
        (tmp_path, "found empty, stray.txt"),
        (empty, "found nothing"),
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "stray.txt", "a file, no data set"),
    ]:
        with pytest.raises(DataError, match=found) as error:
            read_dataset(path)
        words = str(error.value)
        assert str(path) in words
        assert "\n" not in words
        for layout in ("imagesTr/", '"training"', "images/ and labels/", ".csv"):
            assert layout in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"labels": ', "not JSON"),
        ("[1, 2]", "a JSON list"),
        ('{"labels": {"a": 0, "a": 1}}', "'a' stands in it twice"),
        ("[" * 200_000, "dataset.json"),
        ('{"training": {"image": 1}}', '"training" is no list'),
        ('{"training": []}', "without a case"),
    ],
)
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        read_dataset(tmp_path)
    assert "\n" not in str(error.value)


def test_a_huge_description_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "dataset.json").open("wb") as file:
        file.truncate(2**40)  # sparse: takes no room on the disk, would take a tebibyte to read
    with pytest.raises(DataError, match="1099511627776 bytes; expected at most"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("case_07_0001", ("case_07", 1)),
        ("case_07", ("case_07", None)),
        ("_0001", ("_0001", None)),
        ("case_00001", ("case_00001", None)),
    ],
)
def test_a_name_says_case_and_channel(name, expected) -> None:
    assert case_and_channel(name) == expected


# Reading a case


def one_case(tmp_path: Path, label: np.ndarray, grid: Grid = GRID) -> Case:
    return Case(
        name="case_07",
        images=(put(tmp_path / "image.nii.gz", image_array()),),
        label=put(tmp_path / "label.nii.gz", label, grid),
    )


@pytest.mark.parametrize(
    ("top", "dtype"), [(2, np.uint8), (255, np.uint8), (256, np.uint16), (12175, np.uint16)]
)
@pytest.mark.parametrize("stored", [np.float32, np.int32])
def test_labels_come_in_the_smallest_unsigned_type(
    tmp_path: Path, top: int, dtype: Any, stored: Any
) -> None:
    array = label_array(dtype=stored)
    array[0, 0, 0] = top
    label = read_label(one_case(tmp_path, array))
    assert label.array.dtype == dtype
    np.testing.assert_array_equal(label.array, array)


def test_whole_numbers_off_by_rounding_are_taken(tmp_path: Path) -> None:
    array = label_array(dtype=np.float32) * np.float32(1.0000153)  # what a scale factor leaves
    np.testing.assert_array_equal(read_label(one_case(tmp_path, array)).array, label_array())


def test_fractions_are_named_with_file_value_and_count(tmp_path: Path) -> None:
    array = label_array(dtype=np.float32)
    array[0, 0, :3] = 0.25
    with pytest.raises(DataError, match=r"label.nii.gz: 3 voxels .* fractions such as 0.25"):
        read_label(one_case(tmp_path, array))


def test_image_and_label_on_two_grids(tmp_path: Path) -> None:
    case = one_case(tmp_path, label_array(), replace(GRID, spacing=(2.5, 0.8, 0.8)))
    with pytest.raises(GeometryError) as error:
        read_case(case)
    assert str(error.value) == (
        "case_07: image and label differ in spacing, (2.5, 0.7, 0.7) vs (2.5, 0.8, 0.8) mm; "
        "bring the label over with resample_like(...)"
    )


def test_channels_must_share_a_grid_and_be_single(tmp_path: Path) -> None:
    one = put(tmp_path / "a_0000.nii.gz", image_array())
    far = put(tmp_path / "a_0001.nii.gz", image_array(), replace(GRID, origin=(0.0, 0.0, 0.0)))
    two = put(tmp_path / "b_0001.nii.gz", np.stack([image_array()] * 2))
    with pytest.raises(GeometryError, match=r"channels a_0000.* and a_0001.* differ in origin"):
        read_image(Case(name="a", images=(one, far), label=None))
    with pytest.raises(DataError, match=r"b_0001.nii.gz: 2 channels in one of 2"):
        read_image(Case(name="b", images=(one, two), label=None))


def test_a_case_without_a_label_cannot_be_read(tmp_path: Path) -> None:
    case = Case(name="a", images=(put(tmp_path / "a.nii.gz", image_array()),), label=None)
    assert read_image(case).array.shape == (1, *GRID.shape)
    with pytest.raises(DataError, match="a: no label; add"):
        read_case(case)


# The audit: one wrong case in a data set that is otherwise right


def _turned() -> Grid:
    return replace(GRID, direction=((1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0)))


def _with(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[0, 0, 0] = value
    return array


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FLOAT = np.float32
WRONG_PAIRS: Mapping[str, tuple[str, Callable[[Path, Path], object]]] = {
    "shape": (
        r"differ in shape, \(4, 5, 6\) vs \(3, 5, 6\) voxels",
        lambda i, m: put(m, label_array()[:3], replace(GRID, shape=(3, 5, 6))),
    ),
    "spacing": (
        r"differ in spacing, \(2.5, 0.7, 0.7\) vs \(2.5, 0.8, 0.8\) mm.*resample_like",
        lambda i, m: put(m, label_array(), replace(GRID, spacing=(2.5, 0.8, 0.8))),
    ),
    "origin": (
        r"differ in origin, \(10, -20, 30\) vs \(12.5, -20, 30\) mm",
        lambda i, m: put(m, label_array(), replace(GRID, origin=(12.5, -20.0, 30.0))),
    ),
    "direction": (
        r"differ in direction, by up to 90.00 degrees",
        lambda i, m: put(m, label_array(), _turned()),
    ),
    "fractions": (
        r"1 voxels of the label hold fractions such as 1.5",
        lambda i, m: put(m, _with(label_array(dtype=FLOAT), 1.5)),
    ),
    "negative": (
        r"1 voxels of the label are negative, down to -1",
        lambda i, m: put(m, _with(label_array(dtype=np.int16), -1)),
    ),
    "undeclared": (
        r"outside the declared set: 9 \(1 voxels\); expected 0, 1, 2, 250",
        lambda i, m: put(m, _with(label_array(), 9)),
    ),
    "label NaN": (
        r"1 voxels of the label are NaN or infinite",
        lambda i, m: put(m, _with(label_array(dtype=FLOAT), np.nan)),
    ),
    "label huge": (
        r"label values up to 1e\+20",
        lambda i, m: put(m, _with(label_array(dtype=FLOAT), 1e20)),
    ),
    "label of two channels": (
        r"a label of 2 channels; expected one map",
        lambda i, m: put(m, np.stack([label_array()] * 2)),
    ),
    "image NaN": (
        r"case_07.nii.gz: 1 voxels are NaN or infinite",
        lambda i, m: put(i, _with(image_array(dtype=FLOAT), np.nan)),
    ),
    "image infinite": (
        r"case_07.nii.gz: 1 voxels are NaN or infinite",
        lambda i, m: put(i, _with(image_array(dtype=FLOAT), -np.inf)),
    ),
    "image as label": (
        r"voxels of the label are negative",
        lambda i, m: m.write_bytes(i.read_bytes()),
    ),
    "label missing": ("labels.case_07.nii.gz", lambda i, m: m.unlink()),
    "image missing": ("images.case_07.nii.gz", lambda i, m: i.unlink()),
    "label cut": ("labels.case_07.nii.gz", lambda i, m: _cut(m)),
    "image cut": ("images.case_07.nii.gz", lambda i, m: _cut(i)),
    "image empty": ("images.case_07.nii.gz", lambda i, m: i.write_bytes(b"")),
    "two channels": (
        r"2 channels; expected 1, as declared: CT",
        lambda i, m: put(i, np.stack([image_array(3), image_array(4)])),
    ),
    "one image under two labels": (
        r"the image is that of case_01, under another label",
        lambda i, m: (put(i, image_array(0)), put(m, _with(label_array(), 2))),
    ),
}


@pytest.mark.parametrize("sort", WRONG_PAIRS)
def test_every_wrong_pair_is_found(tmp_path: Path, sort: str) -> None:
    words, spoil = WRONG_PAIRS[sort]
    root = make_folders(tmp_path)
    describe(root, labels={**LABELS, "ignore": 250}, channel_names={"0": "CT"})
    dataset = read_dataset(root)
    assert audit(dataset).findings == ()
    spoil(root / "images" / "case_07.nii.gz", root / "labels" / "case_07.nii.gz")
    report = audit(dataset)
    assert not report.ok
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert {finding.case for finding in errors} == {"case_07"}
    assert any(re.search(words, finding.what) for finding in errors), errors
    assert all("\n" not in finding.what for finding in errors)


DOUBTFUL: Mapping[str, tuple[str, Callable[[Path, Path], object]]] = {
    "empty label": ("no foreground", lambda i, m: put(m, np.zeros(GRID.shape, np.uint8))),
    "only ignored": ("no foreground", lambda i, m: put(m, np.full(GRID.shape, 250, np.uint8))),
    "constant image": ("every voxel is 7", lambda i, m: put(i, np.full(GRID.shape, 7, np.int16))),
    "one image twice": (
        "is that of case_01; exp",
        lambda i, m: put(i, image_array(0, dtype=FLOAT)),
    ),
    "label as image": ("voxels are the label's", lambda i, m: put(i, label_array(dtype=FLOAT))),
}


@pytest.mark.parametrize("sort", DOUBTFUL)
def test_what_may_be_right_is_a_warning(tmp_path: Path, sort: str) -> None:
    words, change = DOUBTFUL[sort]
    root = make_folders(tmp_path)
    describe(root, labels={**LABELS, "ignore": 250})
    change(root / "images" / "case_07.nii.gz", root / "labels" / "case_07.nii.gz")
    report = audit(read_dataset(root))
    assert report.ok
    (finding,) = report.findings
    assert (finding.case, finding.severity) == ("case_07", "warning")
    assert words in finding.what


CONTROLS: Mapping[str, Callable[[Path, Path], object]] = {
    "float label": lambda i, m: put(m, label_array(dtype=FLOAT)),
    "signed label": lambda i, m: put(m, label_array(dtype=np.int16)),
    "one voxel": lambda i, m: put(m, _with(np.zeros(GRID.shape, np.uint8), 1)),
    "ignored part": lambda i, m: put(m, _with(label_array(), 250)),
    "gap in the labels": lambda i, m: put(m, (label_array() == 2).astype(np.uint8) * 2),
    "float image": lambda i, m: put(i, image_array(5, dtype=FLOAT)),
    "unsigned image": lambda i, m: put(i, image_array(5).astype(np.uint16)),
    "origin off by rounding": lambda i, m: put(
        m, label_array(), replace(GRID, origin=(10.0, -20.0 + 1e-5, 30.0))
    ),
    "both oblique": lambda i, m: (
        put(i, image_array(5), _oblique()),
        put(m, label_array(), _oblique()),
    ),
    "both flipped": lambda i, m: (
        put(i, image_array(5), _turned()),
        put(m, label_array(), _turned()),
    ),
    "another size": lambda i, m: (
        put(i, image_array(5)[:2], replace(GRID, shape=(2, 5, 6))),
        put(m, label_array()[:2], replace(GRID, shape=(2, 5, 6))),
    ),
    "same label, other image": lambda i, m: put(i, image_array(99)),
}


def _oblique() -> Grid:
    c, s = np.cos(0.3), np.sin(0.3)
    return replace(GRID, direction=((1.0, 0.0, 0.0), (0.0, c, -s), (0.0, s, c)))


@pytest.mark.parametrize("sort", CONTROLS)
def test_controls_are_taken(tmp_path: Path, sort: str) -> None:
    root = make_folders(tmp_path)
    describe(root, labels={**LABELS, "ignore": 250}, channel_names={"0": "CT"})
    CONTROLS[sort](root / "images" / "case_07.nii.gz", root / "labels" / "case_07.nii.gz")
    dataset = read_dataset(root)
    assert audit(dataset).findings == ()
    image, label = read_case(dataset.cases[1])
    assert image.grid.difference(label.grid) is None


def test_the_report_counts_labels_and_progress_is_told(tmp_path: Path) -> None:
    dataset = read_dataset(make_folders(tmp_path))
    told: list[tuple[int, int, str]] = []
    report = audit(dataset, progress=lambda done, total, name: told.append((done, total, name)))
    values, counts = np.unique(label_array(), return_counts=True)
    assert report.labels == {int(v): 2 * int(n) for v, n in zip(values, counts, strict=True)}
    assert (report.ok, report.n_cases, report.dataset) == (True, 2, tmp_path.name)
    assert told == [(1, 2, "case_01"), (2, 2, "case_07")]


def test_labels_of_four_bytes_are_counted(tmp_path: Path) -> None:
    root = make_folders(tmp_path)
    put(root / "labels" / "case_07.nii.gz", _with(label_array(dtype=np.int32), 70_000))
    assert audit(read_dataset(root)).labels[70_000] == 1


def test_findings_about_the_whole_data_set(tmp_path: Path) -> None:
    root = make_nnunet(tmp_path / "a", numTraining=3, labels={**LABELS, "vessel": 3})
    report = audit(read_dataset(root))
    assert report.ok
    assert [(f.case, f.severity) for f in report.findings] == [(None, "warning")] * 2
    assert "no case holds: 3 vessel" in report.findings[0].what
    assert "2 cases; expected 3" in report.findings[1].what

    root = make_folders(tmp_path / "b")
    for name in ("case_01", "case_07"):
        put(root / "labels" / f"{name}.nii.gz", np.zeros(GRID.shape, np.uint8))
    report = audit(read_dataset(root))
    assert not report.ok
    assert "no case has any foreground" in report.findings[-1].what


def test_an_odd_number_of_channels_is_found_without_a_declaration(tmp_path: Path) -> None:
    root = make_folders(tmp_path, ("a", "b", "c"))
    put(root / "images" / "b.nii.gz", np.stack([image_array(7), image_array(8)]))
    (finding,) = audit(read_dataset(root)).findings
    assert (finding.case, finding.severity) == ("b", "error")
    assert "2 channels; expected 1, as most cases have" in finding.what


# Folds


def a_dataset(patients: list[int | None]) -> Dataset:
    return Dataset(
        name="d",
        root=Path("d"),
        layout="csv",
        cases=tuple(
            Case(
                name=f"c{number}",
                images=(Path("x"),),
                label=None,
                patient=None if patient is None else f"c{patient}",
            )
            for number, patient in enumerate(patients)
        ),
    )


@given(
    patients=st.lists(st.none() | st.integers(0, 12), min_size=1, max_size=40),
    n_folds=st.integers(2, 6),
    seed=st.integers(0, 2**32),
)
def test_folds_cover_once_grouped_and_seeded(
    patients: list[int | None], n_folds: int, seed: int
) -> None:
    dataset = a_dataset(patients)
    n_groups = len({p for p in patients if p is not None}) + patients.count(None)
    if n_groups < n_folds:
        with pytest.raises(DataError, match=f"for {n_folds} folds"):
            folds(dataset, n_folds=n_folds, seed=seed)
        return
    cut = folds(dataset, n_folds=n_folds, seed=seed)
    names = [case.name for case in dataset.cases]
    patient_of = {case.name: case.patient for case in dataset.cases}
    assert len(cut) == n_folds
    assert sorted(name for fold in cut for name in fold.validation) == sorted(names)
    for fold in cut:
        assert fold.train
        assert fold.validation
        assert not set(fold.train) & set(fold.validation)
        assert set(fold.train) | set(fold.validation) == set(names)
        trained = {patient_of[name] for name in fold.train} - {None}
        assert not trained & {patient_of[name] for name in fold.validation}
    assert cut == folds(dataset, n_folds=n_folds, seed=seed)
    turned = replace(dataset, cases=dataset.cases[::-1])
    assert [set(fold.validation) for fold in folds(turned, n_folds=n_folds, seed=seed)] == [
        set(fold.validation) for fold in cut
    ]
    largest_group = max(Counter(p for p in patients if p is not None).values(), default=1)
    sizes = [len(fold.validation) for fold in cut]
    assert max(sizes) - min(sizes) <= largest_group


def test_folds_without_patients_are_even_and_seeds_differ() -> None:
    dataset = a_dataset([None] * 23)
    assert sorted(len(fold.validation) for fold in folds(dataset)) == [4, 4, 5, 5, 5]
    assert folds(dataset, seed=0) != folds(dataset, seed=1)
    assert folds(dataset)[0].validation == ("c7", "c11", "c13", "c14", "c19")  # for all time


def test_too_few_cases_for_the_folds() -> None:
    with pytest.raises(DataError, match="3 cases for 5 folds; set n_folds to 3 or less"):
        folds(a_dataset([None] * 3))
    with pytest.raises(DataError, match="4 cases of 2 patients for 5 folds; set n_folds to 2"):
        folds(a_dataset([1, 1, 2, 2]))
    with pytest.raises(DataError, match="1 cases for 5 folds; add cases"):
        folds(a_dataset([None]))
    with pytest.raises(DataError, match="n_folds 1; expected at least 2"):
        folds(a_dataset([None] * 9), n_folds=1)


def test_a_data_set_travels_between_processes(tmp_path: Path) -> None:
    dataset = read_dataset(make_nnunet(tmp_path))
    assert pickle.loads(pickle.dumps(dataset)) == dataset


# Real data


@pytest.mark.parametrize(
    ("name", "n_cases", "labels"),
    [
        ("msd-hippocampus", 200, {0: 11884741, 1: 343573, 2: 316708}),
        ("openkbp-headneck", 16, None),
    ],
)
def test_real_folders_are_right(
    shared: Callable[[str], Path], name: str, n_cases: int, labels: dict[int, int] | None
) -> None:
    dataset = read_dataset(shared(name))
    assert (dataset.layout, len(dataset.cases)) == ("folders", n_cases)
    report = audit(dataset)
    assert report.findings == ()
    assert labels is None or report.labels == labels


def test_a_real_pair_through_a_csv(shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared("totalsegmentator")
    table = write_csv(
        tmp_path / "ct.csv",
        "image,label",
        f"{folder}/example_ct.nii.gz,{folder}/example_ct_seg61.nii.gz",
    )
    report = audit(read_dataset(table))
    assert report.findings == ()
    assert len(report.labels) == 62
    assert max(report.labels) == 117


def test_swapped_pairs_of_real_cases_are_found(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    hippocampus = shared("msd-hippocampus")
    names = sorted(file.name for file in (hippocampus / "images").iterdir())[:2]
    table = write_csv(
        tmp_path / "swapped.csv",
        "image,label",
        f"{hippocampus}/images/{names[0]},{hippocampus}/labels/{names[1]}",
    )
    (finding,) = audit(read_dataset(table)).findings
    assert finding.severity == "error"
    assert "image and label differ in shape" in finding.what
