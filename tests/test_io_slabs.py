"""Volumes written and read slab by slab: the same bytes and numbers as whole, in less memory."""

import errno
import gzip
import hashlib
import os
import tracemalloc
import zlib

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its users know it by this name
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_files import (
    DTYPES,
    GRID,
    SUFFIXES,
    ct_slice,
    mha_file,
    nifti_file,
    nrrd_file,
    room_for,
    series,
    volume_of,
    zipped,
)

from effseg.errors import DataError, GeometryError
from effseg.io import SlabReader, SlabWriter, read_volume, write_volume
from effseg.volume import Grid, Volume

TURNED = Grid(
    shape=(3, 4, 5),
    spacing=(2.5, 0.7, 0.8),
    origin=(-301.1, 72.3, -45.6),
    direction=((0.6, -0.8, 0.0), (0.8, 0.6, 0.0), (0.0, 0.0, 1.0)),
)
STRAIGHT = Grid(shape=(9, 20, 30), spacing=(1.25, 0.5, 0.5), origin=(1.0, 2.0, 3.0))
MIB = 2**20


def slabs_of(array, axis, thickness):
    for start in range(0, array.shape[axis], thickness):
        yield start, array.take(range(start, min(start + thickness, array.shape[axis])), axis)


def write_slabs(path, volume, *, axis=0, thickness=2):
    with SlabWriter(path, volume.grid, volume.array.dtype, axis=axis) as writer:
        for start, slab in slabs_of(volume.array, axis, thickness):
            writer.write(start, slab)
    return path


def read_slabs(path, thickness, **options):
    """All slabs, put together."""
    reader = SlabReader(path, **options)
    pieces = list(reader.slabs(thickness))
    assert [start for start, _ in pieces] == list(range(0, reader.grid.shape[0], thickness))
    assert {piece.dtype for _, piece in pieces} == {reader.dtype}
    return Volume(np.concatenate([piece for _, piece in pieces]), reader.grid)


# --- the bytes of a file


DIGESTS = {  # unpacked, of what was written before there were slabs
    (".nii", "turned", "i2", None): "2714f5bba9a25635",
    (".nii", "turned", "i2", 3): "a157b4d8ca799955",
    (".nii", "straight", "?", None): "e8a1d94188aca639",
    (".nii", "straight", "f4", None): "bc37eeb94833a445",
    (".nrrd", "turned", "i2", None): "8bef7f07fe0a1dac",
    (".nrrd", "turned", "i2", 3): "7f24e167a711e443",
    (".nrrd", "straight", "?", None): "1d27ce91c2d9efc6",
    (".nrrd", "straight", "f4", None): "3a32012821079314",
    (".mha", "turned", "i2", None): "a2d52a08523fa335",
    (".mha", "turned", "i2", 3): "ce66e86981af0781",
    (".mha", "straight", "?", None): "3ccbf78355ecd932",
    (".mha", "straight", "f4", None): "4b922df366b91a83",
}


@pytest.mark.parametrize(("suffix", "place", "dtype", "channels"), DIGESTS)
def test_files_have_the_bytes_they_always_had(tmp_path, suffix, place, dtype, channels):
    grid = TURNED if place == "turned" else STRAIGHT
    shape = (*([channels] if channels else []), *grid.shape)
    array = (np.arange(np.prod(shape)) * 7 % 101).reshape(shape).astype(dtype)
    data = write_volume(Volume(array, grid), tmp_path / f"a{suffix}").read_bytes()
    head = data.index(b"\n\n") + 2 if suffix == ".nrrd" else 0
    plain = data[:head] + gzip.decompress(data[head:]) if head else data
    digest = hashlib.sha256(plain).hexdigest()
    assert digest.startswith(DIGESTS[suffix, place, dtype, channels])
    if head:  # packed in one run, whatever this machine's zlib makes of it
        pack = zlib.compressobj(4, wbits=31)
        assert data[head:] == pack.compress(plain[head:]) + pack.flush()
    if suffix == ".nii":
        packed = write_volume(Volume(array, grid), tmp_path / "a.nii.gz").read_bytes()
        pack = zlib.compressobj(4, wbits=31)
        assert packed == pack.compress(plain) + pack.flush()


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    dtype=st.sampled_from((*DTYPES, "?", "f2", ">i2")),
    axis=st.integers(0, 2),
    thickness=st.integers(1, 8),
)
@settings(max_examples=25, deadline=None)
def test_slabs_make_the_file_that_the_whole_makes(
    tmp_path_factory, suffix, shape, dtype, axis, thickness
):
    folder = tmp_path_factory.mktemp("slabs")
    volume = volume_of(dtype, grid=Grid(shape, GRID.spacing, GRID.origin, GRID.direction))
    whole = write_volume(volume, folder / f"whole{suffix}")
    slabs = write_slabs(folder / f"slabs{suffix}", volume, axis=axis, thickness=thickness)
    assert slabs.read_bytes() == whole.read_bytes()
    assert sorted(folder.iterdir()) == sorted([slabs, whole])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_files_of_many_blocks_are_alike_as_well(tmp_path, axis):
    noise = np.random.default_rng(0).normal(size=(9, 400, 500)).astype("f4").round(1)
    volume = Volume(noise, Grid(noise.shape))
    whole = write_volume(volume, tmp_path / "whole.nii.gz")
    slabs = write_slabs(tmp_path / "slabs.nii.gz", volume, axis=axis, thickness=7)
    assert slabs.read_bytes() == whole.read_bytes()


def test_simpleitk_reads_what_slabs_made(tmp_path):
    volume = volume_of("u1")
    for suffix in SUFFIXES:
        image = sitk.ReadImage(write_slabs(tmp_path / f"a{suffix}", volume))
        assert np.array_equal(sitk.GetArrayFromImage(image), volume.array)


def test_wide_integers_stay_for_their_values_are_not_known_beforehand(tmp_path):
    path = write_slabs(tmp_path / "a.nii.gz", volume_of("i8"))
    assert read_volume(path).array.dtype == np.int64


def test_slabs_may_be_views_in_any_order_of_axes(tmp_path):
    volume = volume_of("f4")
    turned = Volume(np.asfortranarray(volume.array)[::-1], GRID)
    for axis in range(3):
        back = read_volume(write_slabs(tmp_path / "a.mha", turned, axis=axis))
        assert np.array_equal(back.array, turned.array)


# --- whole or not at all


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slab_that_is_not_the_next_is_refused(tmp_path, axis):
    path = tmp_path / "case_07.nii.gz"
    array = volume_of().array
    first = array.take([0], axis)
    with SlabWriter(path, GRID, "i2", axis=axis) as writer:
        assert writer.done == 0
        writer.write(0, first)
        assert writer.done == 1
        for start, slab, said in [
            (0, first, "a slab from plane 0; expected the next, from 1"),
            (2, first, "a slab from plane 2; expected the next, from 1"),
            (1, first.astype("u2"), "a slab of uint16; expected int16"),
            (1, first[0], "a slab of shape"),
            (1, array.take([], axis), "expected 1 to"),
            (1, array, f"expected 1 to {GRID.shape[axis] - 1} planes along axis {axis}"),
            (1, np.zeros((9, 9, 9), "i2"), "a slab of shape"),
        ]:
            with pytest.raises(DataError, match=said) as caught:
                writer.write(start, slab)
            assert str(caught.value).startswith(f"{path}: ")
            assert "\n" not in str(caught.value)
        writer.write(1, array.take(range(1, GRID.shape[axis]), axis))
    assert np.array_equal(read_volume(path).array, array)  # refusals did no harm


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_not_finished_leaves_nothing(tmp_path, suffix, axis):
    path = write_volume(volume_of("u1"), tmp_path / f"a{suffix}")
    before = path.read_bytes()
    slab = volume_of().array.take([0], axis)

    def stopped(error):
        with SlabWriter(path, GRID, "i2", axis=axis) as writer:
            writer.write(0, slab)
            if error is not None:
                raise error

    said = f"1 of {GRID.shape[axis]} planes along axis {axis} were written"
    with pytest.raises(DataError, match=said):
        stopped(None)
    for error in (KeyboardInterrupt(), OSError(errno.EIO, "the caller's own")):
        with pytest.raises(type(error)) as caught:
            stopped(error)
        assert caught.value is error
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_nothing(tmp_path, suffix, axis):
    noise = np.random.default_rng(0).normal(size=(16, 64, 64)).astype("f4")
    with (
        room_for(4096),
        pytest.raises(DataError, match=rf"a{suffix}: cannot be written: File too large"),
    ):
        write_slabs(tmp_path / f"a{suffix}", Volume(noise, Grid(noise.shape)), axis=axis)
    assert list(tmp_path.iterdir()) == []


def test_staged_voxels_that_were_lost_are_noticed(tmp_path, monkeypatch):
    def lossy():  # a disk that keeps something else than what it was given
        writer._slabs._file.flush()
        os.pwrite(writer._slabs._file.fileno(), b"\xff", 20)
        return finish()

    writer = SlabWriter(tmp_path / "a.nii", GRID, "i2", axis=1)
    finish = writer._slabs.finish
    monkeypatch.setattr(writer._slabs, "finish", lossy)
    writer.__enter__()
    writer.write(0, volume_of("i2").array)
    with pytest.raises(DataError, match="staged voxels are not what was written"):
        writer.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_it_is_begun(tmp_path):
    (tmp_path / "folder.nii").mkdir()
    for name, grid, options, said in [
        ("folder.nii", GRID, {}, "not a regular file"),
        ("a.zip", GRID, {}, "no format by this name"),
        ("a.nii", Grid((1, 1, 1), (1e3, 1, 1)), {}, "100 mm"),
        ("a.nii", Grid((1, 1, 40000)), {}, r"32767 along an axis: write \.nrrd"),
        ("a.nii", GRID, {"axis": 3}, r"axis 3; expected 0 \(z\), 1 \(y\) or 2 \(x\)"),
    ]:
        with pytest.raises(DataError, match=said):
            SlabWriter(tmp_path / name, grid, "u1", **options)
    with pytest.raises(DataError, match="voxels of type complex64 cannot be stored"):
        SlabWriter(tmp_path / "a.nii", GRID, "c8")
    with pytest.raises(DataError, match="write inside of a with block"):
        SlabWriter(tmp_path / "a.nii", GRID, "u1").write(0, np.zeros(GRID.shape, "u1"))
    assert [p.name for p in tmp_path.iterdir()] == ["folder.nii"]


# --- memory


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_writing_and_reading_take_a_slab_and_a_few_blocks(tmp_path, suffix, axis):
    grid, thickness = Grid((96, 256, 256)), 4
    whole_bytes = grid.n_voxels * 4
    slab = np.zeros(tuple(thickness if a == axis else n for a, n in enumerate(grid.shape)), "f4")
    slab[:, ::3, ::5] = 1.5
    spare = 10 * MIB  # a block of 1 MiB voxels, what it packs to, buffers; of 24 MiB in all
    path = tmp_path / f"a{suffix}"
    tracemalloc.start()
    with SlabWriter(path, grid, "f4", axis=axis) as writer:
        for start in range(0, grid.shape[axis], thickness):
            writer.write(start, slab)
    _, peak = tracemalloc.get_traced_memory()
    assert peak < spare < whole_bytes / 2
    tracemalloc.reset_peak()
    n_planes = 0
    for start, piece in SlabReader(path).slabs(thickness):
        assert start == n_planes
        n_planes += len(piece)
        del piece
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_planes == grid.shape[0]
    assert peak < 2 * thickness * 256 * 256 * 4 + 6 * MIB


# --- reading


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    dtype=st.sampled_from(DTYPES),
    channels=st.sampled_from((None, 1, 3)),
    thickness=st.integers(1, 8),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_slabs_put_together_are_the_whole(
    tmp_path_factory, suffix, shape, dtype, channels, thickness, data
):
    grid = Grid(shape, GRID.spacing, GRID.origin, GRID.direction)
    path = tmp_path_factory.mktemp("read") / f"a{suffix}"
    write_volume(volume_of(dtype, channels=channels, grid=grid), path)
    channel = data.draw(st.integers(0, channels - 1)) if channels else None
    found, expected = (
        read_slabs(path, thickness, channel=channel),
        read_volume(path, channel=channel),
    )
    assert found.array.dtype == expected.array.dtype
    assert np.array_equal(found.array, expected.array)
    assert found.grid == expected.grid


def foreign_files(folder):
    """Files as others write them: other byte orders, packings, scales and worlds."""
    swapped = np.arange(60, dtype=">i2").tobytes()
    floats = np.arange(60, dtype="<f8") / 3
    packed = zlib.compress(np.arange(60, dtype="<i2").tobytes())
    plain = nifti_file(folder / "plain.nii").read_bytes()
    members = folder / "members.nii.gz"
    members.write_bytes(gzip.compress(plain[:100]) + gzip.compress(plain[100:]))
    axes = "(0.8,0,0) (0,0.7,0) (0,0,2.5)"
    return [
        nifti_file(folder / "scaled.nii", scl_slope=0.5, scl_inter=-10),
        nifti_file(folder / "scaled.nii.gz", scl_slope=0.5, scl_inter=-10),
        nifti_file(folder / "double.nii", array=floats, scl_slope=2, scl_inter=1),
        members,
        mha_file(folder / "big.mha", BinaryDataByteOrderMSB="True", data=swapped),
        mha_file(folder / "packed.mha", CompressedData="True", data=packed),
        nrrd_file(folder / "big.nrrd", endian="big", data=swapped),
        nrrd_file(folder / "raw.nrrd"),
        nrrd_file(
            folder / "ras.nrrd",
            space="right-anterior-superior",
            encoding="gzip",
            data=gzip.compress(np.arange(60, dtype="<i2").tobytes()),
        ),
        nrrd_file(
            folder / "first.nrrd",
            dimension="4",
            sizes="1 5 4 3",
            space_directions=f"none {axes}",
        ),
    ]


@pytest.mark.parametrize("thickness", [1, 2, 3, 9])
def test_files_of_others_read_alike_in_slabs(tmp_path, thickness):
    for path in foreign_files(tmp_path):
        found, expected = read_slabs(path, thickness), read_volume(path)
        assert found.array.dtype == expected.array.dtype, path
        assert np.array_equal(found.array, expected.array), path
        assert found.grid == expected.grid, path


@pytest.mark.parametrize(
    "slices",
    [
        lambda: [ct_slice(n) for n in (2, 0, 3, 1)],
        lambda: [ct_slice(n, values=np.full((4, 5), 9000 * n - 32000)) for n in range(5)],
        lambda: [with_slope(ct_slice(n), n) for n in range(4)],
    ],
    ids=["int16", "int32", "float32"],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_series_reads_alike_in_slabs(tmp_path, slices, kind):
    path = series(tmp_path / "ct", slices())
    if kind == "zip":
        path = zipped(path, tmp_path / "ct.zip")
    expected = read_volume(path)
    for thickness in (1, 3, 9):
        found = read_slabs(path, thickness, channel=0)
        assert found.array.dtype == expected.array.dtype
        assert np.array_equal(found.array, expected.array)
        assert found.grid == expected.grid


def with_slope(data, n):
    data.RescaleSlope = "0.5" if n == 2 else "1"
    return data


def test_a_series_that_changes_while_it_is_read_is_refused(tmp_path):
    folder = series(tmp_path / "ct", [ct_slice(n) for n in range(4)])
    reader = SlabReader(folder)
    wide = np.full((4, 5), -32000)  # with -1024 below int16
    series(folder, [ct_slice(n, values=wide) for n in range(4)])
    with pytest.raises(DataError, match="has changed while it was read"):
        list(reader.slabs(2))
    series(folder, [ct_slice(n) for n in range(5)])
    with pytest.raises(DataError, match="has changed while it was read"):
        list(reader.slabs(2))


def test_a_reader_reads_as_often_as_it_is_asked(tmp_path):
    reader = SlabReader(write_volume(volume_of(), tmp_path / "a.nii.gz"))
    one, two = reader.slabs(1), reader.slabs(2)
    next(one)
    assert np.array_equal(np.concatenate([slab for _, slab in two]), volume_of().array)
    assert np.array_equal(np.concatenate([slab for _, slab in one]), volume_of().array[1:])


def test_what_slabs_are_of_has_to_be_clear(tmp_path):
    path = write_volume(volume_of(channels=3), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=r"a\.nii\.gz: 3 channels; expected one: choose it, 0 to 2"):
        SlabReader(path)
    with pytest.raises(DataError, match="channel 3 of 3; expected 0 to 2"):
        SlabReader(path, channel=3)
    with pytest.raises(DataError, match="slabs of 0 planes; expected 1 or more"):
        SlabReader(path, channel=0).slabs(0)
    with pytest.raises(GeometryError, match="sheared"):
        SlabReader(mha_file(tmp_path / "a.mha", TransformMatrix="1 0 0 0.1 0.995 0 0 0 1"))
    with pytest.raises(DataError, match="No such file"):
        SlabReader(tmp_path / "nothing.nii")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cut_file_never_yields_its_last_slab(tmp_path, suffix):
    volume = volume_of("f4", grid=STRAIGHT)
    whole = write_volume(volume, tmp_path / f"a{suffix}").read_bytes()
    path = tmp_path / f"case_07{suffix}"
    cuts = {
        0,
        1,
        100,
        352,
        *range(400, len(whole), len(whole) // 7),
        len(whole) - 8,
        len(whole) - 1,
    }
    for data in [*(whole[:cut] for cut in sorted(cuts)), whole + b"\0"]:
        path.write_bytes(data)
        pieces = []
        with pytest.raises(DataError) as caught:
            pieces.extend(SlabReader(path).slabs(2))
        assert str(caught.value).startswith(f"{path}: ")
        for start, slab in pieces:
            assert start + len(slab) < STRAIGHT.shape[0]
            assert np.array_equal(slab, volume.array[start : start + 2])


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_a_wrong_checksum_is_found_before_the_last_slab(tmp_path, suffix):
    path = write_volume(volume_of(), tmp_path / f"a{suffix}")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # the CRC of gzip stands eight bytes from the end
    path.write_bytes(data)
    pieces = []
    with pytest.raises(DataError, match="incorrect data check"):
        pieces.extend(SlabReader(path).slabs(1))
    assert len(pieces) < GRID.shape[0]


def test_values_scaled_out_of_their_type_are_refused_in_slabs(tmp_path):
    huge = np.full(60, 1e30, dtype="<f4")
    path = nifti_file(tmp_path / "a.nii", array=huge, scl_slope=1e19, scl_inter=0)
    with pytest.raises(DataError, match=r"a\.nii: slope 1e\+19 .* beyond float32"):
        list(SlabReader(path).slabs(1))


def test_real_files_read_alike_in_slabs(shared):
    for name in ("hippocampus_001.nii.gz", "hippocampus_003.nii.gz"):
        path = shared("msd-hippocampus") / "images" / name
        if path.is_file():
            assert np.array_equal(read_slabs(path, 5).array, read_volume(path).array)


def test_the_lidc_series_reads_alike_in_slabs(shared):
    path = shared("lidc-idri") / "LIDC-IDRI-0001" / "dicom.zip"
    expected, reader = read_volume(path), SlabReader(path)
    assert reader.dtype == expected.array.dtype
    for start, slab in reader.slabs(16):
        assert np.array_equal(slab, expected.array[start : start + 16])
