"""Many cases: order, overlap within the budget, failures that stay their own."""

import gc
import gzip
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from effseg.dataset import Case
from effseg.errors import DataError, EffsegError, MemoryBudgetError, PlanError
from effseg.inference import (
    CaseResult,
    Run,
    case_queue,
    cases,
    find_images,
    load_run,
    predict,
    predict_cases,
    shard_of,
)
from effseg.io import formats, read_grid, read_volume, write_volume
from effseg.io.header import Header
from effseg.volume import Grid, Volume

SECONDS = 30
"""That something else may take; nothing here waits so long if all is well."""
SHAPE = (4, 5, 6)
N = 4 * 5 * 6


@pytest.fixture
def images(tmp_path: Path) -> list[Case]:
    """Four images, each of one value: its place in the list, from 1."""
    for number in range(1, 5):
        volume = Volume(array=np.full(SHAPE, number, np.int16), grid=Grid(SHAPE))
        write_volume(volume, tmp_path / "images" / f"case_{number}.nii.gz")
    return list(find_images([tmp_path / "images"]).values())


class Faked:
    """Predictions, reading and writing without a network, and who did what while what was on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak_bytes = 1000
        self.large_bytes = self.least_bytes = 0
        self.behind: list[str] = []
        self.on: set[str] = set()
        self.together: set[frozenset[str]] = set()
        self.budgets: list[int | None] = []
        self.sources: list[str] = []
        self.inside: Callable[[str], None] = lambda _: None
        self._lock = threading.Lock()
        monkeypatch.setattr(cases, "predict", self.predict)
        for name in ("forecast", "read_image", "write_volume"):
            monkeypatch.setattr(case_queue, name, getattr(self, name))

    def forecast(self, run: Run, grid: Grid, **_) -> SimpleNamespace:
        peak_bytes = self.peak_bytes if grid.shape == SHAPE else self.large_bytes
        return SimpleNamespace(peak_bytes=peak_bytes)

    def predict(self, run, image, *, out, memory, progress, **_) -> Volume:
        least_bytes = max(self.least_bytes, self.forecast(run, image.grid).peak_bytes)
        if memory is not None and memory < least_bytes:
            raise MemoryBudgetError("too small")
        self.sources.append(type(image).__name__)
        self.budgets.append(memory)
        volume = image if isinstance(image, Volume) else read_volume(image.paths[0])
        number = int(volume.array.max())
        with self.doing(f"compute {number}"):
            progress(1, 2)
            labels = Volume(array=np.full(volume.grid.shape, number, np.uint8), grid=volume.grid)
        if out is None:
            self.behind.append(f"case_{number}")
        else:
            write_volume(labels, out)
        return labels

    def read_image(self, case: Case) -> Volume:
        with self.doing(f"read {case.name[-1]}"):
            return read_volume(case.images[0])

    def write_volume(self, volume: Volume, path: Path) -> None:
        with self.doing(f"write {int(volume.array.max())}"):
            write_volume(volume, path)

    def doing(self, what: str) -> "Faked._Doing":
        return Faked._Doing(self, what)

    class _Doing:
        def __init__(self, faked: "Faked", what: str) -> None:
            self.faked, self.what = faked, what

        def __enter__(self) -> None:
            with self.faked._lock:
                self.faked.on.add(self.what)
                self.faked.together.add(frozenset(self.faked.on))
            self.faked.inside(self.what)

        def __exit__(self, *_: object) -> None:
            with self.faked._lock:
                self.faked.on.discard(self.what)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Faked:
    return Faked(monkeypatch)


@pytest.fixture
def run(tiny_run: Path) -> Run:
    return load_run(tiny_run)


def values(out: Path) -> dict[str, int]:
    return {p.name.split(".")[0]: int(read_volume(p).array.max()) for p in sorted(out.iterdir())}


def test_the_next_is_read_and_the_last_is_written_while_one_is_computed(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    begun = {f"{what} {n}": threading.Event() for what in ("read", "write") for n in range(1, 5)}

    def inside(what: str) -> None:
        if what in begun:
            begun[what].set()
        if what == "compute 2":  # ends only once both were seen beside it
            assert begun["read 3"].wait(SECONDS)
            assert begun["write 1"].wait(SECONDS)

    faked.inside = inside
    shown: list[tuple[float, str]] = []
    results = predict_cases(
        run, images, out=tmp_path / "out", progress=lambda *at: shown.append(at)
    )
    names = [f"case_{n}" for n in range(1, 5)]
    assert results == tuple(CaseResult(n, tmp_path / "out" / f"{n}.nii.gz") for n in names)
    assert values(tmp_path / "out") == {name: n for n, name in enumerate(names, start=1)}
    assert faked.sources == ["ImageFiles", "Volume", "Volume", "Volume"]
    # one read ahead, one written behind, never two
    for together in faked.together:
        assert len({what.split()[0] for what in together}) == len(together)
        numbers = {what.split()[0]: int(what.split()[1]) for what in together}
        assert numbers.get("read", 0) <= numbers.get("write", 9) + 2
    assert shown[0] == (0.5, "case_1")
    assert shown[-1] == (4, "case_4")


@pytest.mark.parametrize(
    ("room_bytes", "at_once"),
    [
        (0, set()),
        (N - 1, set()),
        (N, {"write"}),  # a label map of one byte a voxel
        (8 * N - 1, {"write"}),
        (8 * N, {"read", "write"}),  # an image while it is read; it is held with 2 bytes a voxel
        (None, {"read", "write"}),
    ],
)
def test_the_budget_says_what_goes_on_at_once(
    run: Run,
    images: list[Case],
    tmp_path: Path,
    faked: Faked,
    room_bytes: int | None,
    at_once: set[str],
) -> None:
    budget = None if room_bytes is None else faked.peak_bytes + room_bytes
    results = predict_cases(run, images, out=tmp_path / "out", memory=budget)
    assert [result.error for result in results] == [None] * 4
    assert len(values(tmp_path / "out")) == 4
    assert ("Volume" in faked.sources) == ("read" in at_once)
    assert (len(faked.behind) > 0) == ("write" in at_once)
    if not at_once:
        assert {len(together) for together in faked.together} == {1}
    for left in faked.budgets:
        assert left is None if budget is None else faked.peak_bytes <= left <= budget


def test_what_is_held_beside_a_case_is_taken_off_its_budget(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    budget = 10**6
    predict_cases(run, images, out=tmp_path / "out", memory=budget)
    reading, image, labels = 8 * N, 2 * N, N
    assert faked.budgets == [
        budget - reading,
        budget - image - labels - reading,
        budget - image - labels - reading,
        budget - image - labels,
    ]


def test_a_large_case_takes_its_turn_alone(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    budget = faked.large_bytes = 10**6
    large = (2 * SHAPE[0], *SHAPE[1:])
    write_volume(Volume(array=np.full(large, 3, np.int16), grid=Grid(large)), images[2].images[0])
    predict_cases(run, images, out=tmp_path / "out", memory=budget)
    assert faked.sources == ["ImageFiles", "Volume", "ImageFiles", "ImageFiles"]
    assert faked.budgets[2] == budget
    alone = [together for together in faked.together if "compute 3" in together]
    assert alone == [frozenset({"compute 3"})]

    faked.large_bytes += 1
    results = predict_cases(run, images, out=tmp_path / "again", memory=budget)
    kinds = [type(result.error) for result in results]
    assert kinds == [type(None), type(None), MemoryBudgetError, type(None)]
    assert values(tmp_path / "again") == {"case_1": 1, "case_2": 2, "case_4": 4}


def test_a_case_that_fits_alone_only_is_predicted_alone(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    budget = faked.least_bytes = 10**6  # more than was forecast
    results = predict_cases(run, images, out=tmp_path / "out", memory=budget)
    assert [result.error for result in results] == [None] * 4
    assert faked.sources == ["ImageFiles"] * 4
    assert faked.budgets == [budget] * 4
    faked.least_bytes += 1
    results = predict_cases(run, images, out=tmp_path / "out", memory=budget)
    assert all(isinstance(result.error, MemoryBudgetError) for result in results)


def test_failures_stay_their_own_and_free_what_they_held(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    refused = {"read 2": "cut", "compute 3": "not finite", "write 1": "disk full"}
    held: list[weakref.ref[np.ndarray]] = []

    def inside(what: str) -> None:
        array = np.zeros(9)
        if what in refused:
            held.append(weakref.ref(array))
            raise DataError(refused[what])

    faked.inside = inside
    told: list[CaseResult] = []
    results = predict_cases(run, images, out=tmp_path / "out", report=told.append)
    assert [str(result.error) for result in results] == ["disk full", "cut", "not finite", "None"]
    assert sorted(told, key=lambda result: result.name) == list(results)
    assert values(tmp_path / "out") == {"case_4": 4}
    gc.collect()
    assert len(held) == 3
    assert [reference() for reference in held] == [None] * 3
    assert results[2].error is not None
    assert results[2].error.__traceback__ is not None


def test_a_header_that_cannot_be_read_is_one_failure(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    for bad in (images[0], images[3]):
        bad.images[0].write_bytes(b"no image")
    results = predict_cases(run, images, out=tmp_path / "out", memory=10**6)
    assert [isinstance(result.error, DataError) for result in results] == [True, False, False, True]
    assert values(tmp_path / "out") == {"case_2": 2, "case_3": 3}


def test_an_interrupt_finishes_what_is_being_written_and_begins_nothing(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    stop = threading.Event()

    def inside(what: str) -> None:
        if what == "compute 2":
            stop.set()
            raise KeyboardInterrupt
        if what == "write 1":
            assert stop.wait(SECONDS)

    faked.inside = inside
    told: list[CaseResult] = []
    with pytest.raises(KeyboardInterrupt):
        predict_cases(run, images, out=tmp_path / "out", report=told.append)
    assert told == [CaseResult("case_1", tmp_path / "out" / "case_1.nii.gz")]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["case_1.nii.gz"]
    assert not any("compute 3" in together for together in faked.together)


def test_what_is_there_is_kept_or_replaced(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    out = tmp_path / "out"
    write_volume(Volume(array=np.full(SHAPE, 9, np.uint8), grid=Grid(SHAPE)), out / "case_2.nii.gz")
    results = predict_cases(run, images, out=out, skip_existing=True)
    assert [result.kept for result in results] == [False, True, False, False]
    assert values(out) == {"case_1": 1, "case_2": 9, "case_3": 3, "case_4": 4}
    predict_cases(run, images, out=out)
    assert values(out)["case_2"] == 2


def test_what_goes_on_from_files_is_read_and_written_in_turn(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    predict_cases(run, images, out=tmp_path / "a", resume=True)
    assert faked.sources == ["ImageFiles"] * 4
    assert faked.behind == []
    predict_cases(run, images, out=tmp_path / "b", entropy=True)
    assert faked.sources[4:] == ["ImageFiles", "Volume", "Volume", "Volume"]
    assert faked.behind == []


def test_shards_split_the_cases(images: list[Case]) -> None:
    named = [Case(f"c{i:02d}", images[0].images, None) for i in (3, 1, 4, 0, 2)]
    parts = [[case.name for case in shard_of(named, f"{i}/3")] for i in (1, 2, 3)]
    assert parts == [["c00", "c03"], ["c01", "c04"], ["c02"]]
    assert shard_of(named[:1], "2/2") == []
    for wrong in ("0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/4"):
        with pytest.raises(PlanError, match=r"expected i/n with i from 1 to n"):
            shard_of(named, wrong)


def test_what_cannot_work_is_refused_before_anything_is_predicted(
    run: Run, images: list[Case], tmp_path: Path, faked: Faked
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    twin = Case(images[0].name, images[1].images, None)
    for wanted, out, choices, words in (
        (images, blocked, {}, "cannot be written there"),
        (images, blocked / "under", {}, "cannot be written there"),
        ([*images, twin], tmp_path / "out", {}, "two cases are named case_1"),
        (images, tmp_path / "images", {}, "case_1.nii.gz is an image to be labelled"),
        (images, tmp_path / "out", {"memory": "lots"}, "expected a size"),
        (images, tmp_path / "out", {"device": "abacus"}, "device 'abacus'"),
    ):
        with pytest.raises(EffsegError, match=words):
            predict_cases(run, wanted, out=out, **choices)
    assert not faked.together
    assert read_grid(images[0].images[0])[0].shape == SHAPE
    assert predict_cases(run, [], out=tmp_path / "out") == ()


def test_real_cases_are_labelled_as_each_alone(
    run: Run, tiny_dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        name = f"ball_{n}.nii.gz"
        (folder / name).write_bytes((tiny_dataset / "images" / name).read_bytes())
    whole = gzip.decompress((folder / "ball_1.nii.gz").read_bytes())
    (folder / "ball_1.nii.gz").write_bytes(gzip.compress(whole[: len(whole) // 2]))
    found = list(find_images([folder]).values())
    results = predict_cases(run, found, out=tmp_path / "out", memory="1GiB")
    kinds = [type(result.error) for result in results]
    assert kinds == [type(None), DataError, type(None)]
    assert f"{folder / 'ball_1.nii.gz'}" in str(results[1].error)
    for n in (0, 2):
        alone = predict(run, folder / f"ball_{n}.nii.gz")
        written = read_volume(tmp_path / "out" / f"ball_{n}.nii.gz")
        np.testing.assert_array_equal(written.array, alone.array)


def test_headers_are_read_once_and_again_only_with_all_voxels(
    run: Run, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, read = formats.FORMATS[".nii.gz"], []

    def read_header(path: Path) -> Header:
        read.append(path)
        return form.read_header(path)

    found = list(find_images([tiny_dataset / "images"]).values())[:2]
    monkeypatch.setitem(formats.FORMATS, ".nii.gz", replace(form, read_header=read_header))
    results = predict_cases(run, found, out=tmp_path / "out")
    assert all(result.error is None for result in results)
    counts = [read.count(case.images[0]) for case in found]
    assert counts == [1, 2]  # the second is read ahead, whole
