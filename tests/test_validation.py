"""What a run's held-out cases say of its predictions, and of the rule that cleans them."""

import shutil
from pathlib import Path

import pytest

from effseg.evaluation import CaseScore
from effseg.evaluation.scores import Lesion, LesionScore
from effseg.plans import Plan, PostprocessConfig
from effseg.validation import stricter, validate
from effseg.validation.smallest import FEWEST_FINDS, SAFE_SHARE


def with_rule(plan: Plan, **rule: float) -> Plan:
    inference = plan.inference.model_copy(update={"postprocess": PostprocessConfig(**rule)})
    return plan.model_copy(update={"inference": inference})


def scored(*found_mm3: float) -> list[CaseScore]:
    """One case with a lesion for each volume; 0: missed."""
    lesions = tuple(
        Lesion(label=1, volume_mm3=50, centroid_mm=(0, 0, 0), detected=v > 0, found_mm3=v, dice=0.5)
        for v in found_mm3
    )
    score = LesionScore(
        label=1,
        n_reference=len(lesions),
        n_detected=sum(v > 0 for v in found_mm3),
        n_false_positives=3,
        lesions=lesions,
    )
    return [CaseScore(case="a", labels=(), lesions=(score,))]


def test_what_is_smaller_than_every_true_find_is_noise(tiny_plan: Plan) -> None:
    plan = with_rule(tiny_plan, minimum_mm3=20)
    finds = [100.0 + i for i in range(FEWEST_FINDS)]
    made = stricter(plan, scored(0, *finds))
    assert made.inference.postprocess.minimum_mm3 == pytest.approx(SAFE_SHARE * 100)
    assert f"smallest of {FEWEST_FINDS}" in made.reasons["postprocess"]
    assert made.model_copy(update={"inference": 0, "reasons": 0}) == plan.model_copy(
        update={"inference": 0, "reasons": 0}
    )


def test_a_rule_stays_where_validation_says_too_little(tiny_plan: Plan) -> None:
    finds = [100.0] * FEWEST_FINDS
    few, strict = with_rule(tiny_plan, minimum_mm3=20), with_rule(tiny_plan, minimum_mm3=90)
    share = with_rule(tiny_plan, fraction_of_largest=0.3)
    assert stricter(few, scored(*finds[1:])) is few
    assert stricter(few, scored(0, *finds[1:])) is few
    assert stricter(strict, scored(*finds)) is strict
    assert stricter(share, scored(*finds)) is share
    assert stricter(few, []) is few


def test_a_run_keeps_the_stricter_rule_and_its_scores(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effseg.validation.smallest.FEWEST_FINDS", 1)
    run = shutil.copytree(tiny_run, tmp_path / "run")
    with_rule(Plan.load(run / "plan.json"), minimum_mm3=1).save(run / "plan.json")
    before = validate(run)
    limit = Plan.load(run / "plan.json").inference.postprocess.minimum_mm3
    finds = [lesion.found_mm3 for c in before.cases for s in c.lesions for lesion in s.lesions]
    assert limit == pytest.approx(SAFE_SHARE * min(f for f in finds if f > 0))
    assert validate(run) == before
