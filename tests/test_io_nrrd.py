"""NRRD: what a header may say."""

import numpy as np
import pytest
from volume_files import assert_same_place, nrrd_file

from effseg.errors import DataError
from effseg.io import read_grid, read_volume
from effseg.volume import Grid


def test_nrrd_worlds_are_turned(tmp_path):
    expected, _ = read_grid(nrrd_file(tmp_path / "a.nrrd"))
    assert expected.origin == (40, 24, -16)
    ras = nrrd_file(
        tmp_path / "b.nrrd",
        space="right-anterior-superior",
        space_directions="(-0.8,0,0) (0,-0.7,0) (0,0,2.5)",
        space_origin="(16,-24,40)",
    )
    assert_same_place(read_grid(ras)[0], expected, exact=True)
    micron = nrrd_file(
        tmp_path / "c.nrrd",
        space_units='"um" "um" "um"',
        space_directions="(800,0,0) (0,700,0) (0,0,2500)",
        space_origin="(-16000,24000,40000)",
    )
    assert_same_place(read_grid(micron)[0], expected, exact=True)


def test_nrrd_without_a_space_has_its_spacings(tmp_path):
    drop = ("space", "space directions", "space origin")
    grid, _ = read_grid(nrrd_file(tmp_path / "a.nrrd", drop=drop, spacings="0.8 0.7 2.5"))
    assert grid == Grid((3, 4, 5), (2.5, 0.7, 0.8))


def test_nrrd_channels_may_come_first_or_last(tmp_path):
    data = np.arange(120, dtype="<i2").tobytes()
    axes = "(0.8,0,0) (0,0.7,0) (0,0,2.5)"
    first = nrrd_file(
        tmp_path / "a.nrrd",
        dimension="4",
        sizes="2 5 4 3",
        space_directions=f"none {axes}",
        data=data,
    )
    last = nrrd_file(
        tmp_path / "b.nrrd",
        dimension="4",
        sizes="5 4 3 2",
        space_directions=f"{axes} none",
        data=data,
    )
    flat = np.arange(120)
    assert np.array_equal(read_volume(first).array, np.moveaxis(flat.reshape(3, 4, 5, 2), -1, 0))
    assert np.array_equal(read_volume(last).array, flat.reshape(2, 3, 4, 5))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data_file": "../secret.raw"}, "in another file"),
        ({"byte_skip": "-1"}, "byte skip"),
        ({"type": "block"}, "type 'block'"),
        ({"encoding": "bzip2"}, "encoding 'bzip2'"),
        ({"drop": ("endian",)}, "no field 'endian'"),
        ({"drop": ("sizes",)}, "no field 'sizes'"),
        ({"endian": "middle"}, "endian 'middle'"),
        ({"dimension": "99"}, "dimension 99"),
        ({"dimension": "x"}, "dimension"),
        ({"sizes": "5 4"}, "expected 3 integers"),
        ({"sizes": "5 4 -3"}, "at least 1"),
        ({"sizes": "5 4 30"}, "is cut"),
        ({"sizes": "5 4 2"}, "left over"),
        ({"space": "scanner-xyz"}, "space 'scanner-xyz'"),
        ({"space_directions": "(1,0,0) (0,1,0)"}, "expected three vectors"),
        ({"space_directions": "(1,0,0) (0,nan,0) (0,0,1)"}, "finite numbers"),
        ({"space_directions": "(1,0,0) (0,0,0) (0,0,1)"}, "spacing"),
        ({"space_units": '"mm" "m" "mm"'}, "space units"),
        ({"lines": "sizes: 1 1 1\n"}, "stands twice"),
    ],
)
def test_an_impossible_nrrd_is_refused_by_name(tmp_path, change, said):
    path = nrrd_file(tmp_path / "case_07.nrrd", **change)
    with pytest.raises(DataError, match=said) as caught:
        read_volume(path)
    assert str(caught.value).startswith(f"{path}: ")
