"""What loaders take of the host's memory: told beforehand, and kept to."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from effseg.dataset import read_dataset
from effseg.planner import trace_plan
from effseg.planner.host import (
    MOST_AHEAD,
    WORKER_BYTES,
    Queue,
    augmenting_bytes,
    batch_bytes,
    case_bytes,
    loader_bytes,
    queue_of,
    validation_bytes,
)
from effseg.plans import AugmentConfig, Label, Plan
from effseg.preprocess import Frame
from effseg.training import data
from effseg.training.data import PatchData
from effseg.volume import Grid

MIB = 2**20
OFF = AugmentConfig(probability=0)
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and fork are Linux's")


def test_a_queue_has_no_more_batches_than_its_bytes() -> None:
    assert queue_of(10, workers=2, queue_bytes=1000) == Queue(workers=2, ahead=MOST_AHEAD)
    assert queue_of(10, workers=3, queue_bytes=59) == Queue(workers=3, ahead=1)
    assert queue_of(10, workers=8, queue_bytes=39) == Queue(workers=3, ahead=1)
    assert queue_of(10, workers=8, queue_bytes=9) == Queue(workers=0, ahead=0)
    assert queue_of(10, workers=0, queue_bytes=1000) == Queue(workers=0, ahead=0)


def test_without_augmentation_patches_are_read_copied_and_put_side_by_side() -> None:
    one = batch_bytes((8, 8, 8), 2, 1, label_itemsize=1)
    assert one == 512 * 9
    taken = [
        loader_bytes((8, 8, 8), 2, n, workers=0, queue_bytes=0, label_itemsize=1, augment=OFF)
        for n in (1, 2, 4)
    ]
    assert taken == [2 * one, 4 * one, 8 * one]


def test_workers_add_their_own_and_what_waits() -> None:
    facts = {"label_itemsize": 1, "augment": AugmentConfig()}
    patch = (32, 32, 32)
    none = loader_bytes(patch, 1, 2, workers=0, queue_bytes=2**30, **facts)
    batch = batch_bytes(patch, 1, 2, label_itemsize=1)
    two = loader_bytes(patch, 1, 2, workers=2, queue_bytes=2**30, **facts)
    assert two == 2 * (WORKER_BYTES + none + MOST_AHEAD * batch)
    # a queue of one batch has one worker, and a queue of none has none
    one = loader_bytes(patch, 1, 2, workers=2, queue_bytes=batch, **facts)
    assert one == WORKER_BYTES + none + batch
    assert loader_bytes(patch, 1, 2, workers=2, queue_bytes=batch - 1, **facts) == none


def test_what_cannot_happen_is_not_counted() -> None:
    def per_voxel(**chances: float) -> int:
        every = dict.fromkeys(
            ("flip", "affine", "gamma", "brightness", "contrast", "noise", "blur"), 0.0
        )
        config = AugmentConfig(**(every | {"low_resolution": 0.0} | chances))
        return augmenting_bytes(1, label_itemsize=1, augment=config)

    assert per_voxel() == 2 * 5
    assert per_voxel(flip=0.5) == 3 * 5
    assert per_voxel(gamma=0.1) < per_voxel(gamma=0.1, noise=0.1) < per_voxel(affine=0.1)
    assert per_voxel(affine=0.1, flip=0.5) == per_voxel(affine=0.1) + 5
    assert per_voxel(affine=1.0, probability=0.0) == 2 * 5


AUGMENTING = """
import json
import numpy as np
from effseg.augment import build_augmentation
from effseg.memory import PeakResident, mapped_blocks
from effseg.dataset import read_dataset
from effseg.planner import trace_plan
from effseg.planner.host import augmenting_bytes
from effseg.plans import AugmentConfig

CHANGES = ("flip", "affine", "gamma", "noise", "blur", "low_resolution")
ONE_MM, rng = (1.0, 1.0, 1.0), np.random.default_rng(0)

def make(shape):
    return rng.random(shape, dtype=np.float32), np.ones(shape[1:], np.uint8)

with mapped_blocks():
    for n, n_channels in ((96, 1), (64, 4)):
        for chosen in (CHANGES, ("affine",), ("gamma", "blur")):
            chances = dict.fromkeys((*CHANGES, "brightness", "contrast"), 0.0)
            config = AugmentConfig(**(chances | dict.fromkeys(chosen, 1.0)))
            augment = build_augmentation(config, spacing=ONE_MM)
            augment(*make((n_channels, 24, 24, 24)), seed=0)
            resident = PeakResident().start()
            augment(*make((n_channels, n, n, n)), seed=1)
            predicted = augmenting_bytes(n_channels, label_itemsize=1, augment=config) * n**3
            print(json.dumps([n, n_channels, chosen, resident.stop(), predicted]))
"""


@linux
def test_resident_memory_of_augmentation_is_what_was_said() -> None:
    lines = _run(AUGMENTING)
    assert len(lines) == 6
    for n, n_channels, chosen, measured, predicted in map(json.loads, lines):
        # a page or a heap's remainder beside it
        assert measured <= predicted + 2 * MIB, (n, n_channels, chosen)
        assert predicted <= 1.1 * measured + 4 * MIB, (n, n_channels, chosen)


LOADING = """
import json, sys
from pathlib import Path
import numpy as np
from effseg.memory import PeakResident, mapped_blocks
from effseg.dataset import read_dataset
from effseg.planner import trace_plan
from effseg.planner.host import loader_bytes
from effseg.plans import Plan
from effseg.training import data
from effseg.training.data import PatchData
from effseg.training.cache import CachedCase
from effseg.training.places import Places
from effseg.training.planes import PlaneFile

folder, patch, n = Path(sys.argv[1]), (64, 64, 64), 160
plan = Plan.load(sys.argv[2])
training = plan.training.model_copy(update={"steps_per_epoch": 6})
plan = plan.model_copy(update={"training": training, "patch_size": patch, "batch_size": 2})
shape = (n, 1, n, n)
np.random.default_rng(0).random(shape, dtype=np.float32).tofile(folder / "image")
np.zeros(shape, np.uint8).tofile(folder / "label")
data = PatchData(plan, [], [], folder / "cache")
image = PlaneFile(folder / "image", shape, np.dtype(np.float32))
label = PlaneFile(folder / "label", shape, np.dtype(np.uint8))
places, fill = Places({}, {}), np.zeros(1, np.float32)
data.train_cases = [CachedCase("case", (n, n, n), image, 0, False, fill, label, places)]
with mapped_blocks():
    for seed in range(20):
        small = np.ones((1, 24, 24, 24), np.float32), np.zeros((24, 24, 24), np.uint8)
        data.augmentation(*small, seed=seed)
    resident = PeakResident().start()
    batches, n_batches = iter(data.train_dataloader()), 0
    while next(batches, None) is not None:  # a batch goes before the next is made
        n_batches += 1
    measured = resident.stop()
said = loader_bytes(
    patch, 1, 2, workers=0, queue_bytes=0, label_itemsize=1, augment=training.augment
)
print(json.dumps([n_batches, measured, said]))
"""


@linux
@pytest.mark.slow
def test_resident_memory_of_drawing_patches_is_what_was_said(
    tmp_path: Path, tiny_plan: Plan
) -> None:
    plan = tiny_plan.save(tmp_path / "plan.json")
    (line,) = _run(LOADING, tmp_path, plan)
    n_batches, measured, predicted = json.loads(line)
    assert n_batches == 6
    assert measured <= predicted + 2 * MIB
    assert predicted <= 1.15 * measured + 2 * MIB


def _waiting(batches: Iterator[object]) -> int:
    """Bytes of the blocks of shared memory that a loader's processes hold: what waits."""
    held = {}
    pids = ["self", *(str(worker.pid) for worker in batches._workers)]
    for link in (link for pid in pids for link in Path(f"/proc/{pid}/fd").glob("*")):
        with suppress(OSError):  # closed meanwhile
            if "/torch_" in str(link.readlink()):
                held[link.stat().st_ino] = link.stat().st_size
    return sum(held.values())


@linux
@pytest.mark.parametrize(("workers", "room", "used"), [(2, 5, 2), (2, 2, 2), (4, 1, 1)])
def test_no_more_batches_wait_than_the_queue_has_room_for(
    tmp_path: Path,
    tiny_plan: Plan,
    tiny_dataset: Path,
    caplog: pytest.LogCaptureFixture,
    workers: int,
    room: int,
    used: int,
) -> None:
    batch = batch_bytes((16, 16, 16), 1, 2, label_itemsize=1)
    training = tiny_plan.training.model_copy(
        update={"workers": workers, "queue_bytes": room * batch, "steps_per_epoch": 8}
    )
    plan = tiny_plan.model_copy(update={"training": training})
    loaders = PatchData(plan, read_dataset(tiny_dataset).cases[:1], [], tmp_path)
    loader = loaders.train_dataloader()
    assert loader.num_workers == used
    assert ("may wait" in caplog.text) == (used < workers)
    batches, most = iter(loader), 0
    assert next(batches)[0].shape == (2, 1, 16, 16, 16)
    for _ in range(20):  # a long step: the queue fills up
        time.sleep(0.05)
        most = max(most, _waiting(batches))
    ahead = min(room, MOST_AHEAD * used)
    ahead -= ahead % used
    assert most >= 0.9 * ahead * batch
    assert most <= room * batch + 2**16  # shared memory comes in pages
    assert sum(1 for _ in batches) == 7


def test_workers_keep_to_the_memory_that_processes_may_share(
    tmp_path: Path, tiny_plan: Plan, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_bytes((16, 16, 16), 1, 2, label_itemsize=1)
    training = tiny_plan.training.model_copy(update={"workers": 2})
    plan = tiny_plan.model_copy(update={"training": training})
    loaders = PatchData(plan, read_dataset(tiny_dataset).cases[:1], [], tmp_path)
    for free, workers in ((None, 2), (4 * batch, 2), (2 * batch, 1), (batch, 0)):
        monkeypatch.setattr(data, "shared_bytes", lambda free=free: free)
        loader = loaders.train_dataloader()
        assert loader.num_workers == workers


def test_a_hundred_classes_make_validation_what_counts(tiny_plan: Plan) -> None:
    """It is scored a patch at a time, so that it stays below a step of two."""

    def of(n_classes: int) -> tuple[int, int]:
        labels = tuple(Label(value=i, name=str(i)) for i in range(n_classes))
        network = tiny_plan.network.model_copy(
            update={"out_channels": n_classes, "memory": "shared"}
        )
        update = {"labels": labels, "network": network, "patch_size": (48, 48, 48)}
        plan = tiny_plan.model_copy(update=update)
        step = trace_plan(plan)
        assert step.device_bytes is not None
        return validation_bytes(plan), step.device_bytes + step.parameter_bytes

    few, few_in_steps = of(3)
    many, many_in_steps = of(118)
    assert few < few_in_steps
    assert many >= 2 * 4 * 118 * 48**3  # the logits, and once more
    assert many_in_steps - few_in_steps < (many - few) / 4  # no logits there


def test_case_bytes_grow_with_what_is_held(tiny_plan: Plan) -> None:
    native = Grid(shape=(300, 512, 512), spacing=(1.0, 1.0, 1.0))
    plan = tiny_plan.model_copy(update={"spacing": native.spacing})
    frame = Frame.of(native, plan, axis=0)

    def taken(dtype: object, frame: Frame = frame) -> int:
        return case_bytes(frame, plan, image_itemsize=2, label_dtype=np.dtype(dtype))

    n = native.n_voxels
    assert n < taken(np.uint8) < taken(np.int16) == 3 * n < taken(np.float64) == 33 * n
    finer = plan.model_copy(update={"spacing": (0.5, 1.0, 1.0)})
    assert taken(np.uint8, Frame.of(native, finer, axis=0)) >= 2 * n


def test_a_case_that_breaks_the_budget_is_named_with_numbers(
    tmp_path: Path, tiny_plan: Plan, tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = read_dataset(tiny_dataset).cases[:1]
    memory = tiny_plan.memory.model_copy(update={"budget_bytes": 10 * MIB})
    PatchData(tiny_plan.model_copy(update={"memory": memory}), cases, [], tmp_path / "a")
    assert "preparing it takes up to" in caplog.text
    assert "more than the budget of 10 MiB" in caplog.text
    caplog.clear()
    PatchData(tiny_plan, cases, [], tmp_path / "b")
    assert not caplog.text


PREPARING = """
import json, sys
from pathlib import Path
import numpy as np
from effseg.dataset import Case
from effseg.io import SlabWriter
from effseg.memory import PeakResident, mapped_blocks
from effseg.plans import Plan
from effseg.training.cache import cache_case, caching_bytes
from effseg.training import data
from effseg.training.data import PatchData
from effseg.volume import Grid

folder, plan = Path(sys.argv[1]), Plan.load(sys.argv[2])
plan = plan.model_copy(update={"spacing": (1.0, 1.0, 1.0)})

def write(name, n_planes):
    grid = Grid((n_planes, 256, 256), (1.5, 0.9, 0.9))
    image, label = (folder / f"{name}.{kind}.nii" for kind in ("image", "label"))
    with SlabWriter(image, grid, np.int16) as images, SlabWriter(label, grid, np.int16) as labels:
        for start in range(0, n_planes, 8):
            noise = np.random.default_rng(start).normal(size=(8, 256, 256))
            images.write(start, (100 * noise).astype(np.int16))
            block = np.zeros((8, 256, 256), np.int16)
            block[:, 50:150, 50:150] = 1 + start % 2
            labels.write(start, block)
    return Case(name=name, images=(image,), label=label)

small, large = write("small", 16), write("large", 480)
with mapped_blocks():
    cache_case(small, plan, folder)
    resident = PeakResident().start()
    cache_case(large, plan, folder)
    print(json.dumps([resident.stop(), caching_bytes(large, plan)]))
"""


@linux
@pytest.mark.slow
def test_resident_memory_of_preparing_a_case_is_what_was_said(
    tmp_path: Path, tiny_plan: Plan
) -> None:
    plan = tiny_plan.save(tmp_path / "plan.json")
    (line,) = _run(PREPARING, tmp_path, plan)
    measured, predicted = json.loads(line)
    assert measured <= predicted + 2 * MIB
    assert predicted <= 1.5 * measured  # what components take depends on how many there are


def _run(code: str, *args: object) -> list[str]:
    """In a process of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()
