"""NIfTI: what a header may say, and where nibabel puts its voxels."""

import nibabel
import numpy as np
import pytest
from volume_files import ORDERS, mha_file, nifti_file, some_voxels, volume_of

from effseg.errors import DataError, GeometryError
from effseg.io import read_grid, read_volume, write_volume


def test_a_nifti_written_twice_has_the_same_affine_to_the_bit(tmp_path):
    first = write_volume(volume_of(), tmp_path / "a.nii.gz")
    second = write_volume(read_volume(first), tmp_path / "b.nii")
    assert np.array_equal(nibabel.load(first).affine, nibabel.load(second).affine)


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
