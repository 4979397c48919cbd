"""Evaluations against one another: worked numbers, refusals, and the page."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from effseg import cli
from effseg.errors import CheckpointError, DataError
from effseg.evaluation import (
    CaseScore,
    Comparison,
    LabelScore,
    Scores,
    compare_scores,
    evaluate,
    mean_interval,
)
from effseg.evaluation.significance import holm, paired_t, signed_rank
from effseg.io import write_volume
from effseg.ledger import Scored, read_scored
from effseg.plans import Plan
from effseg.report import write_comparison
from effseg.report.planes import view_case
from effseg.volume import Grid, Volume

NASTY = '<script>alert("1")</script>'


def make_scores(dice: dict[str, list[float | None]], **changes: object) -> Scores:
    """A case for each entry, with the Dice of labels 1, 2, ..."""
    cases = tuple(
        CaseScore(
            case=name,
            labels=tuple(make_label(i, value) for i, value in enumerate(values, start=1)),
            lesions=(),
        )
        for name, values in dice.items()
    )
    content = {"tolerance_mm": 1.0, "ignore_label": None, "conventions": "", "cases": cases}
    return Scores(**(content | changes))


def make_label(label: int, dice: float | None) -> LabelScore:
    rest = dict.fromkeys(LabelScore.model_fields)
    known = {"label": label, "name": f"part {label}", "dice": dice, "reference_mm3": 100.0 * label}
    return LabelScore(**(rest | known | {"prediction_mm3": 1.0}))


def compare_two(first: Scores, second: Scores) -> Comparison:
    (made,) = compare_scores([("a", first), ("b", second)])
    return made


def test_means_and_differences_are_over_the_cases_of_both() -> None:
    first = make_scores({"p": [0.5, 0.7], "q": [0.6, None], "r": [0.8, 0.9], "only": [0.0, 0.0]})
    second = make_scores({"r": [0.7, 0.9], "q": [0.9, 0.4], "p": [0.6, 0.8]})
    made = compare_two(first, second)
    assert (made.n_shared, made.n_first, made.n_second) == (3, 4, 3)
    part1, part2, both = made.rows
    assert (part1.n, part1.n_undefined) == (3, 0)
    assert part1.first == pytest.approx((0.5 + 0.6 + 0.8) / 3)
    assert part1.difference == pytest.approx((0.1 + 0.3 - 0.1) / 3)
    assert (part2.n, part2.n_undefined) == (2, 1)  # q has no second part in the first
    assert part2.difference == pytest.approx((0.1 + 0.0) / 2)
    assert both.label is None
    assert both.difference == pytest.approx((0.1 + 0.05 - 0.05) / 3)
    assert [(c.case, round(c.difference, 9)) for c in made.changes] == [
        ("p", 0.1),
        ("q", 0.05),
        ("r", -0.05),
    ]
    assert made.n_tests == 1


def test_the_signed_rank_test_counts_signs() -> None:
    differences = [0.11, -0.02, 0.3, 0.07, 0.05, 0.23]
    ranks = stats.rankdata(np.abs(differences))
    observed = float(ranks[1])  # of the only negative one
    sums = [
        sum(rank for rank, taken in zip(ranks, signs, strict=True) if taken)
        for signs in itertools.product((False, True), repeat=len(ranks))
    ]
    exact = 2 * sum(total <= observed for total in sums) / len(sums)
    assert signed_rank([*differences, 0.0]) == pytest.approx(exact)
    assert signed_rank([0.0, 0.0]) is None
    assert signed_rank([]) is None


def test_the_t_test_is_that_of_the_differences() -> None:
    # Student's own example: hours of sleep under two drugs (Biometrika 6, 1908); p of 2.8 in 1000
    gains = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert paired_t(gains) == pytest.approx(0.00283, abs=1e-5)
    assert paired_t([0.1]) is None
    assert paired_t([0.1, 0.1, 0.1]) is None


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        interval = mean_interval(rng.normal(0.3, 0.1, size=6).tolist())
        assert interval is not None
        held += interval.low <= 0.3 <= interval.high
    assert held >= 276  # of 300; 282 are expected, of plain percentiles 260
    values = [0.1, 0.5, 0.7]
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval([0.4]) is None


def test_p_values_are_stepped_down() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == [0.03, 0.06, None, 0.06]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_several_runs_are_corrected_label_by_label() -> None:
    rng = np.random.default_rng(0)
    base = {f"c{i}": [float(v)] for i, v in enumerate(rng.uniform(0.4, 0.8, 12))}
    shifted = [
        make_scores({k: [v[0] + step + 0.02 * float(rng.normal())] for k, v in base.items()})
        for step in (0.01, 0.02)
    ]
    named = [("a", make_scores(base)), ("b", shifted[0]), ("c", shifted[1])]
    alone = [compare_scores([named[0], other])[0].rows[0].t_p for other in named[1:]]
    together = compare_scores(named)
    assert [made.rows[0].t_p for made in together] == holm(alone)
    assert [made.n_tests for made in together] == [2, 2]
    assert [(made.first, made.second) for made in together] == [("a", "b"), ("a", "c")]


def scores_of(volume_mm3: float = 100.0, **changes: object) -> Scores:
    made = make_scores({"p": [0.5], "q": [0.6]}, **changes)
    case = made.cases[1]
    label = case.labels[0].model_copy(update={"reference_mm3": volume_mm3})
    other = case.model_copy(update={"labels": (label,)})
    return made.model_copy(update={"cases": (made.cases[0], other)})


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (make_scores({"x": [0.5], "q": [0.1]}), "a and b share 1 of 2 and 2 cases; expected 2"),
        (make_scores({"p": [0.5, 0.1], "q": [0.1, 0.2]}), "a scores labels 1 and b labels 1, 2"),
        (scores_of(90.0), "case q: label 1 has 100 mm3 in the reference of a and 90 mm3 in that"),
        (scores_of(ignore_label=9), "a leaves label None out of the score and b label 9"),
    ],
)
def test_what_makes_no_sense_is_refused_with_both_numbers(second: Scores, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        compare_two(scores_of(), second)
    assert "\n" not in str(caught.value)


def test_a_tolerance_counts_where_it_is_compared() -> None:
    other = scores_of(tolerance_mm=2.0)
    assert compare_two(scores_of(), other).n_shared == 2
    with pytest.raises(DataError, match="surface Dice at 1 mm and b at 2 mm"):
        compare_scores([("a", scores_of()), ("b", other)], metric="surface_dice")
    with pytest.raises(DataError, match="'relative_volume_difference'; expected one of dice"):
        compare_scores([("a", scores_of()), ("b", other)], metric="relative_volume_difference")


@pytest.fixture
def predicted(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of scored predictions: the second finds more of the first case."""
    grid, rng = Grid(shape=(20, 24, 28), spacing=(2.0, 1.0, 1.0)), np.random.default_rng(0)
    folders = tmp_path / "one", tmp_path / "two"
    for index in range(3):
        true = np.zeros(grid.shape, np.uint8)
        true[6:12, 6:14, 8:18] = 1
        found = true.copy()
        found[:, 10:] = 0
        better = true.copy() if index == 0 else found
        name = f"case_{index}.nii.gz"
        image = (100 * true + rng.normal(0, 5, true.shape)).astype(np.float32)
        for folder, array in (
            (tmp_path / "references", true),
            (tmp_path / "images", image),
            (folders[0], found),
            (folders[1], better),
        ):
            write_volume(Volume(array, grid), folder / name)
    for folder in folders:
        evaluate(
            folder,
            tmp_path / "references",
            out=folder / "metrics.json",
            images=tmp_path / "images",
        )
    return folders


def test_the_page_shows_where_two_predictions_differ(
    predicted: tuple[Path, Path], tmp_path: Path
) -> None:
    scored = [read_scored(folder) for folder in predicted]
    comparisons = compare_scores([(one.name, one.scores) for one in scored])
    page = write_comparison(scored, comparisons, tmp_path / "page.html").read_text()
    assert page.count('data-case="case_0"') == 1
    assert "case_1" not in page  # it did not change
    assert page.count('class="other"') == 3  # planes of the second prediction
    assert page.count("data:image/png") == 3
    assert "https://" not in page
    assert "1 of 3" in page
    case, other = (one.scores.cases[0] for one in scored)
    view = view_case(
        str(case.prediction),
        str(case.reference),
        image=None,
        plan=None,
        ignore_label=None,
        through="error",
        other=other.prediction,
    )
    assert view.where == "planes where the predictions differ most"
    row = int(view.planes[1].caption.split()[2]) - 1
    assert 10 <= row < 14  # where only the second finds anything


def test_names_are_escaped(tmp_path: Path) -> None:
    scores = make_scores({NASTY: [0.5], "q": [0.6]}), make_scores({NASTY: [0.7], "q": [0.6]})
    scored = [Scored(f"{NASTY}{i}", one) for i, one in enumerate(scores)]
    comparisons = compare_scores([(one.name, one.scores) for one in scored])
    page = write_comparison(scored, comparisons, tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "No picture: the scores name no files." in page


def test_the_verb_tells_of_tests_changes_and_the_page(
    predicted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    arguments = ["compare", *map(str, predicted), "--metric", "iou", "--out", str(out)]
    cli.app(arguments, standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "not told apart by 3 cases" in said
    assert "changed: case_0 0.500 to 1.000 (+0.500)" in said
    assert f"page {out}" in said
    assert "IoU of <b>2 runs</b>" in out.read_text()


def test_folds_in_one_folder_are_compared_as_one(tiny_plan: Plan, tmp_path: Path) -> None:
    parts = ({"p": 0.5, "q": 0.6}, {"r": 0.7})
    for recipe, step in (("a", 0.0), ("b", 0.1)):
        for number, part in enumerate(parts):
            run = tmp_path / recipe / f"fold_{number}"
            tiny_plan.save(run / "plan.json")
            scores = make_scores({name: [dice + step] for name, dice in part.items()})
            scores.save(run / "validation" / "metrics.json")
    scored = [read_scored(tmp_path / recipe) for recipe in "ab"]
    made = compare_two(scored[0].scores, scored[1].scores)
    assert (made.n_shared, made.rows[0].difference) == (3, pytest.approx(0.1))
    assert scored[0].plan == tiny_plan
    again = tmp_path / "a" / "fold_1" / "validation" / "metrics.json"
    make_scores({"q": [0.1], "r": [0.2]}).save(again)
    with pytest.raises(DataError, match=r"case q is scored in .*fold_0 and in .*fold_1"):
        read_scored(tmp_path / "a")
    make_scores({"r": [0.2]}, ignore_label=7).save(again)
    with pytest.raises(DataError, match=r"ignore_label None and .* with 7; score both alike"):
        read_scored(tmp_path / "a")


def test_a_run_is_read_by_its_validation_and_says_what_it_changed(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for name in ("plan.json", "run.json", "validation/metrics.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes((tiny_run / name).read_bytes())
    content = json.loads((run / "plan.json").read_text())
    content["training"]["seed"] = 5
    (run / "plan.json").write_text(json.dumps(content))
    scored = [read_scored(tiny_run), read_scored(run)]
    assert scored[1].plan == Plan.load(run / "plan.json")
    comparisons = compare_scores([(one.name, one.scores) for one in scored])
    page = write_comparison(scored, comparisons, tmp_path / "page.html").read_text()
    assert "training.seed 0 -&gt; 5" in page
    assert "No case changed." in page
    with pytest.raises(DataError, match=r"no test/metrics.json in it; score its predictions"):
        read_scored(run, on="test")
    (run / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        read_scored(run)
