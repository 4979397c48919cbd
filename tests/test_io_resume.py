"""Writers that are stopped and go on: the file is the one that an undisturbed writer makes."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its users know it by this name
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_files import SUFFIXES, room_for

from effseg.errors import DataError
from effseg.io import SlabReader, SlabWriter, read_volume, write_volume
from effseg.volume import Grid, Volume

GRID = Grid(shape=(7, 8, 9), spacing=(2.5, 0.7, 0.8), origin=(-301.1, 72.3, -45.6))
ARRAY = np.random.default_rng(0).integers(0, 5, GRID.shape).astype("u1")


def go_on(path, *, axis=0, thickness=2, fingerprint="weights 1", stop=None):
    """Write what is missing; the planes that were there. Ends after plane `stop` by an error."""
    with SlabWriter(path, GRID, "u1", axis=axis, resume=True, fingerprint=fingerprint) as writer:
        begun = writer.done
        while writer.done < GRID.shape[axis]:
            last = min(writer.done + thickness, GRID.shape[axis])
            writer.write(writer.done, ARRAY.take(range(writer.done, last), axis))
            if stop is not None and writer.done >= stop:
                raise InterruptedError
    return begun


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_resumable_file_holds_what_any_other_holds(tmp_path, suffix, axis):
    path = tmp_path / f"a{suffix}"
    assert go_on(path, axis=axis) == 0
    assert names(tmp_path) == [path.name]
    volume = read_volume(path)
    assert np.array_equal(volume.array, ARRAY)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(path)), ARRAY)
    pieces = [slab for _, slab in SlabReader(path).slabs(3)]
    assert np.array_equal(np.concatenate(pieces), ARRAY)
    if suffix in (".nii", ".mha") or axis != 0:
        whole = write_volume(Volume(ARRAY, GRID), tmp_path / f"b{suffix}")
        assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_writer_stopped_by_an_error_goes_on_where_it_ended(tmp_path, suffix, axis):
    go_on(tmp_path / f"whole{suffix}", axis=axis)
    expected = (tmp_path / f"whole{suffix}").read_bytes()
    path = tmp_path / "slabs" / f"a{suffix}"
    for stop in (2, 4, 6):
        with pytest.raises(InterruptedError):
            go_on(path, axis=axis, stop=stop)
        assert names(path.parent) == [f".{path.name}.journal", f".{path.name}.partial"]
    assert go_on(path, axis=axis) == 6
    assert path.read_bytes() == expected
    assert names(path.parent) == [path.name]
    assert go_on(path, axis=axis) == 0  # and once more from the beginning
    assert path.read_bytes() == expected


@pytest.fixture
def crashes(tmp_path_factory, monkeypatch):
    """Copies of a folder as a crash would leave it, before and after each sync with the disk."""
    copies = []
    fsync = os.fsync

    def watch(folder):
        def copy():
            copies.append(tmp_path_factory.mktemp("crash") / "slabs")
            shutil.copytree(folder, copies[-1])

        def watched(handle):
            copy()
            fsync(handle)
            copy()

        monkeypatch.setattr(os, "fsync", watched)

    yield watch, copies
    monkeypatch.undo()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("axis", [0, 2])
def test_a_crash_at_any_point_does_not_show(tmp_path, monkeypatch, crashes, suffix, axis):
    watch, copies = crashes
    path = tmp_path / "slabs" / f"a{suffix}"
    path.parent.mkdir()
    watch(path.parent)
    go_on(path, axis=axis)
    monkeypatch.undo()
    expected = path.read_bytes()
    assert len(copies) > 4 * GRID.shape[axis] // 2
    found = set()
    for folder in copies:
        again = folder / path.name
        found.add(go_on(again, axis=axis))
        assert again.read_bytes() == expected
        assert names(folder) == [path.name]
    assert found >= {*range(0, GRID.shape[axis], 2), GRID.shape[axis]}  # at each slab


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_torn_by_a_crash_does_not_count(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    go_on(path)
    expected = path.read_bytes()
    journal, partial = tmp_path / f".a{suffix}.journal", tmp_path / f".a{suffix}.partial"
    with pytest.raises(InterruptedError):
        go_on(path, stop=4)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    voxels = partial.read_bytes()
    for kept, rest, begun in [
        (b"".join(lines), voxels + b"half a slab", 4),
        (b"".join(lines) + lines[-1][:20], voxels + b"half a slab", 4),
        (b"".join(lines[:2]) + lines[2][:-1], voxels, 2),
        (b"".join(lines), voxels[:-1], 2),  # a slab that the disk has lost
        (b"".join(lines), b"", 0),
        (b"".join(lines[:1]), voxels, 0),
        (lines[0][:-1], voxels, 0),
        (b"", voxels, 0),
    ]:
        journal.write_bytes(kept)
        partial.write_bytes(rest)
        assert go_on(path) == begun
        assert path.read_bytes() == expected
        assert names(tmp_path) == [path.name]
    partial.write_bytes(voxels)  # without a journal it has no meaning
    assert go_on(path) == 0
    assert path.read_bytes() == expected


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    stop=st.integers(1, 7),
    axis=st.integers(0, 2),
    journal_share=st.floats(0, 1),
    partial_share=st.floats(0, 1.5),
)
@settings(max_examples=15, deadline=None)
def test_files_cut_anywhere_are_gone_on_with(
    tmp_path_factory, suffix, stop, axis, journal_share, partial_share
):
    folder = tmp_path_factory.mktemp("cut")
    go_on(folder / f"whole{suffix}", axis=axis)
    path = folder / "slabs" / f"a{suffix}"
    with pytest.raises(InterruptedError):
        go_on(path, axis=axis, stop=stop)
    for end, share in (("journal", journal_share), ("partial", partial_share)):
        file = path.with_name(f".{path.name}.{end}")
        os.truncate(file, int(file.stat().st_size * share))  # beyond the end, with zeros
    assert go_on(path, axis=axis) <= stop + 1
    assert path.read_bytes() == (folder / f"whole{suffix}").read_bytes()
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize("axis", [0, 1])
def test_finished_slabs_that_rotted_are_noticed_and_not_kept(tmp_path, axis):
    path = tmp_path / "a.mha"
    with pytest.raises(InterruptedError):
        go_on(path, axis=axis, stop=4)
    partial = tmp_path / ".a.mha.partial"
    data = bytearray(partial.read_bytes())
    data[-5] ^= 255
    partial.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.mha: .*not what was written"):
        go_on(path, axis=axis)
    assert names(tmp_path) == []
    assert go_on(path, axis=axis) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "weights 2"}, "another fingerprint, 'weights 1' vs 'weights 2'"),
        ({"grid": Grid((7, 8, 10))}, r"another shape, \(7, 8, 9\) vs \(7, 8, 10\)"),
        ({"grid": Grid(GRID.shape)}, "another spacing"),
        ({"dtype": "i2"}, "another dtype"),
        ({"axis": 1}, "another axis, 0 vs 1"),
    ],
)
def test_an_unfinished_file_of_something_else_is_refused(tmp_path, change, said):
    path = tmp_path / "a.nii.gz"
    with pytest.raises(InterruptedError):
        go_on(path, stop=2)
    arguments = {"grid": GRID, "dtype": "u1", "axis": 0, "fingerprint": "weights 1"} | change
    writer = SlabWriter(path, resume=True, **arguments)
    with pytest.raises(DataError, match=rf"\.a\.nii\.gz\.journal: begun with {said}") as caught:
        writer.__enter__()
    assert "remove it to begin anew" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert go_on(path) == 2  # it was left alone
    (tmp_path / ".a.nii.gz.journal").write_text("{}\n")
    with pytest.raises(DataError, match="not a journal of slabs: name: Field required"):
        go_on(path)


def test_a_full_disk_keeps_what_is_finished(tmp_path):
    noise = np.random.default_rng(0).normal(size=(8, 32, 32)).astype("f4")
    path, grid = tmp_path / "a.nii.gz", Grid(noise.shape)

    def write():
        with SlabWriter(path, grid, "f4", resume=True) as writer:
            begun = writer.done
            for start in range(begun, 8):
                writer.write(start, noise[start : start + 1])
        return begun

    with (
        room_for(20_000),
        pytest.raises(DataError, match=r"File too large .*; finished slabs were kept: go on with"),
    ):
        write()
    assert 2 <= write() <= 5
    assert np.array_equal(read_volume(path).array, noise)
    assert names(tmp_path) == [path.name]


def test_a_killed_writer_goes_on(tmp_path):
    path = tmp_path / "a.nii.gz"
    go_on(tmp_path / "whole.nii.gz", thickness=1)
    code = f"""
        import os, signal, sys
        import numpy as np
        from effseg.io import SlabWriter
        from effseg.volume import Grid
        grid = Grid({GRID.shape}, {GRID.spacing}, {GRID.origin})
        array = np.random.default_rng(0).integers(0, 5, grid.shape).astype("u1")
        with SlabWriter(sys.argv[1], grid, "u1", resume=True, fingerprint="weights 1") as writer:
            for start in range(3):
                writer.write(start, array[start : start + 1])
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code), path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    assert go_on(path, thickness=1) == 3
    assert path.read_bytes() == (tmp_path / "whole.nii.gz").read_bytes()
