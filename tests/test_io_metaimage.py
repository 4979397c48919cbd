"""MHA: what a header may say."""

import zlib

import numpy as np
import pytest
from volume_files import mha_file

from effseg.errors import DataError
from effseg.io import read_volume
from effseg.volume import Grid


def test_mha_in_big_endian_and_packed(tmp_path):
    plain = read_volume(mha_file(tmp_path / "a.mha"))
    assert plain.grid == Grid((3, 4, 5), (2.5, 0.7, 0.8), (40, 24, -16))
    swapped = np.arange(60, dtype=">i2").tobytes()
    big = mha_file(tmp_path / "b.mha", BinaryDataByteOrderMSB="True", data=swapped)
    assert np.array_equal(read_volume(big).array, plain.array)
    packed = zlib.compress(np.arange(60, dtype="<i2").tobytes())
    for size in ({}, {"CompressedDataSize": str(len(packed))}):
        path = mha_file(tmp_path / "c.mha", CompressedData="True", data=packed, **size)
        assert np.array_equal(read_volume(path).array, plain.array)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"NDims": "99"}, "ndims"),
        ({"NDims": "-1"}, "ndims"),
        ({"ObjectType": "Mesh"}, "objecttype"),
        ({"BinaryData": "False"}, "binarydata"),
        ({"CompressedData": "Perhaps"}, "compresseddata"),
        ({"CompressedData": "True", "CompressedDataSize": "99999"}, "is cut"),
        ({"ElementDataFile": "../secret.raw"}, "in another file"),
        ({"ElementDataFile": "LIST"}, "in another file"),
        ({"ElementType": "MET_STRING"}, "ElementType"),
        ({"ElementNumberOfChannels": "0"}, "elementnumberofchannels"),
        ({"ElementNumberOfChannels": "1000000"}, "is cut"),
        ({"DimSize": "5 4"}, "dimsize"),
        ({"DimSize": "5 4 99999999999999999999"}, "is cut"),
        ({"DimSize": "5 4 2"}, "left over"),
        ({"ElementSpacing": "1 1 nan"}, "elementspacing"),
        ({"ElementSpacing": "1 1 0"}, "spacing"),
        ({"TransformMatrix": "1 0 0"}, "transformmatrix"),
        ({"TransformMatrix": "0 0 0 0 0 0 0 0 0"}, "spacing"),
        ({"drop": ("ElementSpacing",)}, "no field 'elementspacing'"),
        ({"drop": ("ElementDataFile",)}, "or cut"),
        ({"Rotation": "1 0 0 0 1 0 0 0 1"}, "stands twice"),
    ],
)
def test_an_impossible_mha_is_refused_by_name(tmp_path, change, said):
    path = mha_file(tmp_path / "case_07.mha", **change)
    with pytest.raises(DataError, match=said) as caught:
        read_volume(path)
    assert str(caught.value).startswith(f"{path}: ")
