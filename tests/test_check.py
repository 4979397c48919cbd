"""Plans that people edited: refused before training starts, with file, place and reason."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effseg.errors import MemoryBudgetError, PlanError
from effseg.planner import check_plan
from effseg.plans import Plan
from effseg.training import train

Edit = Callable[[dict[str, Any]], Any]


def edited(plan: Plan, **changes: Any) -> Plan:
    """A plan with other values at dotted places, `__` for the dot."""
    content = plan.model_dump()
    for place, value in changes.items():
        *parts, last = place.split("__")
        inner = content
        for part in parts:
            inner = inner[part]
        inner[last] = value
    return Plan.model_validate(content)


def refused(plan: Plan, path: Path, edit: Edit) -> str:
    """What `Plan.load` says of a plan's file after an edit of its JSON."""
    content = json.loads(plan.model_dump_json())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    return str(caught.value)


EDITS: list[tuple[Edit, str]] = [
    (lambda p: p.update(patchsize=[8, 8, 8]), "patchsize: no such key, did you mean patch_size"),
    (
        lambda p: p["training"]["optimizer"].update(lr=1e-3),
        "training.optimizer.lr: no such key, got 0.001",
    ),
    (
        lambda p: p["labels"][1].update(nam="x"),
        "labels.1.nam: no such key, did you mean name",
    ),
    (lambda p: p.pop("spacing"), "spacing: Field required"),
    (lambda p: p.update(patch_size=[16, 15, 16]), "patch_size (16, 15, 16); each length must be a"),
    (lambda p: p.update(patch_size=[16, 16]), "patch_size.2: Field required"),
    (lambda p: p.update(patch_size=[16, 0, 16]), "patch_size.1: Input should be greater than"),
    (lambda p: p.update(patch_size=[16, 16.5, 16]), "patch_size.1: Input should be a valid int"),
    (lambda p: p.update(batch_size=0), "batch_size: Input should be greater than or equal to 1"),
    (lambda p: p.update(batch_size="two"), "batch_size: Input should be a valid integer"),
    (lambda p: p.update(spacing=[1, -1, 1]), "spacing.1: Input should be greater than 0, got -1"),
    (lambda p: p.update(precision="int8"), "precision: Input should be 'float32', 'bfloat16' or"),
    (lambda p: p.update(device="gpu"), 'device: expected "cpu", "cuda" or "cuda:<number>", got'),
    (lambda p: p.update(policies={"encoder.0": "fast"}), "policies.encoder.0: Input should be"),
    (
        lambda p: p["network"].update(out_channels=7),
        "network.out_channels is 7; there are 3 labels",
    ),
    (lambda p: p["network"].update(in_channels=2), "in_channels is 2; there are 1 channels"),
    (
        lambda p: p["network"].update(strides=[[2, 2, 2], [2, 2, 2]]),
        "the first stride is (2, 2, 2)",
    ),
    (
        lambda p: p["network"].update(decoder_layers=[1, 1]),
        "decoder_layers has 2 entries; 2 stages",
    ),
    (lambda p: p["network"].update(compression=0), "compression: Input should be greater than 0"),
    (lambda p: p["inference"].update(window_batch=0), "inference.window_batch: Input should be gr"),
    (
        lambda p: p["inference"].update(overlap=1.0),
        "inference.overlap: Input should be less than 1",
    ),
    (lambda p: p["labels"][2].update(value=1), "labels have value 1 twice"),
    (lambda p: p["labels"][0].update(value=5), "the first label has value 5; background is 0"),
    (lambda p: p.update(ignore_label=2), "ignore_label 2 is also a label to predict"),
    (lambda p: p["training"].update(minutes=3), "minutes 3 and epochs 2; set one of the two"),
    (lambda p: p["training"]["augment"].update(flip_axes=["x", "x"]), "each axis may stand there"),
    (lambda p: p["training"]["augment"].update(scale=[1.2, 0.9]), "scale (1.2, 0.9); expected two"),
    (lambda p: p["training"]["augment"].update(flip=1.5), "flip: Input should be less than or"),
    (lambda p: p["memory"].update(budget_bytes=0), "memory.budget_bytes: Input should be greater"),
    (
        lambda p: p["channels"][0].update(
            normalisation={"kind": "ct", "low": 200, "high": -100, "mean": 0, "std": 1}
        ),
        "low 200 and high -100; low must be the smaller",
    ),
    (lambda p: p.update(format=2), "format: Input should be 1, got 2"),
]


@pytest.mark.parametrize(("edit", "words"), EDITS, ids=[words for _, words in EDITS])
def test_each_impossible_value_gets_one_line(
    tiny_plan: Plan, tmp_path: Path, edit: Edit, words: str
) -> None:
    said = refused(tiny_plan, tmp_path / "plan.json", edit)
    assert said.startswith(f"{tmp_path / 'plan.json'}: ")
    assert words in said
    assert "\n" not in said


@given(data=st.data())
def test_no_value_of_another_kind_gets_past_any_key(
    tiny_plan: Plan, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A list in a dictionary, which no key of a plan takes, is refused where it stands."""
    place: list[str] = []
    content = json.loads(tiny_plan.model_dump_json())
    inner = content
    while isinstance(inner, dict) and inner:
        place.append(data.draw(st.sampled_from(sorted(inner))))
        if place[-1] in {"policies", "reasons"}:
            break
        parent, inner = inner, inner[place[-1]]
    parent = content
    for part in place[:-1]:
        parent = parent[part]
    parent[place[-1]] = [{"wrong": [None]}]
    path = tmp_path_factory.getbasetemp() / "edited.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert f"{path}: {'.'.join(place)}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_that_fits_is_kept_as_it_is(
    tiny_plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    checked = check_plan(tiny_plan)
    assert checked.memory.peak_bytes < checked.memory.budget_bytes
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert check_plan(checked) is checked
    assert not caplog.records


def test_figures_that_are_no_longer_true_are_traced_anew(
    tiny_plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    true = check_plan(tiny_plan)
    stale = edited(true, memory__peak_bytes=2**20, memory__saved_bytes=1)
    caplog.clear()
    assert check_plan(stale, source="p.json") == true
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("p.json: memory.peak_bytes is 1 MiB, but patch 16 x 16 x 16 at batch 2")


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (
            {"memory__budget_bytes": 48 * 2**20},
            MemoryBudgetError,
            "patch 16 x 16 x 16 at batch 2 takes 6.* MiB, its budget is 48 MiB: raise "
            "memory.budget_bytes, or plan again$",
        ),
        ({"batch_size": 10**12}, MemoryBudgetError, "at batch 1000000000000 takes at least"),
        ({"policies": {"encoder.9": "recompute"}}, PlanError, "'encoder.9' is no module"),
        (
            {"network__kernels": ((3, 3, 3), (9**9 * 2 + 1, 9**9 * 2 + 1, 9**9 * 2 + 1))},
            PlanError,
            "makes no training step .*; plan again, or undo",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_starts(
    tiny_plan: Plan,
    tiny_dataset: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    path = edited(tiny_plan, **changes).save(tmp_path / "plan.json")
    with pytest.raises(kind, match=words) as caught:
        train(path, tiny_dataset, out=tmp_path / "run")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
