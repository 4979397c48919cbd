"""DICOM: a whole, even series in a folder or a zip, or a refusal by name."""

import struct
import warnings
import zipfile

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its users know it by this name
from pydicom.data import get_testdata_file
from pydicom.uid import RLELossless
from volume_files import GRID, ORDERS, REPORT, ct_slice, save, series, some_voxels, zipped

from effseg.errors import DataError
from effseg.io import read_grid, read_volume
from effseg.volume import Grid


def test_a_series_in_a_folder_and_a_zip(tmp_path):
    folder = series(tmp_path / "ct", [ct_slice(n) for n in (2, 0, 3, 1)])  # in no order
    (folder / "annotation_69.xml").write_text("<LidcReadMessage/>")
    (folder / "README").write_text("words")
    report = ct_slice(0, series="9.9.9")
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = REPORT
    save(report, folder / "report.dcm")
    volume = read_volume(folder)
    assert volume.array.dtype == np.int16
    expected = np.arange(20).reshape(4, 5) + 100 * np.arange(4)[:, None, None] - 1024
    assert np.array_equal(volume.array, expected)
    assert volume.grid == Grid((4, 4, 5), (2.5, 0.7, 0.8))
    path = zipped(folder, tmp_path / "ct.zip")
    again = read_volume(path, channel=0)
    assert np.array_equal(again.array, volume.array)
    assert read_grid(path) == read_grid(folder) == (volume.grid, 1)


def test_a_series_lies_where_simpleitk_puts_it(tmp_path):
    for n, axes in enumerate(ORDERS):
        affine = GRID.reordered(axes).affine[[2, 1, 0, 3]][:, [2, 1, 0, 3]]
        if np.linalg.det(affine) < 0:  # slices are stacked along the normal: right-handed
            continue
        folder = series(tmp_path / str(n), [ct_slice(z, affine=affine) for z in range(3)])
        volume = read_volume(folder)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        image = reader.Execute()
        assert np.array_equal(sitk.GetArrayFromImage(image), volume.array)
        for index in some_voxels(volume.grid, n=5):
            place = image.TransformIndexToPhysicalPoint(index[::-1].tolist())
            assert np.allclose(place[::-1], volume.grid.index_to_world(index), atol=1e-3)
        assert np.allclose(
            volume.grid.affine, affine[[2, 1, 0, 3]][:, [2, 1, 0, 3]], rtol=0, atol=2e-6
        )


def test_values_are_true_per_slice(tmp_path):
    slices = [ct_slice(n) for n in range(3)]
    slices[1].RescaleIntercept = "0"
    slices[2].RescaleSlope = "2000"
    volume = read_volume(series(tmp_path / "wide", slices))
    assert volume.array.dtype == np.int32
    assert volume.array[:, 0, 1].tolist() == [1 - 1024, 101, 201 * 2000 - 1024]
    slices[2].RescaleSlope = "0.5"
    volume = read_volume(series(tmp_path / "fraction", slices))
    assert volume.array.dtype == np.float32
    assert volume.array[:, 0, 1].tolist() == [1 - 1024, 101, 201 * 0.5 - 1024]


def test_unsigned_and_packed_pixels(tmp_path):
    slices = [ct_slice(n) for n in range(2)]
    for data in slices:
        data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, 0
        data.compress(RLELossless)
    volume = read_volume(series(tmp_path / "rle", slices))
    assert np.array_equal(volume.array[1], np.arange(20).reshape(4, 5) + 100 - 1024)


def test_numbers_longer_than_the_standard_allows_are_read(tmp_path):
    slices = [ct_slice(n) for n in range(2)]
    turned = [0.98480775301220802, 0.17364817766693033, 0, -0.17364817766693033, 0.9848077530122080]
    for data in slices:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.ImageOrientationPatient = [*(f"{v:.17f}" for v in turned), "0"]
    grid, _ = read_grid(series(tmp_path / "long", slices))
    assert grid.direction[2][2] == pytest.approx(turned[0], abs=1e-15)


def tilted():
    affine = np.diag([0.8, 0.7, 2.5, 1.0])
    slices = [ct_slice(n, affine=affine) for n in range(4)]
    for n, data in enumerate(slices):
        data.ImagePositionPatient = [0, n * 2.5 * np.tan(np.radians(10)), n * 2.5]
    return slices


def changed(index, **elements):
    slices = [ct_slice(n) for n in range(4)]
    for name, value in elements.items():
        if value is None:
            delattr(slices[index], name)
        else:
            setattr(slices[index], name, value)
    return slices


BAD_SERIES = {
    "a slice is missing": (
        lambda: [ct_slice(n) for n in (0, 1, 2, 4, 5)],
        r"5\.000 mm between 002\.dcm and 003\.dcm, slices 3 and 4 of 5, 2\.500 .* 1 slice\(s\) mis",
    ),
    "a gap is off": (
        lambda: changed(1, ImagePositionPatient=[0, 0, 2.6]),
        r"2\.600 mm between 000\.dcm and 001\.dcm",
    ),
    "a slice twice": (
        lambda: [ct_slice(n) for n in (0, 1, 1, 2)],
        r"001\.dcm and 002\.dcm lie at the same place, 2\.50 mm",
    ),
    "two series": (
        lambda: [ct_slice(0), ct_slice(1), ct_slice(2, series="4.5.6")],
        r"2 series: 1\.2\.3 \(2 slices\), 4\.5\.6 \(1 slices\)",
    ),
    "tilt": (tilted, r"003\.dcm lies 1\.32 mm beside .* \(10\.00 degrees, a gantry tilt"),
    "one slice": (lambda: [ct_slice(0)], "one slice, 000.dcm"),
    "turned slice": (
        lambda: changed(2, ImageOrientationPatient=[0, 1, 0, -1, 0, 0]),
        "000.dcm and 002.dcm differ in row direction",
    ),
    "other spacing": (lambda: changed(2, PixelSpacing=[0.7, 0.9]), "differ in pixel spacing"),
    "other frame": (lambda: changed(2, FrameOfReferenceUID="1.9"), "differ in frame of reference"),
    "other size": (
        lambda: changed(2, Rows=2, PixelData=bytes(20)),
        "differ in rows and columns",
    ),
    "slope 0": (lambda: changed(0, RescaleSlope="0"), r"000\.dcm: RescaleSlope 0"),
    "no slope": (lambda: changed(0, RescaleSlope=None), "no RescaleSlope"),
    "negative film": (
        lambda: changed(1, PhotometricInterpretation="MONOCHROME1"),
        "MONOCHROME1; expected MONOCHROME2",
    ),
    "frames": (lambda: changed(1, NumberOfFrames="3"), "3 frames; expected one"),
    "no position": (lambda: changed(1, ImagePositionPatient=None), "no ImagePositionPatient"),
    "skewed cosines": (
        lambda: changed(1, ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0]),
        "two unit vectors at right angles",
    ),
    "zero spacing": (
        lambda: [d for n in range(2) for d in changed(n, PixelSpacing=[0, 0])[n : n + 1]],
        "spacing",
    ),
    "cut pixels": (lambda: changed(1, PixelData=bytes(20)), r"001\.dcm: its pixels cannot be read"),
    "no pixels": (lambda: changed(1, PixelData=None), r"001\.dcm: its pixels cannot be read"),
    "huge": (lambda: changed(1, Rows=65535, Columns=65535), "cut or forged: 8589672450 bytes"),
    "1 bit": (lambda: changed(1, BitsAllocated=1), "BitsAllocated 1"),
}


@pytest.mark.parametrize("name", BAD_SERIES)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_is_no_whole_series_is_refused_by_name(tmp_path, name, kind):
    make, said = BAD_SERIES[name]
    path = series(tmp_path / "ct", make())
    if kind == "zip":
        path = zipped(path, tmp_path / "ct.zip")
    with pytest.raises(DataError, match=said) as caught:
        read_volume(path)
    assert str(caught.value).startswith(str(path))


def test_a_cut_slice_is_refused(tmp_path):
    folder = series(tmp_path / "ct", [ct_slice(n) for n in range(4)])
    whole = (folder / "003.dcm").read_bytes()
    for length in (0, 100, 132, 200, 400, len(whole) // 2, len(whole) - 1):
        (folder / "003.dcm").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"003\.dcm"):
            read_volume(folder)


def test_a_deflated_slice_is_refused_before_it_inflates(tmp_path):
    folder = series(tmp_path / "ct", [ct_slice(n) for n in range(2)])
    data = (folder / "001.dcm").read_bytes()
    meta = data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    (folder / "001.dcm").write_bytes(meta)
    with pytest.raises(DataError, match=r"001\.dcm: deflated as a whole"):
        read_volume(folder)


def test_folders_and_zips_without_a_series(tmp_path):
    with pytest.raises(DataError, match="no DICOM images among 0 file"):
        read_volume(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match="no DICOM images among 1 file"):
        read_volume(tmp_path)
    (tmp_path / "no.zip").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"no\.zip: not a sound zip"):
        read_volume(tmp_path / "no.zip")


def test_damaged_and_forged_zips_are_refused(tmp_path):
    folder = series(tmp_path / "ct", [ct_slice(n) for n in range(3)])
    whole = bytearray(zipped(folder, tmp_path / "ct.zip").read_bytes())
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(tmp_path / "ct.zip") as archive:
        first = archive.infolist()[0]
    begin = 30 + len(first.filename)  # where its packed bytes do
    for at in (begin, begin + first.compress_size // 2, begin + first.compress_size - 8):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"bad\.zip"):
            read_volume(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"bad\.zip: not a sound zip"):
        read_volume(path)
    entry = whole.find(b"PK\1\2")
    whole[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)  # its size, as declared
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"claims to hold .* forged"):
        read_volume(path)


def test_names_in_a_zip_are_never_opened(tmp_path):
    folder = series(tmp_path / "ct", [ct_slice(n) for n in range(3)])
    path = tmp_path / "ct.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"../../{file.name}")
    before = sorted(tmp_path.rglob("*"))
    assert read_volume(path).array.shape == (3, 4, 5)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    folder = series(tmp_path / "ct", [ct_slice(n) for n in range(2)])
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(DataError, match=r'pip install "effseg\[dicom\]"'):
        read_volume(folder)


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm"])
def test_a_scanners_slices_in_three_encodings(tmp_path, name):
    for n in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(get_testdata_file(name))
            place = [float(v) for v in data.ImagePositionPatient]
            data.ImagePositionPatient = [place[0], place[1], f"{place[2] + n:.4f}"]
            save(data, tmp_path / "mr" / f"{n}.dcm")
    volume = read_volume(tmp_path / "mr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array
    for plane in volume.array:
        assert np.array_equal(plane, expected)


def test_the_lidc_series_has_its_known_facts(shared):
    case = shared("lidc-idri") / "LIDC-IDRI-0001"
    volume = read_volume(case / "dicom.zip")
    assert volume.array.dtype == np.int16
    assert (volume.array.min(), volume.array.max()) == (-2048, 3071)
    assert volume.grid == Grid((133, 512, 512), (2.5, 0.703125, 0.703125), volume.grid.origin)
    mask = read_volume(case / "nodules_3plus_readers_50pct.nii.gz")
    assert volume.grid.difference(mask.grid) is None
    assert int((mask.array > 0).sum()) == 5428
    nodule = volume.array[mask.array > 0]
    assert -200 < np.median(nodule) < 100  # soft tissue, where lung would be -850
    with pytest.raises(DataError, match="no DICOM images among 5 file"):
        read_volume(case)
