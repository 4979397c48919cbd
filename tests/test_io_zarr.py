"""Volumes in Zarr stores: what others read there, what was meant, whole or not at all."""

import json
import os
import shutil
import tracemalloc
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_files import DTYPES, GRID, ORDERS, room_for, volume_of

from effseg.errors import DataError, GeometryError
from effseg.io import (
    SlabReader,
    SlabWriter,
    StoredVolume,
    list_volumes,
    read_grid,
    read_volume,
    write_volume,
    writing_bytes,
)
from effseg.volume import Grid, Volume

zarr = pytest.importorskip("zarr")

LONG = Grid(shape=(37, 9, 39), spacing=(2.5, 0.7, 0.8), origin=(-301.1, 72.3, -45.6))
ARRAY = np.random.default_rng(0).integers(0, 5, LONG.shape).astype("u1")


def write_slabs(path, *, axis=0, thickness=5, stop=None, dtype="u1", resume=True):
    """Write what is missing; the planes that were there. Ends behind plane `stop` by an error."""
    array = ARRAY.astype(dtype)
    with SlabWriter(path, LONG, dtype, axis=axis, resume=resume, fingerprint="1") as writer:
        begun = writer.done
        while writer.done < LONG.shape[axis]:
            last = min(writer.done + thickness, LONG.shape[axis])
            writer.write(writer.done, array.take(range(writer.done, last), axis))
            if stop is not None and writer.done >= stop:
                raise InterruptedError
    return begun


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(path):
    """Every file of a store."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def foreign(path, image, *, zarr_format=2, shape=(6, 5, 4), **attributes):
    """A store that somebody else wrote; its voxels."""
    group = zarr.create_group(path, zarr_format=zarr_format)
    group.attrs.update({"multiscales": [image]} if zarr_format == 2 else {"ome": image})
    group.attrs.update(attributes)
    array = np.arange(np.prod(shape)).reshape(shape).astype(">i2")
    group.create_array("full", data=array, chunks=(2,) * len(shape))
    group.create_array("half", data=array[..., ::2])
    return array


def image_of(**changes):
    """The metadata of an image in micrometres, in two resolutions."""
    levels = [
        {
            "path": name,
            "coordinateTransformations": [
                {"type": "scale", "scale": [2000.0, 500.0, scale]},
                {"type": "translation", "translation": [3000.0, 0.0, -1000.0]},
            ],
        }
        for name, scale in (("full", 500.0), ("half", 1000.0))
    ]
    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
    return {"axes": axes, "datasets": levels} | changes


def test_axis_orders_of_an_oblique_volume_come_back(tmp_path):
    whole = volume_of()
    for n, axes in enumerate(ORDERS[::7]):
        stored = whole.reordered(axes)
        path = write_volume(stored, tmp_path / f"{n}.zarr")
        back = read_volume(path)
        assert np.array_equal(back.array, stored.array)
        assert back.grid == stored.grid  # to the last bit
        assert read_grid(path) == (back.grid, 1)
    assert [path.name for path in list_volumes(tmp_path)] == names(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_channels_are_kept(tmp_path, dtype):
    for channels in (None, 3):
        volume = volume_of(dtype, channels=channels)
        path = write_volume(volume, tmp_path / "a.zarr")
        back = read_volume(path)
        assert back.array.dtype == dtype
        assert np.array_equal(back.array, volume.array)
        assert zarr.open_group(path, mode="r")["0"].dtype.str[1:] == dtype
    assert np.array_equal(read_volume(path, channel=1).array, volume.array[1])
    slabs = SlabReader.of_channels(path)[2].slabs(2)
    assert np.array_equal(np.concatenate([slab for _, slab in slabs]), volume.array[2])
    one = write_volume(volume_of(dtype, channels=1), tmp_path / "b.zarr")
    assert read_volume(one).array.shape == GRID.shape


def test_what_is_written_is_ome_zarr(tmp_path):
    path = write_volume(Volume(ARRAY, LONG), tmp_path / "a.zarr")
    group = zarr.open_group(path, mode="r")
    assert group.metadata.zarr_format == 3
    assert np.array_equal(group["0"][...], ARRAY)
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"
    (image,) = ome["multiscales"]
    assert [axis["name"] for axis in image["axes"]] == ["z", "y", "x"]
    assert {axis["unit"] for axis in image["axes"]} == {"millimeter"}
    (level,) = image["datasets"]
    assert level["coordinateTransformations"] == [
        {"type": "scale", "scale": [2.5, 0.7, 0.8]},
        {"type": "translation", "translation": [-301.1, 72.3, -45.6]},
    ]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_images_of_others_are_read(tmp_path, zarr_format):
    image = image_of(coordinateTransformations=[{"type": "scale", "scale": [1.0, 1.0, 2.0]}])
    if zarr_format == 3:
        image = {"version": "0.5", "multiscales": [image]}
    array = foreign(tmp_path / "a.zarr", image, zarr_format=zarr_format)
    volume = read_volume(tmp_path / "a.zarr")
    assert np.array_equal(volume.array, array)
    assert volume.array.dtype.isnative
    assert volume.grid == Grid((6, 5, 4), spacing=(2.0, 0.5, 1.0), origin=(3.0, 0.0, -2.0))
    pieces = list(SlabReader(tmp_path / "a.zarr").slabs(4))
    assert [start for start, _ in pieces] == [0, 4]
    assert np.array_equal(np.concatenate([piece for _, piece in pieces]), array)
    assert StoredVolume(tmp_path / "a.zarr").grid == volume.grid


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"datasets": []}, "multiscales.0.datasets: .* at least 1 item"),
        ({"axes": [{"name": n} for n in "tzyx"]}, r"axes \('t', 'z', 'y', 'x'\); expected"),
        ({"axes": [{"name": n} for n in "zyx"]}, "axis z is in no unit; expected one of milli"),
        ({"axes": [{"name": n, "unit": "pixel"} for n in "zyx"]}, "axis z is in pixel"),
        ({"coordinateTransformations": [{"type": "affine"}]}, "of type 'affine'; expected scale"),
        ({"coordinateTransformations": [{"type": "scale", "scale": [1]}]}, "of 3 axes"),
        (
            {"coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1e6]}]},
            "expected 0.001 to 100 mm",
        ),
    ],
)
def test_metadata_that_do_not_say_where_voxels_lie_are_refused(tmp_path, change, said):
    foreign(tmp_path / "a.zarr", image_of(**change))
    with pytest.raises(DataError, match=said) as caught:
        read_grid(tmp_path / "a.zarr")
    assert str(caught.value).startswith(f"{tmp_path / 'a.zarr'}: ")
    assert "\n" not in str(caught.value)


def test_stores_that_are_no_images_are_refused(tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "file.zarr").write_bytes(b"")
    zarr.create_array(tmp_path / "array.zarr", data=ARRAY)
    foreign(tmp_path / "flat.zarr", image_of(), shape=(6, 5))
    foreign(tmp_path / "turned.zarr", image_of(), effseg={"direction": [[1, 1, 0]] * 3})
    for name, error, said in [
        ("empty.zarr", DataError, "cannot be read as a Zarr store"),
        ("file.zarr", DataError, "expected a folder that holds a Zarr store"),
        ("array.zarr", DataError, "array"),
        ("flat.zarr", DataError, r"shape \(6, 5\) of 3 axes"),
        ("turned.zarr", GeometryError, "orthonormal"),
        ("none.zarr", DataError, "No such file"),
    ]:
        with pytest.raises(error, match=said) as caught:
            read_volume(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_chunk_that_is_cut_is_noticed(tmp_path):
    path = write_volume(Volume(ARRAY, LONG), tmp_path / "a.zarr")
    chunk = path / "0" / "c" / "1" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.zarr: cannot be read as a Zarr store"):
        read_volume(path)
    slabs = SlabReader(path).slabs(8)
    assert [next(slabs)[0], next(slabs)[0]] == [0, 8]
    with pytest.raises(DataError, match=r"a\.zarr"):
        next(slabs)


@given(axis=st.integers(0, 2), thickness=st.integers(1, 40), resume=st.booleans())
@settings(max_examples=10, deadline=None)
def test_slabs_make_the_same_store_however_thick(tmp_path_factory, axis, thickness, resume):
    folder = tmp_path_factory.mktemp("slabs")
    write_slabs(folder / "a.zarr", axis=axis, thickness=thickness, resume=resume)
    write_slabs(folder / "b.zarr", axis=axis, resume=False)
    assert names(folder) == ["a.zarr", "b.zarr"]
    one, other = content(folder / "a.zarr"), content(folder / "b.zarr")
    assert one.pop("zarr.json").replace(b'"a"', b'"b"') == other.pop("zarr.json")
    assert one == other
    assert np.array_equal(read_volume(folder / "a.zarr").array, ARRAY)
    pieces = [slab for _, slab in SlabReader(folder / "a.zarr").slabs(thickness)]
    assert {len(piece) for piece in pieces[:-1]} <= {thickness}
    assert np.array_equal(np.concatenate(pieces), ARRAY)


@pytest.mark.parametrize("axis", [0, 2])
def test_a_stopped_writer_goes_on_at_a_whole_row_of_chunks(tmp_path, axis):
    path = tmp_path / "slabs" / "a.zarr"
    for stop, begun in ((17, 16), (20, 16), (34, 32)):
        with pytest.raises(InterruptedError):
            write_slabs(path, axis=axis, stop=stop)
        assert names(path.parent) == [".a.zarr.journal", ".a.zarr.partial"]
        shutil.copytree(path.parent, tmp_path / f"copy {stop}")
        assert write_slabs(tmp_path / f"copy {stop}" / "a.zarr", axis=axis) == begun
    assert write_slabs(path, axis=axis) == 32
    assert names(path.parent) == ["a.zarr"]
    assert np.array_equal(read_volume(path).array, ARRAY)
    with pytest.raises(InterruptedError):
        write_slabs(path, axis=axis, stop=20)
    with pytest.raises(DataError, match="begun with another dtype"):
        write_slabs(path, axis=axis, dtype="u2")
    shutil.rmtree(path.parent / ".a.zarr.partial")
    assert write_slabs(path, axis=axis) == 0


def test_a_crash_at_any_point_does_not_show(tmp_path, tmp_path_factory, monkeypatch):
    path, copies, fsync = tmp_path / "slabs" / "a.zarr", [], os.fsync
    path.parent.mkdir()

    def watched(handle):
        copies.append(tmp_path_factory.mktemp("crash") / "slabs")
        shutil.copytree(path.parent, copies[-1])
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_slabs(path, axis=1, thickness=3)
    monkeypatch.undo()
    expected, found = content(path), set()
    for folder in copies:
        found.add(write_slabs(folder / "a.zarr", axis=1))
        assert content(folder / "a.zarr") == expected
        assert names(folder) == ["a.zarr"]
    assert found == {0, 9}


def test_what_is_there_stays_until_the_new_is_whole(tmp_path):
    path = write_volume(volume_of(), tmp_path / "a.zarr")
    before = content(path)
    with pytest.raises(InterruptedError):
        write_slabs(path, stop=20, resume=False)
    assert content(path) == before
    assert names(tmp_path) == ["a.zarr"]
    noise = np.random.default_rng(0).normal(size=(20, 64, 64)).astype("f4")
    with room_for(4096), pytest.raises(DataError, match=r"a\.zarr: cannot be written: File too"):
        write_volume(Volume(noise, Grid(noise.shape)), path)
    assert content(path) == before
    link = tmp_path / "link.zarr"
    link.symlink_to(path)
    write_volume(Volume(noise, Grid(noise.shape)), link)
    assert link.is_symlink()
    assert np.array_equal(read_volume(path).array, noise)
    assert names(tmp_path) == ["a.zarr", "link.zarr"]


def test_what_is_more_than_an_image_is_never_replaced(tmp_path):
    (tmp_path / "file.zarr").write_bytes(b"mine")
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr" / "notes.txt").write_text("mine")
    more = write_volume(volume_of(), tmp_path / "more.zarr")
    zarr.open_group(more).create_array("labels", data=ARRAY)
    for name, said in [
        ("file.zarr", "is there and no Zarr store"),
        ("folder.zarr", "is there and not an OME-Zarr image"),
        ("more.zarr", "is there and holds labels beside an image"),
    ]:
        for write in (write_volume, lambda v, path: SlabWriter(path, v.grid, "u1")):
            with pytest.raises(DataError, match=said):
                write(volume_of(), tmp_path / name)
    assert set(names(tmp_path)) == {"file.zarr", "folder.zarr", "more.zarr"}
    (tmp_path / "folder.zarr" / "notes.txt").unlink()  # an empty one is no loss
    write_volume(volume_of(), tmp_path / "folder.zarr")


@pytest.mark.parametrize("resume", [False, True])
def test_chunks_that_the_disk_lost_are_noticed(tmp_path, resume):
    path = tmp_path / "a.zarr"
    writer = SlabWriter(path, LONG, "u1", resume=resume)
    writer.__enter__()
    writer.write(0, ARRAY)
    chunks = [file for file in tmp_path.rglob("0") if file.is_file()]
    assert len(chunks) == 3
    chunks[0].unlink()
    with pytest.raises(DataError, match=r"a\.zarr: is not what was written"):
        writer.__exit__(None, None, None)
    assert names(tmp_path) == []


def test_metadata_of_another_shape_are_noticed(tmp_path):
    writer = SlabWriter(tmp_path / "a.zarr", LONG, "u1")
    writer.__enter__()
    writer.write(0, ARRAY)
    (metadata,) = (f for f in tmp_path.rglob("zarr.json") if f.parent.name == "0")
    said = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(said | {"shape": [36, 9, 39]}))
    with pytest.raises(DataError, match="not what was written"):
        writer.__exit__(None, None, None)


@pytest.mark.parametrize("axis", [0, 2])
def test_slabs_take_what_was_foretold(tmp_path, axis):
    grid = Grid((64, 96, 112))
    slab = np.random.default_rng(0).normal(size=grid.crop((slice(4),) * 3).shape).astype("f4")
    slab = np.resize(slab, [8 if i == axis else n for i, n in enumerate(grid.shape)])
    path = tmp_path / "a.zarr"
    write_volume(volume_of(), tmp_path / "before.zarr")  # what is imported and begun but once
    tracemalloc.start()
    with SlabWriter(path, grid, "f4", axis=axis) as writer:
        for start in range(0, grid.shape[axis], 8):
            writer.write(start, slab)
    written = tracemalloc.get_traced_memory()[1]
    assert written <= writing_bytes(path, grid, 4)
    reader = SlabReader(path)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    for _, part in chain(reader.slabs(8), reader.slabs(3)):
        del part
    read = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert read <= reader.held_bytes(8) + 2**20
