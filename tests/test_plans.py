"""Plans: JSON that people edit."""

import json
from pathlib import Path

import pytest

from effseg.errors import PlanError
from effseg.plans import NetworkConfig, Normalisation, Plan, format_bytes, parse_bytes


def test_a_plan_survives_its_file(tiny_plan: Plan, tmp_path: Path) -> None:
    path = tiny_plan.save(tmp_path / "deep" / "plan.json")
    assert Plan.load(path) == tiny_plan


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("batchsize",), 4, "batchsize: no such key, did you mean batch_size, got 4"),
        (("batch_size",), 0, "batch_size: Input should be greater than or equal to 1, got 0"),
        (("spacing",), [1.0, -1.0, 1.0], "spacing.1"),
        (("training", "optimizer", "learning_rate"), "NaN", "training.optimizer.learning_rate"),
        (("patch_size",), [15, 16, 16], "multiple of the network's total stride"),
        (("network", "out_channels"), 9, "network.out_channels is 9; there are 3 labels"),
        (("network", "kernels"), [[2, 3, 3], [3, 3, 3]], "must be odd"),
        (("network", "strides"), [[1, 1, 1]], "strides has 1 entries; 2 stages need 2"),
        (("ignore_label",), 1, "also a label to predict"),
        (("device",), "tpu", "device"),
    ],
)
def test_edits_that_cannot_work_are_refused_with_their_place(
    tiny_plan: Plan, tmp_path: Path, place, value, words
) -> None:
    path = tiny_plan.save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not JSON: .* line 1"), ("[]", "plan: "), ("\xff", "plan.json")],
)
def test_files_that_are_no_plan_are_refused(tmp_path: Path, content, words) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(PlanError, match=words):
        Plan.load(path)


def test_a_missing_plan_names_the_verb_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="effseg plan"):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8 gb ", 8 * 10**9),
        ("1.5G", 3 * 2**29),
        ("512MiB", 2**29),
        (4096, 4096),
        ("8192", 8192),
    ],
)
def test_budgets(text, n_bytes) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["0", -3, "lots", "", "-1GiB", "8 giraffes", True, "1e9"])
def test_budgets_that_are_none(text) -> None:
    with pytest.raises(PlanError, match="expected a size"):
        parse_bytes(text)


def test_bytes_as_people_read_them() -> None:
    assert [format_bytes(n) for n in (12, 2048, 3 * 2**20, 3 * 2**29)] == [
        "12 B",
        "2 KiB",
        "3 MiB",
        "1.50 GiB",
    ]


def test_normalisations_are_complete() -> None:
    with pytest.raises(ValueError, match="needs low"):
        Normalisation(kind="ct", low=0.0)
    with pytest.raises(ValueError, match="takes no numbers"):
        Normalisation(kind="zscore", mean=1.0)


def test_the_total_stride_multiplies_the_stages() -> None:
    config = NetworkConfig(
        in_channels=1,
        out_channels=2,
        stem_channels=8,
        growth_rate=8,
        encoder_layers=(1, 1, 1),
        decoder_layers=(1, 1),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    )
    assert config.total_stride == (2, 4, 4)
