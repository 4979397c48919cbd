"""Files to volumes and back, whatever the format. Oracle: SimpleITK, which effseg reads without."""

import errno
import gzip
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its users know it by this name
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from volume_files import (
    DTYPES,
    ORDERS,
    SUFFIXES,
    assert_same_place,
    nifti_file,
    nrrd_file,
    room_for,
    some_voxels,
    volume_of,
)

from effseg.errors import DataError, EffsegError
from effseg.io import VOLUME_SUFFIXES, read_grid, read_volume, strip_suffix, write_volume
from effseg.volume import Grid, Volume

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
