"""Prepared cases on disk: what whole preparation gives, made slab by slab."""

from pathlib import Path

import numpy as np
import pytest

from effseg.dataset import Case, read_case
from effseg.errors import DataError, GeometryError
from effseg.io import write_volume
from effseg.plans import Channel, Label, Normalisation, Plan
from effseg.postprocess import label_components
from effseg.preprocess import prepare_image, prepare_label
from effseg.training import cache
from effseg.training.cache import CachedCase, cache_case
from effseg.training.places import VOXELS_PER_COMPONENT, VOXELS_PER_LABEL
from effseg.volume import AxisOrder, Grid, Volume

CT = Normalisation(kind="ct", low=-150, high=120, mean=10, std=50)
ZSCORE = Normalisation(kind="zscore")
GRID = Grid(shape=(19, 12, 9), spacing=(1.0, 0.9, 1.2), origin=(4, -2, 9))
IGNORE = 9


def plan_of(plan: Plan, *kinds: Normalisation, spacing=(1.4, 0.8, 1.1)) -> Plan:
    channels = tuple(Channel(name=str(i), normalisation=kind) for i, kind in enumerate(kinds))
    network = plan.network.model_copy(update={"in_channels": len(kinds)})
    return plan.model_copy(
        update={
            "channels": channels,
            "spacing": spacing,
            "network": network,
            "labels": tuple(Label(value=value, name=str(value)) for value in (0, 3, 7)),
            "ignore_label": IGNORE,
        }
    )


def channels(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = []
    for channel in range(n):
        array = rng.integers(1, 200, GRID.shape).astype(np.int16)
        array[:4] = -3 * channel
        arrays.append(array)
    return arrays


def written(folder: Path, labels: np.ndarray, order: AxisOrder, *, n_channels: int = 1) -> Case:
    """A case of noise in files of one channel each, stored in some order."""
    paths = []
    for index, array in enumerate(channels(n_channels)):
        paths.append(folder / f"case_{index:04d}.nii.gz")
        write_volume(Volume(array=array, grid=GRID).reordered(order), paths[-1])
    label = folder / "label.nii.gz"
    write_volume(Volume(array=labels, grid=GRID).reordered(order), label)
    return Case(name="case", images=tuple(paths), label=label)


def blocks() -> np.ndarray:
    labels = np.zeros(GRID.shape, dtype=np.uint8)
    labels[2:15, 1:9, 2:8] = 7
    labels[4:6, 2:4, 3:5] = labels[10:12, 5:8, 3:7] = 3
    labels[17:, 10:, :] = IGNORE
    return labels


def whole_of(cached: CachedCase) -> tuple[np.ndarray, np.ndarray]:
    z, y, x = (slice(0, n) for n in cached.shape)
    return cached.read((z, y, x))


AS_IT_IS = AxisOrder(order=(0, 1, 2), flips=(False, False, False))


@pytest.mark.parametrize(
    "order",
    [
        AS_IT_IS,
        AxisOrder(order=(0, 1, 2), flips=(True, False, True)),
        AxisOrder(order=(1, 2, 0), flips=(True, False, False)),
        AxisOrder(order=(2, 1, 0), flips=(True, True, False)),
    ],
)
@pytest.mark.parametrize("spacing", [(1.4, 0.8, 1.1), GRID.spacing])
@pytest.mark.parametrize("whole", [True, False])
def test_a_cached_case_is_what_whole_preparation_gives(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order, spacing, whole
) -> None:
    monkeypatch.setattr(cache, "SLAB_VOXELS", 300)  # a few planes
    monkeypatch.setattr(cache, "WHOLE_BYTES", 2**20 if whole else 0)
    plan = plan_of(tiny_plan, CT, ZSCORE, spacing=spacing)
    case = written(tmp_path, blocks(), order, n_channels=2)
    cached = cache_case(case, plan, tmp_path)
    volume, reference = read_case(case)
    expected = prepare_image(volume, plan).image
    image, label = whole_of(cached)
    assert image.shape == (2, *cached.shape)
    np.testing.assert_allclose(image, expected, atol=1e-4)
    np.testing.assert_allclose(cached.fill, expected.min(axis=(1, 2, 3)), atol=1e-4)
    values = np.array([0, 3, 7, IGNORE])
    np.testing.assert_array_equal(values[label], prepare_label(reference, plan).array)
    box = (slice(3, 9), slice(0, 5), slice(4, 7))
    inner, inner_label = cached.read(box)
    np.testing.assert_array_equal(inner, image[(slice(None), *box)])
    np.testing.assert_array_equal(inner_label, label[box])


def test_places_lie_on_every_component_of_every_class(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SLAB_VOXELS", 300)
    plan = plan_of(tiny_plan, CT, spacing=GRID.spacing)
    cached = cache_case(written(tmp_path, blocks(), AS_IT_IS), plan, tmp_path)
    _, label = whole_of(cached)
    numbers, found = label_components(np.where(label < 3, label, 0), 1.0)
    places = cached.places
    assert places.components.keys() == places.voxels.keys() == {1, 2}
    assert [len(places.components[index]) for index in (1, 2)] == [2, 1]
    for index, voxels in places.voxels.items():
        assert len(voxels) == min(VOXELS_PER_LABEL, (label == index).sum())
        assert (label[tuple(voxels.T)] == index).all()
        ours = [i for i, component in enumerate(found, start=1) if component.label == index]
        for number, part in zip(ours, places.components[index], strict=True):
            size = (numbers == number).sum()
            assert len(part) == len(np.unique(part, axis=0)) == min(VOXELS_PER_COMPONENT, size)
            assert (numbers[tuple(part.T)] == number).all()


def test_many_voxels_are_sampled_evenly_and_the_same_ones_each_time(
    tiny_plan: Plan, tmp_path: Path
) -> None:
    grid = Grid(shape=(40, 40, 40))
    labels = np.full(grid.shape, 3, dtype=np.uint8)
    paths = tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"
    write_volume(Volume(array=labels.astype(np.int16), grid=grid), paths[0])
    write_volume(Volume(array=labels, grid=grid), paths[1])
    case = Case(name="one", images=(paths[0],), label=paths[1])
    plan = plan_of(tiny_plan, CT, spacing=grid.spacing)
    first, again = (cache_case(case, plan, tmp_path).places for _ in range(2))
    voxels = first.voxels[1]
    np.testing.assert_array_equal(voxels, again.voxels[1])
    assert len(voxels) == len(np.unique(voxels, axis=0)) == VOXELS_PER_LABEL
    octants = np.bincount((voxels >= 20) @ (4, 2, 1), minlength=8)
    assert (abs(octants - VOXELS_PER_LABEL / 8) < 5 * 21).all()  # deviations of a binomial
    (component,) = first.components[1]
    assert len(component) == VOXELS_PER_COMPONENT
    assert (np.ptp(component, axis=0) > 25).all()


def test_a_case_without_foreground_has_no_places(tiny_plan: Plan, tmp_path: Path) -> None:
    labels = np.full(GRID.shape, IGNORE, dtype=np.uint8)
    labels[0] = 0
    cached = cache_case(
        written(tmp_path, labels, AS_IT_IS), plan_of(tiny_plan, CT, spacing=GRID.spacing), tmp_path
    )
    assert (cached.places.components, cached.places.voxels) == ({}, {})


def test_all_values_that_the_plan_does_not_know_are_named(tiny_plan: Plan, tmp_path: Path) -> None:
    labels = blocks().astype(np.uint32)
    labels[0, 0, 0], labels[-1, -1, -1] = 5, 70000
    with pytest.raises(DataError, match=r"values \[5, 70000\]; the plan knows \[0, 3, 7, 9\]"):
        cache_case(
            written(tmp_path, labels, AS_IT_IS),
            plan_of(tiny_plan, CT, spacing=GRID.spacing),
            tmp_path,
        )


def test_image_and_label_on_two_grids_are_refused(tiny_plan: Plan, tmp_path: Path) -> None:
    case = written(tmp_path, blocks(), AS_IT_IS)
    assert case.label is not None
    elsewhere = Grid(shape=GRID.shape, spacing=(1.0, 0.9, 1.3), origin=GRID.origin)
    write_volume(Volume(array=blocks(), grid=elsewhere), case.label)
    with pytest.raises(GeometryError, match="image and label differ in spacing"):
        cache_case(case, plan_of(tiny_plan, CT), tmp_path)


def test_a_prepared_case_that_was_cut_is_refused(tiny_plan: Plan, tmp_path: Path) -> None:
    plan = plan_of(tiny_plan, CT, spacing=GRID.spacing)
    cached = cache_case(written(tmp_path, blocks(), AS_IT_IS), plan, tmp_path)
    with cached.image.path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="is cut"):
        whole_of(cached)
