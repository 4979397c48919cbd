"""The streamed components against those of the whole label map, whatever the slabs."""

import errno
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effseg.errors import DataError
from effseg.plans import PostprocessConfig
from effseg.postprocess import (
    Component,
    ComponentStream,
    Removal,
    blocks,
    label_components,
    remove_components,
    stream,
)
from effseg.postprocess.runs import Runs, find_runs, touching

N_SEEDS = 1000
RULES = [
    PostprocessConfig(),
    PostprocessConfig(minimum_mm3=3.0),
    PostprocessConfig(fraction_of_largest=0.5),
    PostprocessConfig(fraction_of_largest=0.3, minimum_mm3=2.0),
]
MAPS = arrays.arrays(
    dtype=st.sampled_from([np.uint8, np.int16, np.dtype(">i2"), np.uint64, np.bool_]),
    shape=arrays.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9),
    elements=st.sampled_from([0, 0, 0, 1]),
    fill=st.just(0),
)


def noise(rng: np.random.Generator) -> np.ndarray:
    shape = rng.integers(1, 13, 3)
    labels = rng.integers(1, rng.integers(2, 5), shape, dtype=np.uint8)
    return labels * (rng.random(shape) < rng.choice([0.02, 0.1, 0.3, 0.6, 0.95]))


def boxes(rng: np.random.Generator) -> np.ndarray:
    """Boxes of a few labels that cut into each other, with empty planes between some."""
    labels = np.zeros(rng.integers(4, 20, 3), np.int16)
    for _ in range(rng.integers(1, 9)):
        low = [rng.integers(0, n) for n in labels.shape]
        box = tuple(slice(a, a + rng.integers(1, 8)) for a in low)
        labels[box] = rng.integers(-1, 4)
    return labels


def spiral(rng: np.random.Generator) -> np.ndarray:
    """One path that crosses every plane many times and closes only at its end."""
    n = int(rng.integers(5, 16))
    labels = np.zeros((n, 3, n), np.uint8)
    z, x, step, turns = 0, 0, (0, 1), 0
    labels[:, 1, :][0, 0] = 1
    while turns < 2:
        ahead = (z + step[0], x + step[1])
        beyond = (z + 2 * step[0], x + 2 * step[1])
        inside = all(0 <= c < n for c in ahead)
        free = inside and not (all(0 <= c < n for c in beyond) and labels[beyond[0], 1, beyond[1]])
        if free and not labels[ahead[0], 1, ahead[1]]:
            z, x = ahead
            labels[z, 1, x] = 1
            turns = 0
        else:
            step = (step[1], -step[0])
            turns += 1
    return labels


def comb(rng: np.random.Generator) -> np.ndarray:
    """Teeth that the back joins in the last plane, or two combs of two labels, interlocked."""
    labels = np.zeros((int(rng.integers(2, 12)), 3, int(rng.integers(3, 16))), np.uint8)
    labels[:, 1, ::2] = 1
    labels[-1, 1] = 1
    if rng.random() < 0.5:
        labels[1:, 1, 1::2] = 2
        labels[-1, 1] = 1
        labels[-1, 2] = rng.integers(0, 3)
    return labels[:: rng.choice([-1, 1])]


def checkerboard(rng: np.random.Generator) -> np.ndarray:
    """Cells that meet at corners only: all one component of each label."""
    z, y, x = np.indices(rng.integers(1, 9, 3))
    cells = (z + y + x) // int(rng.integers(1, 3)) % 2
    return (cells + rng.integers(0, 2)).astype(np.uint16)


def tree(rng: np.random.Generator) -> np.ndarray:
    """Branches that merge in pairs, plane after plane, so that ids come under ids under ids."""
    n = 2 ** int(rng.integers(1, 5))
    labels = np.zeros((2 * n, 1, 2 * n), np.uint8)
    ends = list(range(0, 2 * n, 2))
    for z in range(2 * n):
        labels[z, 0, ends] = 1
        if z % 2 and len(ends) > 1:
            i = int(rng.integers(0, len(ends) - 1))
            labels[z, 0, ends[i] : ends[i + 1] + 1] = 1
            del ends[i + int(rng.integers(0, 2))]
    return labels


def empty(rng: np.random.Generator) -> np.ndarray:
    return np.zeros(rng.integers(0, 5, 3), np.uint8)


Maker = Callable[[np.random.Generator], np.ndarray]
MAKERS: list[Maker] = [noise, boxes, spiral, comb, checkerboard, tree, empty]


def slabs_of(labels: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(labels, sorted(min(cut, len(labels)) for cut in cuts))


def check_against_whole(
    labels: np.ndarray,
    cuts: list[int],
    config: PostprocessConfig,
    probability: np.ndarray | None = None,
) -> None:
    """Everything a stream tells is what the whole label map tells."""
    numbered, components = label_components(labels, 0.7)
    cleaned, removals = remove_components(labels, 0.7, config)
    slabs = slabs_of(labels, cuts)
    n_planes = 0
    with ComponentStream(0.7, config) as streamed:
        for slab in slabs:
            part = None if probability is None else probability[n_planes : n_planes + len(slab)]
            streamed.add(slab, part)
            n_planes += len(slab)
            assert without_means(streamed.components) == tuple(
                component for component in components if component.box[0].stop < n_planes
            )
        assert streamed.finish() == removals
        assert without_means(streamed.components) == components
        assert without_means(streamed.kept) == label_components(cleaned, 0.7)[1]
        back, maps = list(streamed.cleaned()), list(streamed.numbered())
    assert [slab.shape for slab in back] == [slab.shape for slab in slabs]
    assert {slab.dtype for slab in back} == {labels.dtype}
    np.testing.assert_array_equal(np.concatenate(back), cleaned)
    np.testing.assert_array_equal(np.concatenate(maps), numbered)
    if probability is not None:
        for number, component in enumerate(streamed.components, start=1):
            mean = probability[numbered == number].mean(dtype=np.float64)
            assert component.mean_probability == pytest.approx(mean, rel=1e-12)


def without_means(components: tuple[Component, ...]) -> tuple[Component, ...]:
    return tuple(
        Component(c.label, c.n_voxels, c.volume_mm3, c.box, c.centroid_index) for c in components
    )


@pytest.mark.parametrize("make", MAKERS)
def test_the_stream_is_the_whole_on_a_thousand_maps(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(MAKERS.index(make), N_SEEDS, len(MAKERS)):
        rng = np.random.default_rng(seed)
        labels = make(rng).transpose(rng.permutation(3))
        # a slab in one block, in several, or plane by plane
        monkeypatch.setattr(stream, "BLOCK_VOXELS", int(rng.choice([1, 100, 400, 1 << 21])))
        thickness = int(rng.integers(1, 6))
        cuts = list(range(thickness, len(labels), thickness))
        if rng.random() < 0.3:
            cuts = rng.integers(0, len(labels) + 1, rng.integers(0, 4)).tolist()
        probability = rng.random(labels.shape, dtype=np.float32) if rng.random() < 0.3 else None
        check_against_whole(labels, cuts, RULES[int(rng.integers(len(RULES)))], probability)


@settings(max_examples=150, deadline=None)
@given(
    MAPS,
    st.permutations(range(3)),
    st.lists(st.integers(0, 9), max_size=6),
    st.sampled_from(RULES),
)
def test_no_cut_order_or_type_makes_a_difference(
    labels: np.ndarray, order: list[int], cuts: list[int], config: PostprocessConfig
) -> None:
    check_against_whole(labels.transpose(order), cuts, config)


def test_two_become_one_where_a_later_plane_joins_them() -> None:
    labels = np.zeros((4, 1, 7), np.uint8)
    labels[:2, 0, [0, 3, 6]] = 3
    labels[1, 0, 6] = 0  # ends here
    labels[2, 0, 1:3] = 3
    with ComponentStream(2.0, PostprocessConfig(fraction_of_largest=0.5)) as streamed:
        probabilities = iter([0.5, 1.0, 0.75, 0.0])
        told = []
        for plane in labels:
            probability = np.full((1, 1, 7), next(probabilities))
            streamed.add(plane[None], probability)
            told.append([component.n_voxels for component in streamed.components])
        # the speck once the next plane was clear of it; the two arms not before they met and ended
        assert told == [[], [1], [1], [6, 1]]
        assert streamed.finish() == (Removal(3, 1, 2.0, "fraction_of_largest", 6.0),)
        assert streamed.kept == (
            Component(3, 6, 12.0, (slice(0, 3), slice(0, 1), slice(0, 4)), (1.0, 0.0, 1.5), 0.75),
        )
        labels[0, 0, 6] = 0
        np.testing.assert_array_equal(np.concatenate(list(streamed.cleaned())), labels)


def test_touching_runs_by_hand() -> None:
    before = np.zeros((1, 4, 6), np.uint8)
    after = before.copy()
    before[0, 0, 5] = 1  # the next row begins where this one ends, but far away
    before[0, 2, 2] = 1
    after[0, 1, 0] = 1
    after[0, 1, 3:5] = 1  # a corner of the second
    after[0, 3, :2] = 1  # another
    after[0, 2, 4] = 1  # one voxel between
    runs = [Runs(*find_runs(plane), np.zeros(0)) for plane in (before, after)]
    first, second = touching(runs[0], runs[1], width=6)
    # in raster order `before` has 2 runs and `after` 4; (0, 1): rows 0 and 1, columns 5 and 4
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (1, 1), (1, 3)]


def test_runs_come_back_from_their_packing_and_paint_what_they_were() -> None:
    labels = noise(np.random.default_rng(5))
    starts, lengths = find_runs(labels)
    numbers = np.arange(1, len(starts) + 1)
    back = Runs.unpacked(Runs(starts, lengths, numbers).packed())
    np.testing.assert_array_equal(back.starts, starts)
    np.testing.assert_array_equal(back.lengths, lengths)
    np.testing.assert_array_equal(back.numbers, numbers)
    painted = back.painted(labels.reshape(-1)[starts], labels.size)
    np.testing.assert_array_equal(painted.reshape(labels.shape), labels)


def test_a_block_of_many_runs_is_tabulated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "RUNS_AT_ONCE", 7)
    rng = np.random.default_rng(11)
    labels = (rng.random((6, 9, 9)) < 0.3).astype(np.uint8)
    check_against_whole(labels, [2, 4], RULES[3], rng.random(labels.shape))


def test_a_stream_of_nothing() -> None:
    with ComponentStream(1.0, RULES[3]) as streamed:
        assert streamed.finish() == ()
        assert streamed.components == streamed.kept == ()
        assert list(streamed.cleaned()) == list(streamed.numbered()) == []


def test_a_speck_that_grows_is_judged_whole_and_its_label_by_the_largest_of_all_slabs() -> None:
    labels = np.zeros((9, 1, 9), np.uint8)
    labels[0:4, 0, 0] = 1  # 4 voxels, one a slab
    labels[0, 0, 8] = 1  # 1 voxel, as large as what the first slab shows of the other
    labels[8, 0, :8] = 1  # 8 voxels, only seen at the end
    cleaned, removals = remove_components(labels, 1.0, PostprocessConfig(fraction_of_largest=0.5))
    assert [removal.n_components for removal in removals] == [1]
    check_against_whole(labels, list(range(9)), PostprocessConfig(fraction_of_largest=0.5))
    assert cleaned[0, 0, 0] == 1
    assert cleaned[0, 0, 8] == 0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    slab = np.zeros((2, 3, 4), np.uint8)
    with pytest.raises(DataError, match="no such folder"):
        ComponentStream(1.0, PostprocessConfig(), folder=tmp_path / "none")
    with ComponentStream(1.0, PostprocessConfig()) as streamed:
        streamed.add(slab)
        with pytest.raises(DataError, match="expected integers"):
            streamed.add(slab.astype(np.float32))
        with pytest.raises(DataError, match="slab 1 has type int16"):
            streamed.add(slab.astype(np.int16))
        with pytest.raises(DataError, match=r"planes of \(3, 5\) voxels"):
            streamed.add(np.zeros((2, 3, 5), np.uint8))
        with pytest.raises(DataError, match="with every slab or with none"):
            streamed.add(slab, np.zeros(slab.shape))
        streamed.finish()
        with pytest.raises(DataError, match="after the last one"):
            streamed.add(slab)
    with (
        ComponentStream(1.0, PostprocessConfig()) as streamed,
        pytest.raises(DataError, match="expected that of the labels"),
    ):
        streamed.add(slab, np.zeros((1, 3, 4)))


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ComponentStream(1.0, PostprocessConfig()) as streamed:
        monkeypatch.setattr(streamed._file, "write", full)
        with pytest.raises(DataError, match="No space left on device"):
            streamed.add(np.ones((1, 2, 2), np.uint8))


def lesions(n_slabs: int) -> Iterator[np.ndarray]:
    """An organ that never ends and a speck in every slab but the even ones, which are clear."""
    for i in range(n_slabs):
        slab = np.zeros((4, 128, 128), np.uint8)
        slab[:, 40:80, 30:90] = 1
        if i % 2:
            slab[1:3, 5, 5:7] = 2
        yield slab


def peak_bytes(n_slabs: int, folder: Path) -> int:
    config = PostprocessConfig(minimum_mm3=5.0)
    tracemalloc.start()
    with ComponentStream(1.0, config, folder=folder, memory_bytes=1) as streamed:
        for slab in lesions(n_slabs):
            streamed.add(slab)
        assert streamed.finish()[0].n_components == n_slabs // 2
        assert sum(int((slab == 2).sum()) for slab in streamed.cleaned()) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    peak_bytes(4, tmp_path)  # what a first call imports and caches
    short, long = peak_bytes(20, tmp_path), peak_bytes(200, tmp_path)
    # 180 slabs more are 11 MiB of labels and 90 components: their rows, and where their runs lie.
    assert long - short < 180 * 2**10
    assert short < 1.5 * 2**20  # 24 times a slab's 64 KiB


def test_memory_does_not_grow_with_the_slab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_VOXELS", 8 * 128 * 128)
    labels = np.zeros((256, 128, 128), np.uint8)  # 4 MiB
    labels[:, 30:90, 30:90] = 1
    labels[::2, :10, ::2] = 2
    config = PostprocessConfig(minimum_mm3=5.0)
    peaks = []
    for thickness in (256, 8):
        tracemalloc.start()
        with ComponentStream(1.0, config, folder=tmp_path, memory_bytes=1) as streamed:
            for start in range(0, 256, thickness):
                streamed.add(labels[start : start + thickness])
            assert len(streamed.finish()) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert abs(peaks[0] - peaks[1]) < 2**17  # as many bytes as a block has voxels


def test_what_is_kept_of_the_voxels() -> None:
    labels = np.zeros((16, 256, 256), np.uint8)
    z, y, x = np.ogrid[:16, :256, :256]
    for centre, radius in (((8, 60, 60), 6), ((3, 200, 30), 4), ((8, 130, 180), 60)):
        labels[(z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < radius**2] = 1
    with ComponentStream(1.0, PostprocessConfig()) as streamed:
        streamed.add(labels[:, ::-1])
        kept_bytes = streamed.stored_bytes
        streamed.add(np.zeros_like(labels))
        assert streamed.stored_bytes == kept_bytes  # background costs nothing
    ids = label_components(labels, 1.0)[0]
    assert 0 < 10 * kept_bytes < len(zlib.compress(ids.astype(np.uint32), 1))
