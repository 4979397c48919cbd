"""What is held out and what is mixed in: stratified folds, external data, the nine-way split."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_dataset
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from effseg.cli import app
from effseg.dataset import (
    Case,
    Dataset,
    NineWaySplit,
    check_leaks,
    folds,
    read_dataset,
    share_annotated,
    split_nine_ways,
)
from effseg.errors import DataError, PlanError
from effseg.plans import ExternalData, Plan
from effseg.record import RECORD, RunRecord
from effseg.training import parse_external, train
from effseg.training.data import PatchData
from effseg.training.external import open_external, with_external
from effseg.training.patches import TrainingPatches


def cases(n: int, *, first: str = "a", patients: list[str] | None = None) -> tuple[Case, ...]:
    return tuple(
        Case(
            name=f"{first}{number}",
            images=(Path(f"{first}{number}.nii"),),
            label=None,
            patient=None if patients is None else patients[number],
        )
        for number in range(n)
    )


def dataset_of(found: tuple[Case, ...]) -> Dataset:
    return Dataset(name="d", root=Path("d"), layout="csv", cases=found)


@given(loads=st.permutations(range(20)), seed=st.integers(0, 50))
def test_stratified_folds_each_hold_one_case_of_each_stratum(loads: list[int], seed: int) -> None:
    dataset = dataset_of(cases(20))
    by_name = {case.name: float(load) for case, load in zip(dataset.cases, loads, strict=True)}
    for fold in folds(dataset, n_folds=5, seed=seed, loads=by_name):
        strata = sorted(int(by_name[name]) // 5 for name in fold.validation)
        assert strata == [0, 1, 2, 3]


def test_stratified_folds_keep_patients_together_and_vary_with_the_seed() -> None:
    found = cases(20, patients=[f"p{i // 2}" for i in range(20)])
    dataset, loads = dataset_of(found), {case.name: float(i) for i, case in enumerate(found)}
    cut = folds(dataset, loads=loads)
    for fold in cut:
        assert sorted(int(name[1:]) // 2 for name in fold.validation)[::2] == sorted(
            {int(name[1:]) // 2 for name in fold.validation}
        )
        # of ten patients by load, one of the lighter and one of the heavier five
        assert sorted(int(name[1:]) >= 10 for name in fold.validation) == [False, False, True, True]
    assert folds(dataset, loads=loads, seed=1) != cut


def test_a_case_without_a_load_is_named() -> None:
    with pytest.raises(DataError, match="1 cases have no load to stratify by: a2; plan this data"):
        folds(dataset_of(cases(3)), n_folds=2, loads={"a0": 1.0, "a1": 2.0})


def test_a_plan_that_asks_for_it_stratifies_by_the_fingerprint(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    known = tiny_plan.fingerprint.foreground_mm3
    assert set(known) == {f"ball_{i}" for i in range(6)}
    assert all(700 < mm3 < 1100 for mm3 in known.values())  # balls of radius 6 mm
    data = tiny_plan.data.model_copy(update={"stratified": True})
    facts = tiny_plan.fingerprint.model_copy(update={"foreground_mm3": {"ball_0": 1.0}})
    plan = tiny_plan.model_copy(update={"data": data, "fingerprint": facts})
    with pytest.raises(DataError, match="5 cases have no load"):
        train(plan, tiny_dataset, out=tmp_path / "run", epochs=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two more balls under names of their own."""
    folder = make_dataset(tmp_path_factory.mktemp("other") / "balls", n_cases=2)
    for path in folder.glob("*/*"):
        path.rename(path.with_name(path.name.replace("ball", "other")))
    return folder


def mixed(plan: Plan, dataset: Path, share: float = 0.25) -> Plan:
    return with_external(plan, [ExternalData(dataset=str(dataset), share=share)])


def test_external_cases_are_drawn_by_their_share(
    tiny_plan: Plan, tiny_dataset: Path, other: Path, tmp_path: Path
) -> None:
    plan = mixed(tiny_plan, other)
    own = read_dataset(tiny_dataset).cases
    external = open_external(plan, own[1:2])
    data = PatchData(plan, own[:1], own[1:2], tmp_path, external=external)
    ((share, theirs),) = data.external
    assert share == 0.25
    assert [case.name for case in theirs] == ["other_0", "other_1"]
    patches = data.train_dataloader().dataset
    assert isinstance(patches, TrainingPatches)
    drawn = [patches._source(np.random.default_rng(i)) is theirs for i in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.03)
    assert [case.name for case in data.validation_cases] == ["ball_1"]
    without = TrainingPatches(
        data.train_cases,
        plan.patch_size,
        n_patches=4,
        config=plan.training,
        epoch=0,
        augmentation=data.augmentation,
    )
    assert without._source(np.random.default_rng(0)) is data.train_cases


def test_training_with_external_data_says_so_in_its_plan(
    tiny_plan: Plan, tiny_dataset: Path, other: Path, tmp_path: Path
) -> None:
    run = train(
        tiny_plan,
        tiny_dataset,
        out=tmp_path / "run",
        epochs=1,
        external=[parse_external(f"{other}:0.5")],
    )
    assert Plan.load(run / "plan.json").data.external[0].share == 0.5
    assert "other" not in json.dumps(json.loads((run / "run.json").read_text())["validation"])


def test_training_holds_out_what_a_split_says(tiny_plan: Plan, tmp_path: Path) -> None:
    dataset = read_dataset(make_dataset(tmp_path / "d", n_cases=9))
    split = split_nine_ways(*share_annotated(dataset, 0.6), dataset="d")
    run = train(tiny_plan, dataset, out=tmp_path / "run", epochs=1, split=split)
    record = RunRecord.load(run / RECORD)
    assert (record.train, record.validation) == (
        split.segmenter.train,
        split.segmenter.validation,
    )
    assert record.fold is None
    with pytest.raises(PlanError, match="fold 1 and a split"):
        train(tiny_plan, dataset, out=tmp_path / "b", epochs=1, split=split, fold=1)
    fewer = replace(dataset, cases=dataset.cases[:2])
    with pytest.raises(DataError, match="not among the 2 labelled cases given"):
        train(tiny_plan, fewer, out=tmp_path / "b", epochs=1, split=split)


def test_what_is_held_out_does_not_come_back_as_external(
    tiny_plan: Plan, tiny_dataset: Path, other: Path
) -> None:
    held_out = read_dataset(tiny_dataset).cases[:1]
    with pytest.raises(DataError, match="ball_0 held out for validation"):
        open_external(mixed(tiny_plan, tiny_dataset), held_out)
    same_file = [replace(case, name="new") for case in read_dataset(other).cases[:1]]
    with pytest.raises(DataError, match="other_0 held out for validation"):
        open_external(mixed(tiny_plan, other), same_file)
    assert len(open_external(mixed(tiny_plan, other), held_out)[0]) == 2


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"labels": {"background": 0, "liver": 1}}, r"labels \{1: 'liver'\}; the plan has"),
        ({"channel_names": {"0": "CT", "1": "PET"}}, r"channels \('CT', 'PET'\); the plan has"),
    ],
)
def test_external_data_of_another_kind_are_refused(
    tiny_plan: Plan, tmp_path: Path, description, words
) -> None:
    folder = make_dataset(tmp_path / "d", n_cases=1)
    content = {"labels": {"background": 0, "label_1": 1, "label_2": 2}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content | description))
    with pytest.raises(DataError, match=words):
        open_external(mixed(tiny_plan, folder), ())


@pytest.mark.parametrize("text", ["data", "data:", "data:1.5", "data:0", ":0.5", "data:nan"])
def test_shares_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="expected DATASET:SHARE"):
        parse_external(text)


def test_external_shares_leave_the_data_set_some(tiny_plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"external data take 1.2 of the patches"):
        mixed(mixed(tiny_plan, Path("a"), 0.6), Path("b"), 0.6)


def sets_of(split: NineWaySplit) -> tuple[set[str], ...]:
    three = (split.segmenter, split.discriminator.unannotated, split.discriminator.annotated)
    return tuple(set(part) for sets in three for part in (sets.train, sets.validation, sets.test))


@given(
    sizes=st.lists(st.integers(1, 3), min_size=10, max_size=30),
    n_apart=st.integers(3, 30),
    seed=st.integers(0, 1000),
)
def test_nine_sets_share_no_patient_where_they_must_not(
    sizes: list[int], n_apart: int, seed: int
) -> None:
    patients = [f"p{i}" for i, n in enumerate(sizes) for _ in range(n)]
    ours = cases(len(patients), patients=patients)
    theirs = cases(n_apart, first="u")
    split = split_nine_ways(ours, theirs, dataset="d", seed=seed)
    train, validation, test, *others = sets_of(split)
    apart, known = others[:3], others[3:]
    assert train | validation | test == {case.name for case in ours}
    assert set().union(*apart) == {case.name for case in theirs}
    assert set().union(*known) == train
    patient = {case.name: case.patient for case in ours}
    for family in ((train, validation, test), known):
        whose = [{patient[name] for name in part} for part in family]
        assert sum(map(len, whose)) == len(set().union(*whose))
        assert all(family)
    assert split_nine_ways(ours[::-1], theirs, dataset="d", seed=seed).segmenter.train == tuple(
        name for name in (case.name for case in ours[::-1]) if name in train
    )


def test_proportions_are_kept_and_seeds_differ() -> None:
    ours, theirs = cases(50), cases(20, first="u")
    split = split_nine_ways(ours, theirs, dataset="d")
    assert [len(part) for part in sets_of(split)] == [30, 10, 10, 12, 4, 4, 18, 6, 6]
    assert split_nine_ways(ours, theirs, dataset="d", seed=1) != split


def test_a_split_is_written_and_read_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    split = split_nine_ways(cases(9), cases(3, first="u"), dataset="d")
    path = split.save(tmp_path / "split.json")
    assert NineWaySplit.load(path) == split
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"segmentor": {}}))
    with pytest.raises(DataError, match="segmentor: no such key, did you mean segmenter"):
        NineWaySplit.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s["segmenter"]["test"].append(s["segmenter"]["train"][0]),
            "in both segmenter.train and segmenter.test",
        ),
        (
            lambda s: s["discriminator"]["unannotated"]["train"].append(s["segmenter"]["test"][0]),
            "in both segmenter.test and discriminator.unannotated.train",
        ),
        (
            lambda s: s["discriminator"]["annotated"]["test"].append(s["segmenter"]["test"][0]),
            "which segmenter.train does not",
        ),
        (
            lambda s: s["discriminator"]["annotated"]["test"].extend(
                s["discriminator"]["annotated"]["train"]
            ),
            "in both discriminator.annotated.train and discriminator.annotated.test",
        ),
    ],
)
def test_an_edited_split_with_a_leak_is_refused(tmp_path: Path, change, words) -> None:
    path = split_nine_ways(cases(9), cases(3, first="u"), dataset="d").save(tmp_path / "s.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        NineWaySplit.load(path)


def test_a_patient_on_both_sides_is_a_leak_though_names_differ() -> None:
    ours, theirs = cases(9), cases(3, first="u")
    split = split_nine_ways(ours, theirs, dataset="d")
    check_leaks(split, ours, theirs)
    known = {split.segmenter.test[0], split.discriminator.unannotated.train[0]}
    ours, theirs = (
        tuple(replace(case, patient="p") if case.name in known else case for case in side)
        for side in (ours, theirs)
    )
    with pytest.raises(DataError, match=r"patient p in both segmenter.test and disc"):
        check_leaks(split, ours, theirs)
    with pytest.raises(DataError, match="patients p both annotated and unannotated"):
        split_nine_ways(ours, theirs, dataset="d")
    with pytest.raises(DataError, match="u0 not among the 2 unannotated cases given"):
        check_leaks(split, ours, [case for case in theirs if case.name != "u0"])


def test_too_few_patients_for_nine_sets() -> None:
    with pytest.raises(DataError, match="2 patients of unannotated cases for 3 sets"):
        split_nine_ways(cases(9), cases(2, first="u"), dataset="d")
    with pytest.raises(DataError, match="2 patients of cases that the segmenter trains on"):
        split_nine_ways(cases(4), cases(3, first="u"), dataset="d")


def test_a_share_of_a_labelled_data_set_counts_as_annotated() -> None:
    dataset = dataset_of(cases(40, patients=[f"p{i // 2}" for i in range(40)]))
    ours, theirs = share_annotated(dataset, 0.1)
    assert len(ours) == 4
    assert {case.patient for case in ours}.isdisjoint(case.patient for case in theirs)
    assert len(ours) + len(theirs) == 40
    with pytest.raises(DataError, match="annotated share 1; expected above 0 and below 1"):
        share_annotated(dataset, 1.0)


def test_the_command_splits(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", n_cases=10)
    out = tmp_path / "split.json"
    call = ["split", str(dataset), "--out", str(out), "--annotated", "0.6", "--seed", "3"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    split = NineWaySplit.load(out)
    assert len(split.annotated) == 6
    assert len(split.unannotated) == 4
    assert split.seed == 3
    done = CliRunner().invoke(app, call[:4])
    assert done.exit_code != 0
