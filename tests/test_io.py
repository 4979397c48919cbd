"""Files to volumes and back. Oracles: nibabel and SimpleITK, which effseg reads without."""

import errno
import gzip
import os
import resource
import struct
import time
import tracemalloc
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its users know it by this name
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid
from scipy.spatial.transform import Rotation

from effseg.errors import DataError, EffsegError, GeometryError
from effseg.io import VOLUME_SUFFIXES, read_grid, read_volume, strip_suffix, write_volume
from effseg.volume import AxisOrder, Grid, Volume

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
DTYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8")
ORDERS = [
    AxisOrder(order=order, flips=flips)
    for order in permutations(range(3))
    for flips in product((False, True), repeat=3)
]
OBLIQUE = Rotation.from_euler("zyx", (20, -10, 5), degrees=True).as_matrix()
GRID = Grid(
    shape=(3, 4, 5),
    spacing=(2.5, 0.7, 0.8),
    origin=(-301.1, 72.3, -45.6),
    direction=tuple(tuple(float(v) for v in row) for row in OBLIQUE),
)


def volume_of(dtype="i2", *, channels=None, grid=GRID):
    rng = np.random.default_rng(0)
    shape = (*((channels,) if channels else ()), *grid.shape)
    return Volume(rng.integers(0, 100, shape).astype(dtype), grid)


def assert_same_place(found, expected, *, exact=False):
    """To 1e-12, or to what an affine of float32 numbers can hold: 6e-8 of each, 3e-5 mm at 500."""
    near = 1e-12 if exact else 1e-6
    assert found.shape == expected.shape
    assert np.allclose(found.affine, expected.affine, rtol=near, atol=near)


def some_voxels(grid, n=20):
    return np.random.default_rng(1).integers(0, grid.shape, (n, 3))


# --- names


def test_names_without_their_suffix():
    assert VOLUME_SUFFIXES == (".nii.gz", ".nii", ".nrrd", ".mha", ".zarr", ".zip")
    for name, case in [
        ("case_07.nii.gz", "case_07"),
        ("case.1.NII.GZ", "case.1"),
        ("a.nii", "a"),
        ("a.seg.nrrd", "a.seg"),
        ("dicom.zip", "dicom"),
        ("folder", "folder"),
        ("notes.txt", "notes.txt"),
        (".nii", ".nii"),
    ]:
        assert strip_suffix(Path("x.nii") / name) == case


# --- there and back


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_48_axis_orders_of_an_oblique_volume_come_back(tmp_path, suffix):
    whole = volume_of()
    for n, axes in enumerate(ORDERS):
        stored = whole.reordered(axes)
        path = write_volume(stored, tmp_path / f"{n}{suffix}")
        back = read_volume(path)
        assert np.array_equal(back.array, stored.array)
        assert_same_place(back.grid, stored.grid, exact=suffix in (".nrrd", ".mha"))
        assert read_grid(path) == (back.grid, 1)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    turn=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.01, 50)] * 3),
    origin=st.tuples(*[st.floats(-1000, 1000)] * 3),
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=20, deadline=None)
def test_any_grid_and_type_comes_back(
    tmp_path_factory, suffix, turn, spacing, origin, shape, dtype
):
    matrix = Rotation.from_euler("zyx", turn, degrees=True).as_matrix()
    direction = tuple(tuple(float(v) for v in row) for row in matrix)
    volume = volume_of(dtype, grid=Grid(shape, spacing, origin, direction))
    back = read_volume(write_volume(volume, tmp_path_factory.mktemp("any") / f"a{suffix}"))
    assert back.array.dtype == np.dtype(dtype)
    assert np.array_equal(back.array, volume.array)
    assert_same_place(back.grid, volume.grid, exact=suffix in (".nrrd", ".mha"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nan_and_infinite_voxels_come_through(tmp_path, suffix):
    volume = volume_of("f4")
    volume.array[0, 0, :3] = np.nan, np.inf, -np.inf
    back = read_volume(write_volume(volume, tmp_path / f"a{suffix}"))
    assert np.array_equal(back.array, volume.array, equal_nan=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_channels_come_back_all_or_one(tmp_path, suffix):
    volume = volume_of(channels=3)
    path = write_volume(volume, tmp_path / f"a{suffix}")
    assert np.array_equal(read_volume(path).array, volume.array)
    assert read_grid(path)[1] == 3
    for channel in range(3):
        one = read_volume(path, channel=channel).array
        assert np.array_equal(one, volume.array[channel])
        assert one.base is None or one.base.nbytes == one.nbytes  # the others are let go
    for channel in (-1, 3):
        with pytest.raises(DataError, match=f"channel {channel} of 3; expected 0 to 2"):
            read_volume(path, channel=channel)
    one = write_volume(volume_of(channels=1), tmp_path / f"one{suffix}")
    assert read_volume(one, channel=0).array.ndim == 3


def test_a_nifti_written_twice_has_the_same_affine_to_the_bit(tmp_path):
    first = write_volume(volume_of(), tmp_path / "a.nii.gz")
    second = write_volume(read_volume(first), tmp_path / "b.nii")
    assert np.array_equal(nibabel.load(first).affine, nibabel.load(second).affine)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_volume_gives_the_same_bytes(tmp_path, suffix):
    one, two = (write_volume(volume_of(), tmp_path / f"{name}{suffix}") for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_big_arrays_are_not_copied(tmp_path):
    volume = volume_of(grid=Grid((64, 256, 256)))
    spare = 6 * 2**20  # blocks of 1 MiB voxels, a header, buffers
    for suffix in SUFFIXES:
        tracemalloc.start()
        path = write_volume(volume, tmp_path / f"a{suffix}")
        _, peak = tracemalloc.get_traced_memory()
        assert peak < spare
        tracemalloc.reset_peak()
        back = read_volume(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < volume.array.nbytes + spare
        assert np.array_equal(back.array, volume.array)


# --- types


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("dtype", "values", "stored"),
    [
        ("?", (False, True), "u1"),
        ("i8", (0, 255), "u1"),
        ("i8", (0, 256), "i2"),
        ("i8", (0, 65535), "u2"),
        ("i8", (-1, 255), "i2"),
        ("i8", (-1, 40000), "i4"),
        ("u8", (0, 2**32 - 1), "u4"),
        ("i8", (0, 2**40), "i8"),
        ("u8", (0, 2**64 - 1), "u8"),
        ("f2", (0.5, 1.5), "f4"),
        (">i2", (-5, 300), "i2"),
    ],
)
def test_a_type_that_files_lack_becomes_one_that_holds_its_values(
    tmp_path, suffix, dtype, values, stored
):
    array = np.array([values], dtype=dtype)[None]
    back = read_volume(write_volume(Volume(array, Grid((1, 1, 2))), tmp_path / f"a{suffix}"))
    assert back.array.dtype == np.dtype(stored)
    assert back.array[0, 0].tolist() == list(values)


def test_complex_voxels_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.nii: voxels of type complex64 cannot be stored"):
        write_volume(Volume(np.zeros((1, 1, 1), dtype="c8"), Grid((1, 1, 1))), tmp_path / "a.nii")
    assert list(tmp_path.iterdir()) == []


# --- oracles


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_simpleitk_finds_our_voxels_where_we_put_them(tmp_path, suffix):
    for axes in ORDERS[::5]:
        volume = volume_of().reordered(axes)
        image = sitk.ReadImage(write_volume(volume, tmp_path / f"a{suffix}"))
        assert np.array_equal(sitk.GetArrayFromImage(image), volume.array)
        for index in some_voxels(volume.grid):
            place = image.TransformIndexToPhysicalPoint(index[::-1].tolist())
            assert np.allclose(place[::-1], volume.grid.index_to_world(index), atol=1e-3)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("compressed", [False, True])
def test_we_find_simpleitks_voxels_where_it_put_them(tmp_path, suffix, compressed):
    path = tmp_path / f"a{suffix}"
    for axes in ORDERS[::5]:
        affine = volume_of().reordered(axes).grid.affine[:3, :3][::-1, ::-1]
        image = sitk.GetImageFromArray(np.arange(60, dtype="i2").reshape(3, 4, 5))
        image.SetSpacing(np.linalg.norm(affine, axis=0).tolist())
        image.SetDirection((affine / np.linalg.norm(affine, axis=0)).ravel().tolist())
        image.SetOrigin((12.3, -45.6, 78.9))
        sitk.WriteImage(image, path, useCompression=compressed)
        volume = read_volume(path)
        assert np.array_equal(volume.array, sitk.GetArrayViewFromImage(image))
        for index in some_voxels(volume.grid):
            place = image.TransformIndexToPhysicalPoint(index[::-1].tolist())
            assert np.allclose(place[::-1], volume.grid.index_to_world(index), atol=1e-3)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_channels_stand_where_simpleitk_has_them(tmp_path, suffix):
    array = np.arange(120, dtype="f4").reshape(3, 4, 5, 2)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), tmp_path / f"a{suffix}")
    found = read_volume(tmp_path / f"a{suffix}")
    assert np.array_equal(found.array, np.moveaxis(array, -1, 0))
    if suffix != ".nii.gz":  # a fourth axis of NIfTI is time to ITK
        image = sitk.ReadImage(write_volume(found, tmp_path / f"b{suffix}"))
        assert np.array_equal(sitk.GetArrayFromImage(image), array)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (3, 0), (4, 1)])
def test_we_find_nibabels_voxels_where_it_put_them(tmp_path, kind, endianness, codes):
    qform, sform = codes
    for n, axes in enumerate(ORDERS[::5]):
        affine = volume_of().reordered(axes).grid.affine
        array = np.arange(60).reshape(5, 4, 3).astype(f"{endianness}i4")
        image = kind(array, affine, header=kind.header_class(endianness=endianness))
        image.set_data_dtype(array.dtype)
        image.set_qform(affine if qform else None, code=qform)
        image.set_sform(affine if sform else None, code=sform)
        path = tmp_path / f"{n}.nii.gz"
        nibabel.save(image, path)
        assert nibabel.load(path).header.endianness == endianness
        volume = read_volume(path)
        assert volume.array.dtype == np.dtype("i4")
        assert np.array_equal(volume.array.T, array)
        ras = nibabel.affines.apply_affine(
            nibabel.load(path).affine, some_voxels(volume.grid)[:, ::-1]
        )
        ours = volume.grid.index_to_world(some_voxels(volume.grid))
        assert np.allclose(ours[:, ::-1] * (-1, -1, 1), ras, atol=1e-3)


def test_nibabel_finds_our_voxels_where_we_put_them(tmp_path):
    for axes in ORDERS:
        volume = volume_of().reordered(axes)
        image = nibabel.load(write_volume(volume, tmp_path / "a.nii"))
        assert np.array_equal(np.asanyarray(image.dataobj).T, volume.array)
        for affine in (image.get_sform(), image.get_qform()):
            ras = nibabel.affines.apply_affine(affine, some_voxels(volume.grid)[:, ::-1])
            ours = volume.grid.index_to_world(some_voxels(volume.grid))
            assert np.allclose(ours[:, ::-1] * (-1, -1, 1), ras, atol=1e-3)
        assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)


# --- NIfTI: what a header may say


def nifti_file(path, *, array=None, extra=b"", **fields):
    """A NIfTI-1 file, with header fields set by force."""
    array = np.arange(60, dtype="<i2") if array is None else array
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_shape((5, 4, 3))
    header.set_data_dtype(array.dtype)
    header.set_sform(np.diag([0.8, 0.7, 2.5, 1.0]), code=1)
    header["pixdim"][1:4] = 0.8, 0.7, 2.5
    header["vox_offset"] = 352
    for name, value in fields.items():
        where, _, index = name.partition("__")
        if index:
            header[where][int(index)] = value
        else:
            header[where] = value
    data = header.binaryblock + bytes(4) + array.tobytes() + extra
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def test_scaled_nifti_becomes_float32(tmp_path):
    path = nifti_file(tmp_path / "a.nii", scl_slope=0.5, scl_inter=-10)
    volume = read_volume(path)
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array.ravel(), np.arange(60) * 0.5 - 10)
    for slope, intercept in ((0, 7), (np.nan, np.nan), (1, 0)):
        path = nifti_file(tmp_path / "b.nii", scl_slope=slope, scl_inter=intercept)
        assert read_volume(path).array.dtype == np.int16
    double = np.arange(60, dtype="f8") / 3
    path = nifti_file(tmp_path / "c.nii", array=double, scl_slope=2, scl_inter=1)
    assert np.array_equal(read_volume(path).array.ravel(), double * 2 + 1)


def test_values_scaled_out_of_their_type_are_refused(tmp_path):
    huge = np.full(60, 1e30, dtype="<f4")
    path = nifti_file(tmp_path / "a.nii", array=huge, scl_slope=1e19, scl_inter=0)
    with pytest.raises(DataError, match=r"a\.nii: slope 1e\+19 .* beyond float32"):
        read_volume(path)


@pytest.mark.parametrize(("code", "mm"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (2 + 8, 1)])
def test_units_become_millimetres(tmp_path, code, mm):
    affine = np.diag([0.8, 0.7, 2.5, 1.0]) / mm
    affine[:3, 3] = np.array([-16, 24, 40]) / mm
    rows = {f"srow_{axis}": row for axis, row in zip("xyz", affine, strict=False)}
    pixdim = {f"pixdim__{i}": affine[i - 1, i - 1] for i in (1, 2, 3)}
    path = nifti_file(tmp_path / "a.nii", xyzt_units=code, **rows, **pixdim)
    grid, _ = read_grid(path)
    assert np.allclose(grid.spacing, (2.5, 0.7, 0.8))
    assert np.allclose(grid.origin, (40, -24, 16))


def test_a_nifti_without_transforms_lies_where_nibabel_puts_it(tmp_path):
    path = nifti_file(tmp_path / "a.nii", sform_code=0, qform_code=0)
    grid, _ = read_grid(path)
    ras = nibabel.affines.apply_affine(nibabel.load(path).affine, some_voxels(grid)[:, ::-1])
    ours = grid.index_to_world(some_voxels(grid))
    assert np.allclose(ours[:, ::-1] * (-1, -1, 1), ras)


def test_trailing_axes_of_one_are_dropped(tmp_path):
    path = nifti_file(tmp_path / "a.nii", dim=[5, 5, 4, 3, 1, 1, 1, 1])
    assert read_volume(path).array.shape == (3, 4, 5)
    path = nifti_file(tmp_path / "b.nii", dim=[5, 5, 4, 1, 1, 3, 1, 1])
    assert read_volume(path).array.shape == (3, 1, 4, 5)


def test_a_qform_rounded_past_one_is_still_a_rotation(tmp_path):
    path = nifti_file(tmp_path / "a.nii", sform_code=0, qform_code=1, quatern_d=1.00001)
    assert np.allclose(read_grid(path)[0].direction, np.eye(3), atol=1e-3)


BAD_NIFTI = [
    ({"sizeof_hdr": 0}, "not NIfTI: begins with 00000000"),
    ({"magic": b"ni1"}, "in another file"),
    ({"magic": b"xyz"}, "magic"),
    ({"dim__0": 2}, "2 axes"),
    ({"dim__0": 0}, "0 axes"),
    ({"dim__0": 99}, "99 axes"),
    ({"dim__1": 0}, "at least one voxel"),
    ({"dim__1": -5}, "at least one voxel"),
    ({"dim": [5, 5, 2, 1, 2, 3, 1, 1]}, "one channel axis at most"),
    ({"datatype": 128}, "datatype 128"),  # RGB
    ({"datatype": 32}, "datatype 32"),  # complex
    ({"bitpix": 8}, "bitpix 8; expected 16"),
    ({"vox_offset": 0}, "vox_offset is 0"),
    ({"vox_offset": 352.5}, "vox_offset is 352.5"),
    ({"vox_offset": np.nan}, "vox_offset is nan"),
    ({"vox_offset": 1e9}, "vox_offset is 1e"),
    ({"scl_slope": np.inf}, "scl_slope inf"),
    ({"scl_slope": 1e30}, "scl_slope 1e"),
    ({"scl_slope": 2, "scl_inter": np.nan}, "scl_inter nan"),
    ({"xyzt_units": 5}, "unit code 5"),
    ({"pixdim__1": 1.0}, "by its sform"),
    ({"srow_x": [np.nan, 0, 0, 0]}, "not finite"),
    ({"srow_x": [0, 0, 0, 0], "pixdim__1": 0}, "spacing"),
    ({"srow_x": [1e5, 0, 0, 0], "pixdim__1": 1e5}, "100 mm: are the units right"),
    ({"sform_code": 0, "qform_code": 1, "quatern_b": 3.0}, "qform is impossible"),
    ({"sform_code": 0, "qform_code": 1, "pixdim__2": -0.7}, "qform is impossible"),
    ({"sform_code": 1, "qform_code": 1, "qoffset_x": 90}, "put a corner"),
    ({"dim": [3, 500, 400, 300, 1, 1, 1, 1]}, "is cut"),
    ({"dim": [3, 5, 4, 2, 1, 1, 1, 1]}, "left over"),
]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("fields", "said"), BAD_NIFTI)
def test_an_impossible_nifti_is_refused_by_name(tmp_path, suffix, fields, said):
    path = nifti_file(tmp_path / f"case_07{suffix}", **fields)
    with pytest.raises(DataError, match=said) as caught:
        read_volume(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_sheared_axes_are_refused(tmp_path):
    sheared = [0.8, 0.14, 0, 0]
    path = nifti_file(tmp_path / "a.nii", srow_x=sheared, pixdim__2=np.hypot(0.7, 0.14))
    with pytest.raises(GeometryError, match=r"a\.nii: its sform is sheared: .* at 78\.69 degrees"):
        read_grid(path)
    mha = mha_file(tmp_path / "a.mha", TransformMatrix="1 0 0 0.1 0.995 0 0 0 1")
    with pytest.raises(GeometryError, match=r"a\.mha: its TransformMatrix is sheared"):
        read_grid(mha)


def test_different_spaces_may_lie_apart(tmp_path):
    path = nifti_file(tmp_path / "a.nii", sform_code=4, qform_code=1, qoffset_x=90)
    assert read_grid(path)[0].origin == (0, 0, 0)


@pytest.mark.parametrize("kind", ["nii.gz", "nrrd"])
def test_a_forged_header_costs_nothing(tmp_path, kind):
    path = tmp_path / f"bomb.{kind}"
    if kind == "nrrd":
        nrrd_file(path, sizes="20000 20000 20000", encoding="gzip")
    else:
        nifti_file(path, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
    begin = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(DataError, match="cut or forged"):
        read_volume(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20
    assert time.perf_counter() - begin < 1


# --- NRRD and MHA: what a header may say


def nrrd_file(path, *, drop=(), lines="", data=None, **fields):
    array = np.arange(60, dtype="<i2")
    header = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "5 4 3",
        "space directions": "(0.8,0,0) (0,0.7,0) (0,0,2.5)",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(-16,24,40)",
    } | {name.replace("_", " "): value for name, value in fields.items()}
    text = "".join(f"{name}: {value}\n" for name, value in header.items() if name not in drop)
    data = array.tobytes() if data is None else data
    path.write_bytes(f"NRRD0004\n# made by a test\n{text}{lines}\n".encode() + data)
    return path


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


def mha_file(path, *, drop=(), data=None, **fields):
    header = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "-16 24 40",
        "ElementSpacing": "0.8 0.7 2.5",
        "DimSize": "5 4 3",
        "ElementType": "MET_SHORT",
    } | fields
    header.setdefault("ElementDataFile", "LOCAL")
    text = "".join(f"{name} = {value}\n" for name, value in header.items() if name not in drop)
    path.write_bytes(text.encode() + (data or np.arange(60, dtype="<i2").tobytes()))
    return path


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


# --- cut and corrupt files


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, suffix):
    whole = write_volume(volume_of("f4"), tmp_path / f"a{suffix}").read_bytes()
    path = tmp_path / f"case_07{suffix}"
    lengths = {0, 1, 3, 4, 100, 347, 348, 351, 352, len(whole) - 8, len(whole) - 4, len(whole) - 1}
    for length in [n for n in (*lengths, len(whole) // 2) if n < len(whole)]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            read_volume(path)
        assert str(caught.value).startswith(f"{path}: ")
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError):
        read_volume(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_a_wrong_checksum_is_refused(tmp_path, suffix):
    path = write_volume(volume_of(), tmp_path / f"a{suffix}")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # the CRC of gzip stands eight bytes from the end
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"corrupt compressed data .* \(incorrect data check\)"):
        read_volume(path)
    assert read_volume(write_volume(volume_of(), path)).array.shape == (3, 4, 5)


def test_gzip_members_are_joined(tmp_path):
    plain = write_volume(volume_of(), tmp_path / "a.nii").read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(plain[:100]) + gzip.compress(plain[100:]))
    assert np.array_equal(read_volume(path).array, volume_of().array)


def test_only_whole_packed_channels_count(tmp_path):
    path = write_volume(volume_of(channels=3), tmp_path / "a.nii.gz")
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(DataError, match="is cut"):
        read_volume(path, channel=0)  # whose own bytes are all there


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_header_is_read_or_refused_but_nothing_else(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    plain = suffix.removesuffix(".gz")
    head = bytearray(write_volume(volume_of(), path.with_name(f"b{plain}")).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(head), 352) - 1))
        head[at] = data.draw(st.integers(0, 255))
    path.write_bytes(gzip.compress(head) if suffix.endswith(".gz") else bytes(head))
    try:
        n_bytes = read_volume(path).array.nbytes
    except EffsegError as error:
        n_bytes, refusal = 0, str(error)
    assert refusal.startswith(f"{path}: ") if n_bytes == 0 else n_bytes < 2**20


def test_names_that_are_no_volumes(tmp_path):
    fifo = tmp_path / "image.nii"
    os.mkfifo(fifo)
    with pytest.raises(DataError, match=r"image\.nii: not a regular file"):
        read_volume(fifo)
    with pytest.raises(DataError, match="No such file"):
        read_volume(tmp_path / "nothing.nii.gz")
    for name in ("a.mhd", "a.nhdr", "a.hdr", "a.img"):
        (tmp_path / name).write_bytes(b"ElementDataFile = ../secret.raw\n")
        with pytest.raises(DataError, match="keeps its voxels in another file"):
            read_volume(tmp_path / name)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no format by this name; expected \.nii\.gz, \.nii"):
        read_volume(tmp_path / "a.txt")


def test_gzip_under_the_wrong_name_is_refused(tmp_path):
    whole = write_volume(volume_of(), tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "b.nii").write_bytes(whole)
    with pytest.raises(DataError, match=r"gzip data, .* expected plain"):
        read_volume(tmp_path / "b.nii")
    (tmp_path / "c.nii.gz").write_bytes(gzip.decompress(whole))
    with pytest.raises(DataError, match=r"plain data, .* expected gzip"):
        read_volume(tmp_path / "c.nii.gz")


# --- writing: whole or not at all


@contextmanager
def room_for(n_bytes):
    """Files may not grow further: what a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_room_nothing_is_left_and_the_old_file_stays(tmp_path, suffix):
    path = write_volume(volume_of(), tmp_path / f"a{suffix}")
    before = path.read_bytes()
    noise = np.random.default_rng(0).normal(size=(16, 64, 64)).astype("f4")
    with (
        room_for(4096),
        pytest.raises(DataError, match=rf"a{suffix}: cannot be written: File too large"),
    ):
        write_volume(Volume(noise, Grid(noise.shape)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_bytes_lost_without_a_word_are_noticed(tmp_path, monkeypatch, suffix, harm):
    def lossy(handle):  # a disk that keeps something else than what it was given
        size = os.fstat(handle).st_size
        if harm == "cut":
            os.truncate(handle, size - 10)
        else:
            with open(f"/proc/self/fd/{handle}", "r+b") as file:  # noqa: PTH123 - it is a handle
                file.seek(size - 20)
                byte = file.read(1)
                file.seek(size - 20)
                file.write(bytes([byte[0] ^ 255]))

    monkeypatch.setattr(os, "fsync", lossy)
    with pytest.raises(DataError, match=rf"a{suffix}: is not what was written, is the disk full"):
        write_volume(volume_of(), tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_volume(volume_of(), tmp_path / "a.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=os.strerror(errno.EEXIST)):
        write_volume(volume_of(), tmp_path / "file" / "a.nii")
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        write_volume(volume_of(), tmp_path / "folder.nii")
    with pytest.raises(DataError, match="no format by this name"):
        write_volume(volume_of(), tmp_path / "a.zip")
    with pytest.raises(DataError, match="100 mm"):
        write_volume(Volume(np.zeros((1, 1, 1)), Grid((1, 1, 1), (1e3, 1, 1))), tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"32767 along an axis: write \.nrrd"):
        write_volume(Volume(np.zeros((1, 1, 40000)), Grid((1, 1, 40000))), tmp_path / "a.nii")
    with pytest.raises(DataError, match="no channels"):
        write_volume(Volume(np.zeros((0, 1, 1, 1)), Grid((1, 1, 1))), tmp_path / "a.nii")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.nii"]


def test_folders_are_made_and_links_followed(tmp_path):
    path = write_volume(volume_of(), tmp_path / "new" / "folder" / "a.mha")
    link = tmp_path / "link.mha"
    link.symlink_to(path)
    write_volume(volume_of("u1"), link)
    assert link.is_symlink()
    assert read_volume(path).array.dtype == np.uint8


# --- DICOM


CT = "1.2.840.10008.5.1.4.1.1.2"
REPORT = "1.2.840.10008.5.1.4.1.1.88.22"


def ct_slice(index, *, series="1.2.3", affine=None, values=None, syntax=ExplicitVRLittleEndian):
    """Slice `index` of a CT whose 4 x 4 LPS affine (x, y, z) is given."""
    affine = np.diag([0.8, 0.7, 2.5, 1.0]) if affine is None else affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :3] / spacing
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = CT
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = CT, meta.MediaStorageSOPInstanceUID
    data.Modality = "CT"
    data.SeriesInstanceUID, data.FrameOfReferenceUID = series, "1.2.3.4"
    data.ImagePositionPatient = [f"{v:.6f}" for v in affine[:3, 3] + index * affine[:3, 2]]
    data.ImageOrientationPatient = [f"{v:.9f}" for v in cosines[:, :2].T.ravel()]
    data.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
    data.SliceThickness = "9"  # of no use: gaps are what counts
    data.Rows, data.Columns = 4, 5
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = 1
    data.RescaleSlope, data.RescaleIntercept = "1", "-1024"
    values = np.arange(20, dtype="<i2").reshape(4, 5) + 100 * index if values is None else values
    data.PixelData = values.astype("<i2").tobytes()
    return data


def save(data, path):
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are meant to be wrong
        data.save_as(path, enforce_file_format=True)
    return path


def series(folder, slices):
    for n, data in enumerate(slices):
        save(data, folder / f"{n:03d}.dcm")
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"case/{file.name}")
    return path


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


# --- real data


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


@pytest.mark.parametrize(
    "name",
    [
        "msd-hippocampus/images/hippocampus_003.nii.gz",
        "totalsegmentator/example_ct.nii.gz",
        "openkbp-headneck/images/pt_13.nii.gz",
        "sts-ibsi/STS_002/CT_mask.nii.gz",
        "pyradiomics/brain1_image.nrrd",
    ],
)
def test_real_files_read_as_simpleitk_reads_them(shared, name):
    folder, _, rest = name.partition("/")
    path = shared(folder) / rest
    volume, image = read_volume(path), sitk.ReadImage(path)
    assert np.array_equal(volume.array, sitk.GetArrayViewFromImage(image))
    assert volume.array.dtype == sitk.GetArrayViewFromImage(image).dtype
    for index in some_voxels(volume.grid):
        place = image.TransformIndexToPhysicalPoint(index[::-1].tolist())
        assert np.allclose(place[::-1], volume.grid.index_to_world(index), atol=1e-3)
