"""Recipes are held against each other fairly, and a table says no more than its cases do."""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from effseg.plans import Plan

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
tables: Any = import_module("recipe_table")
rows: Any = import_module("recipe_rows")
runs: Any = import_module("recipe_runs")

ROW = tables.CaseRow(
    dataset="balls",
    recipe="default",
    seed=0,
    case="a",
    dice=0.5,
    minutes=2.0,
    steps=10,
    peak_mib=7.0,
    planned_minutes=2.0,
)


def of(recipe: str, dice: float, *, shift: float = 0.0, n_seeds: int = 3) -> list[Any]:
    """Ten cases that differ, and seeds that differ, by as much for every recipe."""
    return [
        replace(
            ROW,
            recipe=recipe,
            seed=seed,
            case=f"case{i}",
            dice=dice + 0.03 * i + 0.02 * seed + shift * (-1) ** i,
        )
        for seed in range(n_seeds)
        for i in range(10)
    ]


def test_what_all_cases_and_seeds_share_cancels_out():
    found = list(
        tables.outcomes(
            of("default", 0.4) + of("better", 0.42), {"default": "default", "better": "default"}
        )
    )
    assert [one.recipe for one in found] == ["default", "better"]
    assert found[1].difference == pytest.approx(2.0)
    assert (found[1].low, found[1].high) == pytest.approx((2.0, 2.0))
    assert [one.verdict for one in found] == ["the plan's own", "helps"]
    assert (found[1].n_seeds, found[1].n_cases) == (3, 10)


def test_a_difference_that_cases_disagree_on_is_none_that_was_shown():
    every = of("default", 0.4) + of("odd", 0.401, shift=0.1)
    _, found = tables.outcomes(every, {"default": "default", "odd": "default"})
    assert found.low < 0 < found.high
    assert found.verdict == "no difference shown"


def test_one_model_of_several_seeds_is_held_against_each_of_them():
    every = of("default", 0.4) + of("ensemble", 0.3, n_seeds=1)
    _, found = tables.outcomes(every, {"default": "default", "ensemble": "default"})
    assert found.difference == pytest.approx(
        -12.0
    )  # the default's seeds are 0.02 better on average
    assert found.high < 0
    assert found.low < -13  # their spread is in the interval
    assert found.verdict == "hurts"


def test_only_cases_that_both_have_count():
    every = of("default", 0.4) + [row for row in of("new", 0.4) if row.case != "case9"]
    _, found = tables.outcomes(every, {"default": "default", "new": "default"})
    assert (found.n_cases, found.difference) == (9, pytest.approx(0.0))


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "cases.csv"
    assert tables.read_cases(path) == []
    tables.write_cases(path, of("default", 0.4))
    tables.write_cases(path, [ROW])
    assert tables.read_cases(path) == [*of("default", 0.4), ROW]


def test_a_page_has_a_table_for_each_data_set():
    page = tables.as_markdown(
        [
            *of("default", 0.4),
            *of("better", 0.42),
            replace(ROW, planned_minutes=10.0, dice=0.8),
            replace(ROW, dataset="cubes"),
        ],
        {"default": "default", "better": "default"},
        {"default": "nothing", "better": "all"},
    )
    assert "## balls, 2 minutes" in page
    assert (
        "| better | default | 3 | 0.5750 | +2.00 | +2.00 to +2.00 | 2.00 | 10 | 7 | helps |" in page
    )
    assert "## balls, 10 minutes" in page
    assert "## cubes, 2 minutes" in page


@pytest.mark.parametrize(
    "name", [name for name, one in rows.RECIPES.items() if isinstance(one, runs.Trained)]
)
def test_each_recipe_changes_a_plan_into_one_that_holds(name, tiny_plan):
    content = runs.changed(tiny_plan.model_dump(mode="json"), rows.RECIPES[name].changes)
    plan = Plan.model_validate(content)
    assert (plan.training == tiny_plan.training) == (name == "default")


def test_a_change_leaves_its_neighbours_alone():
    assert runs.changed({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}}) == {
        "a": {"b": 1, "c": 4},
        "d": 3,
    }
