"""The page of a run: true numbers, the right cases, nothing from outside, nothing unescaped."""

import base64
import csv
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from effseg.errors import CheckpointError, DataError, EffsegError, PlanError
from effseg.evaluation import CaseScore, LabelScore, LesionScore, Scores, evaluate
from effseg.io import write_volume
from effseg.memory import MemoryEvent, MemoryReport
from effseg.planner import trace_plan
from effseg.plans import (
    Alternative,
    Channel,
    ChannelFacts,
    Fingerprint,
    Label,
    LabelFacts,
    Memory,
    NetworkConfig,
    Normalisation,
    Plan,
    TrainingConfig,
    format_bytes,
)
from effseg.report import write_report
from effseg.report.charts import FRAME, draw_curves, draw_rates
from effseg.report.choices import list_choices
from effseg.report.outlines import outline, png_uri, shrink
from effseg.report.planes import view_case
from effseg.report.results import list_labels, pick_cases
from effseg.report.step import FRAME as STEP
from effseg.report.step import draw_step
from effseg.volume import AxisOrder, Grid, Volume

GIB, MIB = 2**30, 2**20
NASTY = '<script>alert("1")</script> & {{ 7*7 }}'
TYPED = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": "x"})
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags in order, text, and whether every tag is closed where it should be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> in {self.open} at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        """What is read, in one line and with typists' signs."""
        return " ".join(" ".join(self.words).split()).translate(TYPED)

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def make_plan(*, label: str = "nodule", kind: str = "zscore") -> Plan:
    numbers = {"low": -1000.0, "high": 200.0, "mean": -300.0, "std": 250.0} if kind == "ct" else {}
    return Plan(
        dataset="data/lungs",
        channels=(Channel(name="CT", normalisation=Normalisation(kind=kind, **numbers)),),
        labels=(Label(value=0, name="background"), Label(value=1, name=label)),
        spacing=(2.5, 0.75, 0.75),
        patch_size=(16, 48, 32),
        batch_size=3,
        network=NetworkConfig(
            in_channels=1,
            out_channels=2,
            stem_channels=8,
            growth_rate=12,
            encoder_layers=(2, 2),
            decoder_layers=(2,),
            strides=((1, 1, 1), (1, 2, 2)),
            kernels=((1, 3, 3), (3, 3, 3)),
        ),
        training=TrainingConfig(minutes=7.5),
        memory=Memory(budget_bytes=2 * GIB, peak_bytes=GIB, saved_bytes=GIB // 2),
        reasons={"patch_size": "covers the median case", "growth_rate": "fits the minutes"},
        fingerprint=Fingerprint(
            dataset="lungs",
            n_cases=2,
            spacings=((2.5, 0.7, 0.7), (2.5, 0.8, 0.8)),
            shapes=((100, 512, 512), (120, 512, 512)),
            channels=(
                ChannelFacts(
                    name="CT",
                    is_ct=True,
                    why="named CT",
                    foreground_mean=-310.5,
                    foreground_std=240.0,
                    foreground_percentiles=(-980.0, -300.0, 190.0),
                    minimum=-1024,
                    maximum=3071,
                ),
            ),
            labels=(
                LabelFacts(
                    value=1,
                    name=label,
                    n_cases=2,
                    voxel_share=1.0,
                    n_components=5,
                    component_mm3=(12.0, 14, 40, 77.5, 200, 900, 1234.0),
                    small_share=0.0,
                ),
            ),
        ),
    )


def make_case(name: str, dice: float | None, **places: str) -> CaseScore:
    return CaseScore(
        case=name,
        labels=(
            LabelScore(
                label=1,
                name="nodule",
                dice=dice,
                iou=dice,
                voe=dice,
                surface_dice=dice,
                hd_mm=None,
                hd95_mm=None if dice is None else 10 * (1 - dice),
                assd_mm=None,
                relative_volume_difference=None if dice is None else dice - 1,
                reference_mm3=1500.0,
                prediction_mm3=750.0,
            ),
        ),
        lesions=(
            LesionScore(label=1, n_reference=2, n_detected=1, n_false_positives=3, lesions=()),
        ),
        **places,
    )


def make_scores(*cases: CaseScore, ignore_label: int | None = None) -> Scores:
    return Scores(
        tolerance_mm=1.0, ignore_label=ignore_label, conventions="as written", cases=cases
    )


def make_record(**changes: object) -> dict[str, object]:
    record: dict[str, object] = {
        "format": 1,
        "effseg": "0.1.0",
        "torch": "2.13.0",
        "python": "3.11.7",
        "dataset": "data/my lungs",
        "fold": 2,
        "train": ["a", "b"],
        "validation": ["c"],
        "started": "2026-11-22T05:20:00",
        "minutes": 7.43,
        "epochs": 3,
        "steps": 1234,
        "best_epoch": 2,
        "best_score": 0.8712,
        "stopped_by": "minutes",
        "device": "cpu",
        "n_threads": 2,
        "n_parameters": 1400000,
        "seed": 0,
        "memory": {
            "budget_bytes": 2 * GIB,
            "predicted_peak_bytes": GIB,
            "measured_peak_bytes": GIB * 5 // 4,
            "measured": "resident memory above the imports",
        },
        "notes": ["The CT is rendered; the outlines are real."],
    }
    return record | changes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with everything but evaluations."""
    folder = tmp_path / "run"
    make_plan().save(folder / "plan.json")
    (folder / "run.json").write_text(json.dumps(make_record()))
    (folder / "metrics.csv").write_text(
        "epoch,step,minutes,learning_rate,loss,validation_loss,validation_dice,"
        "validation_dice_nodule,peak_bytes\n"
        "1,10,2.5,0.002,1.5,1.4,0.30,0.30,1000\n"
        "2,20,5.0,0.002,0.9,,,,1000\n"
        "3,30,7.4,0.002,nan,0.8,0.85,0.85,1000\n"
    )
    return folder


def write_case(folder: Path, name: str, reference: np.ndarray, prediction: np.ndarray) -> CaseScore:
    grid = Grid(shape=reference.shape, spacing=(2.0, 1.0, 1.0))
    image = (reference * 100 + np.arange(reference.shape[2])).astype(np.int16)
    places = {}
    for role, array in (
        ("reference", reference.astype(np.uint8)),
        ("prediction", prediction.astype(np.uint8)),
        ("image", image),
    ):
        path = folder / role / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        places[role] = str(write_volume(Volume(array, grid), path))
    return make_case(name, 0.5, **places)


def cube(*, at: tuple[int, int, int], edge: int = 4) -> np.ndarray:
    array = np.zeros((20, 30, 40), np.uint8)
    z, y, x = at
    array[z : z + edge, y : y + edge, x : x + edge] = 1
    return array


def test_the_page_is_whole_and_loads_nothing(run: Path) -> None:
    case = write_case(run / "files", "c", cube(at=(5, 5, 5)), cube(at=(5, 6, 5)))
    make_scores(case).save(run / "test" / "metrics.json")
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html"
    assert not re.search(r"(https?:)?//[a-z]", page.source)
    assert "url(" not in page.source
    assert "@import" not in page.source
    links = page.attributes("href") + page.attributes("src") + page.attributes("xlink:href")
    assert len(links) == 3  # the three planes
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object", "embed", "base"})
    assert len(set(page.attributes("id"))) == len(page.attributes("id"))
    assert [p.name for p in run.iterdir() if "report" in p.name] == ["report.html"]


def test_numbers_are_the_inputs(run: Path) -> None:
    make_scores(make_case("a", 0.9), make_case("b", 0.5), make_case("c", 0.82)).save(
        run / "test" / "metrics.json"
    )
    text = Page(write_report(run)).text
    assert "0.740 mean Dice on 3 test cases" in text
    assert "7.4 minutes of training" in text
    assert "1.25 GiB of a budget of 2.00 GiB" in text
    assert "more than allowed" not in text
    assert "The CT is rendered; the outlines are real." in text
    assert "0.740 0.820 0.500" in text  # mean, median, worst
    assert "2.60 1.80 5.00" in text  # HD95, where high is bad
    assert "nodule 6 3 0.500 9 3.00 -" in text  # components: 6, of these found 3, 9 false
    assert "patch size 16 x 48 x 32 voxels covers the median case" in text
    assert "growth rate 12 fits the minutes" in text
    assert "2.5 x 0.75 (0.7-0.8) x 0.75 (0.7-0.8) mm" in text
    assert "110 (100-120) x 512 x 512 voxels" in text
    assert "12 77.5 1,234" in text  # component volumes
    assert "-310.5 ± 240" in text
    assert "1.25 times the prediction" in text
    assert "effseg train 'data/my lungs' --plan" in text
    assert "--fold 2" in text
    for fact in ("1,234", "1,400,000", "cpu, 2 threads", "torch 2.13.0", "Python 3.11.7"):
        assert fact in text


def test_a_step_is_drawn_module_by_module(run: Path) -> None:
    page = Page(write_report(run))
    text = page.text
    polygons = [attrs for tag, attrs in page.tags if tag == "polygon"]
    for word in ("forward", "backward", "optimizer", "encoder.0", "decoder.0", "stem"):
        assert word in text
    report = trace_plan(make_plan())
    assert f"{format_bytes(report.peak_bytes)} at most" in text
    assert "far above" in text  # a budget of 2 GiB, beside which the step is small
    xs, ys = zip(
        *(map(float, point.split(",")) for p in polygons for point in p["points"].split()),
        strict=True,
    )
    assert (min(xs), max(xs)) == (STEP.left, STEP.right)
    assert STEP.top <= min(ys) < max(ys) == STEP.bottom


def test_the_peak_the_budget_and_the_phases_lie_where_they_should() -> None:
    timeline = (
        MemoryEvent("Net.body.a.conv", "forward", 100 * MIB, 300 * MIB, 200 * MIB, 0),
        MemoryEvent("Net.body.a.norm", "forward", 200 * MIB, 250 * MIB, 200 * MIB, 0),
        MemoryEvent("DiceLoss", "forward", 200 * MIB, 200 * MIB, 200 * MIB, 0),
        MemoryEvent("Net.body.b_of_a_long_name", "backward", 200 * MIB, 800 * MIB, 100 * MIB, 0),
        MemoryEvent("", "optimizer", 100 * MIB, 120 * MIB, 100 * MIB, 0),
    )
    report = MemoryReport(800 * MIB, 0, 0, timeline)
    memory = Memory(budget_bytes=1000 * MIB, peak_bytes=900 * MIB, saved_bytes=0)
    chart = draw_step(report, make_plan().model_copy(update={"memory": memory}))
    assert [name.text for name in chart.names] == [
        "a",
        "loss",
        "b_of_a_long_n\N{HORIZONTAL ELLIPSIS}",
        "optimizer",
    ]
    assert [phase.text for phase in chart.phases] == ["forward", "backward", "optimizer"]
    assert chart.peak.text == "800 MiB in b_of_a_long_name, backward"
    quarter = (STEP.right - STEP.left) / 4
    assert chart.peak.x == pytest.approx(STEP.left + 2.5 * quarter, abs=0.1)
    places = {level.style: level.at for level in chart.levels}
    assert places["budget"] < places["predicted"] < chart.peak.y
    height = STEP.bottom - STEP.top
    assert places["budget"] == pytest.approx(STEP.bottom - height * 1000 / 1000, abs=0.1)
    assert chart.peak.y == pytest.approx(STEP.bottom - height * 0.8, abs=0.1)
    at = sorted(level.text_at for level in chart.levels)
    assert at[1] - at[0] >= 12  # words of two near lines do not meet
    assert [entry.name for entry in chart.legend] == [
        "a",
        "loss",
        "b_of_a_long_name",
        "optimizer",
    ]


def test_a_plan_that_cannot_be_traced_leaves_a_line_and_the_rest_of_the_page(run: Path) -> None:
    plan = make_plan().model_copy(update={"policies": {"encoder.7": "recompute"}})
    plan.save(run / "plan.json")
    page = Page(write_report(run))
    assert "No picture of a step: 'encoder.7' is no module" in page.text
    assert "polygon" not in {tag for tag, _ in page.tags}
    assert "7.4 minutes of training" in page.text


def test_what_else_was_weighed_stands_in_a_table(run: Path) -> None:
    others = (
        Alternative(choice="patch 32", peak_bytes=3 * GIB, seconds=1.5, why="over the budget"),
        Alternative(choice="patch 16", peak_bytes=GIB, taken=True, why="fits"),
    )
    make_plan().model_copy(update={"alternatives": others}).save(run / "plan.json")
    text = Page(write_report(run)).text
    assert "patch 32 3.00 GiB 150% 1.5 over the budget" in text
    assert "patch 16, taken 1.00 GiB 50% - fits" in text


def test_more_than_the_budget_is_said_in_the_first_line(run: Path) -> None:
    memory = make_record()["memory"] | {"measured_peak_bytes": 3 * GIB}
    (run / "run.json").write_text(json.dumps(make_record(memory=memory)))
    assert "3.00 GiB of a budget of 2.00 GiB : more than allowed" in Page(write_report(run)).text


def test_steps_that_ran_out_of_memory_are_listed(run: Path) -> None:
    assert "ran out of memory" not in Page(write_report(run)).text
    event = {
        "epoch": 2,
        "step": 1234,
        "when": "2026-11-22T05:25:00",
        "asked": "Tried to allocate <2 GiB>",
        "changed": "9 more stages are recomputed in backward",
    }
    (run / "run.json").write_text(json.dumps(make_record(events=[event])))
    assert (
        "What ran out of memory was done again, with the same results: "
        "2026-11-22 05:25, epoch 2, step 1,234: 9 more stages are recomputed in backward "
        "(Tried to allocate <2 GiB>)"
    ) in Page(write_report(run)).text


def test_a_learning_rate_test_is_drawn_with_what_was_taken(run: Path) -> None:
    assert "Loss by learning rate" not in Page(write_report(run)).text
    (run / "learning_rates.csv").write_text(
        "learning_rate,loss,smoothed_loss\n1e-5,2.0,2.0\n1e-3,1.0,1.5\n1e-1,4.0,2.2\n"
    )
    page = Page(write_report(run))
    assert "Loss by learning rate" in page.text
    assert "1e-5 1e-4 1e-3 1e-2 1e-1 learning rate taken, 0.003" in page.text


def test_the_line_of_a_run_says_what_it_changed(run: Path) -> None:
    assert "Against run" not in Page(write_report(run)).text
    (run.parent / "runs.csv").write_text(
        f"run,parent,changes,conclusion\nother,,,\nrun,base,training.seed 0 -> 1,{NASTY}\n"
    )
    page = Page(write_report(run))
    assert f"Against run base : training.seed 0 -> 1. {NASTY}" in page.text
    assert "<script>alert" not in page.source


def test_before_any_evaluation_the_best_validation_speaks(run: Path) -> None:
    text = Page(write_report(run)).text
    assert "0.871 best Dice on validation patches" in text
    assert "Not evaluated yet" in text


def test_a_run_in_its_first_minute_has_a_page(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan.json")
    text = Page(write_report(tmp_path)).text
    assert "No score yet" in text
    assert "planned for 2.00 GiB" in text
    assert "no run.json yet" in text
    assert "No epoch has ended yet" in text
    (tmp_path / "metrics.csv").write_text("epoch,step,minutes,loss\n")
    assert "No epoch has ended yet" in Page(write_report(tmp_path)).text


def test_unseen_cases_come_first_and_empty_evaluations_do_no_harm(run: Path) -> None:
    make_scores(make_case("v", 0.95)).save(run / "validation" / "metrics.json")
    make_scores(make_case("o", 0.1)).save(run / "other" / "metrics.json")
    make_scores(make_case("u", None)).save(run / "test" / "metrics.json")
    text = Page(write_report(run)).text
    places = [text.index(f"Scores on {name}") for name in ("test", "validation", "other")]
    assert places == sorted(places)
    # The test case has no defined Dice, so the first line is about validation.
    assert "0.950 mean Dice on 1 validation case" in text
    make_scores().save(run / "test" / "metrics.json")
    assert "The evaluation holds no case." in Page(write_report(run)).text


def test_names_are_escaped(run: Path) -> None:
    make_plan(label=NASTY).save(run / "plan.json")
    (run / "run.json").write_text(
        json.dumps(make_record(train=[NASTY], stopped_by=NASTY, notes=[NASTY]))
    )
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "validation_dice", f"validation_dice_{NASTY}"])
        writer.writerow([1, 0.5, 0.5])
    case = make_case(NASTY, 0.5, prediction=NASTY, reference=NASTY)
    named = case.labels[0].model_copy(update={"name": NASTY})
    make_scores(case.model_copy(update={"labels": (named,)})).save(run / "test" / "metrics.json")
    page = Page(write_report(run))
    assert "<script>alert" not in page.source
    assert "49" not in re.findall(r"& (\S+)", page.text)  # no template ran in a name
    assert page.text.count(NASTY) >= 8
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_the_worst_case_is_the_worst(run: Path) -> None:
    dice = [0.62, 0.91, 0.35, 0.88, 0.77, 0.12, 0.95, 0.5]
    cases = [make_case(f"case{i}", value) for i, value in enumerate(dice)]
    make_scores(*cases, make_case("undefined", None)).save(run / "test" / "metrics.json")
    shown = [
        (attrs["data-rank"], attrs["data-case"])
        for _, attrs in Page(write_report(run)).tags
        if "data-rank" in attrs
    ]
    assert shown == [
        ("worst-1", "case5"),
        ("worst-2", "case2"),
        ("worst-3", "case7"),
        ("best-1", "case6"),
        ("best-2", "case1"),
        ("best-3", "case3"),
    ]


@pytest.mark.parametrize(("n", "n_worst", "n_best"), [(0, 0, 0), (1, 1, 0), (3, 2, 1), (5, 3, 2)])
def test_few_cases_are_shown_once(n: int, n_worst: int, n_best: int) -> None:
    worst, best = pick_cases(make_scores(*(make_case(f"{i}", i / 10) for i in range(n))))
    assert [case.case for case in worst] == [f"{i}" for i in range(n_worst)]
    assert [case.case for case in best] == [f"{n - 1 - i}" for i in range(n_best)]


def test_the_worst_volume_difference_is_the_largest_either_way() -> None:
    row = list_labels(make_scores(make_case("a", 0.2), make_case("b", 0.9)))[0]
    assert (row.cells[-1].value, row.cells[-1].hint) == (pytest.approx(-0.8), "a")
    assert row.cells[2].hint == "a"


def test_the_table_of_cases_carries_what_it_sorts_by(run: Path) -> None:
    make_scores(make_case("a", 0.9), make_case("b", 0.25), make_case("c", None)).save(
        run / "test" / "metrics.json"
    )
    values = Page(write_report(run)).attributes("data-value")
    per_row = len(values) // 3
    assert values[0::per_row] == ["b", "a", "c"]  # worst first, undefined last
    assert values[1::per_row] == ["0.25", "0.9", ""]


def test_missing_files_leave_a_sentence(run: Path) -> None:
    good = write_case(run / "files", "good", cube(at=(5, 5, 5)), cube(at=(5, 6, 5)))
    gone = good.model_copy(update={"case": "gone", "prediction": str(run / "gone.nii.gz")})
    blind = good.model_copy(update={"case": "blind", "image": str(run / "gone.nii.gz")})
    make_scores(good, gone, blind, make_case("memory", 0.4)).save(run / "test" / "metrics.json")
    page = Page(write_report(run))
    assert "gone.nii.gz" in page.text
    assert "Outlines without the image" in page.text
    assert "No picture: the scores name no files." in page.text
    assert len(page.attributes("href")) == 3  # one case with pictures
    assert sum(c == "reference" for c in page.attributes("class")) == 6  # two with outlines


def test_planes_go_where_errors_are_densest_and_through_the_centre(tmp_path: Path) -> None:
    reference, prediction = cube(at=(8, 8, 8)), cube(at=(8, 8, 8))
    prediction[14:17, 20:25, 30:35] = 1  # a false positive around (15, 22, 32)
    case = write_case(tmp_path, "c", reference, prediction)
    view = _view(case, through="error")
    assert [plane.caption for plane in view.planes] == [
        "axial, slice 16 of 20",
        "coronal, slice 23 of 30",
        "sagittal, slice 33 of 40",
    ]
    slices = [int(re.findall(r"\d+", p.caption)[0]) for p in _view(case, through="centre").planes]
    assert all(s in (10, 11) for s in slices)
    assert all(p.reference for p in _view(case, through="centre").planes)


def test_planes_of_perfect_and_of_empty_cases(tmp_path: Path) -> None:
    perfect = write_case(tmp_path, "p", cube(at=(3, 3, 3)), cube(at=(3, 3, 3)))
    assert "centre" in _view(perfect, through="error").where
    empty = write_case(tmp_path, "e", cube(at=(3, 3, 3)) * 0, cube(at=(3, 3, 3)) * 0)
    view = _view(empty, through="error")
    assert "nothing is labelled" in view.where
    assert [p.reference + p.prediction for p in view.planes] == ["", "", ""]
    false = write_case(tmp_path, "f", cube(at=(3, 3, 3)) * 0, cube(at=(3, 3, 3)))
    assert "errors" in _view(false, through="centre").where


def test_planes_have_one_scale_and_the_aspect_of_the_spacing(tmp_path: Path) -> None:
    case = write_case(tmp_path, "c", cube(at=(8, 8, 8)), cube(at=(8, 8, 8)))
    axial, coronal, sagittal = (plane.size_mm for plane in _view(case, through="centre").planes)
    # 4 voxels of (2, 1, 1) mm and 12 mm around: 6 slices, 12 rows but only 8 are there, ...
    assert axial == (8 + 4 + 12, 8 + 4 + 12)
    assert coronal == ((6 + 4 + 6) * 2, axial[1])
    assert sagittal == (coronal[0], axial[0])


def test_ignored_voxels_are_outlined_apart(tmp_path: Path) -> None:
    reference, prediction = cube(at=(8, 8, 8)), cube(at=(8, 8, 8))
    reference[8:12, 8:12, 12:16] = 2
    prediction[8:12, 8:12, 12:16] = 1  # right or wrong: it does not count
    case = write_case(tmp_path, "c", reference, prediction)
    view = _view(case, through="error", ignore_label=2)
    assert "centre" in view.where  # there is no error
    axial = view.planes[0]
    assert axial.ignored
    assert axial.reference == axial.prediction


def test_every_axis_order_gives_the_same_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reference, prediction = cube(at=(6, 9, 20)), cube(at=(7, 9, 21))
    grid = Grid(shape=reference.shape, spacing=(2.0, 1.0, 0.5), origin=(10.0, -20.0, 5.0))
    image = rng.normal(size=reference.shape).astype(np.float32)
    arrays_by_role = {"reference": reference, "prediction": prediction, "image": image}

    def view(axes: AxisOrder, name: str) -> object:
        paths = {
            role: str(
                write_volume(Volume(array, grid).reordered(axes), tmp_path / f"{name}{role}.nrrd")
            )
            for role, array in arrays_by_role.items()
        }
        return _view(make_case("c", 0.5, **paths), through="error")

    straight = view(AxisOrder((0, 1, 2), (False, False, False)), "straight")
    orders = list(product(permutations(range(3)), product((False, True), repeat=3)))
    for i in range(1, 48, 7):
        order, flips = orders[i]
        assert view(AxisOrder(order, flips), f"{i}") == straight


def test_the_patients_left_is_at_the_right(tmp_path: Path) -> None:
    case = write_case(tmp_path, "c", cube(at=(8, 8, 8)), cube(at=(8, 8, 8)))
    view = _view(case, through="centre")  # the image grows with x, that is to the patient's left
    axial = _decode(view.planes[0].picture[0], tmp_path)
    assert axial[0, -1] > axial[0, 0]
    assert view.planes[0].letters == ("R", "L", "A", "P")


def test_a_ct_is_shown_in_the_window_of_its_plan(tmp_path: Path) -> None:
    case = write_case(tmp_path, "c", cube(at=(8, 8, 8)), cube(at=(8, 8, 8)))
    grey = _decode(_view(case, through="centre", kind="ct").planes[0].picture[0], tmp_path)
    # Column 0 of the box is voxel 0 with value 0: 1000 of the 1200 HU from black to white.
    assert grey[0, 0] == round(1000 / 1200 * 255)


def _view(case: CaseScore, *, through: str, kind: str = "zscore", ignore_label: int | None = None):
    return view_case(
        case.prediction,
        case.reference,
        image=case.image,
        plan=make_plan(kind=kind),
        ignore_label=ignore_label,
        through=through,
    )


def _decode(uri: str, folder: Path) -> np.ndarray:
    path = folder / "decoded.png"
    path.write_bytes(base64.b64decode(uri.removeprefix("data:image/png;base64,")))
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def test_a_picture_survives_its_encoding(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (17, 23)).astype(np.uint8)
    assert (_decode(png_uri(pixels, window=(0, 255)), tmp_path) == pixels).all()
    clipped = _decode(png_uri(np.array([[-5.0, np.nan, 5.0, 99.0]]), window=(0, 10)), tmp_path)
    assert clipped.tolist() == [[0, 0, 128, 255]]
    assert _decode(png_uri(np.full((2, 2), 7), window=(7, 7)), tmp_path).tolist() == [[0, 0]] * 2


def test_large_slices_are_averaged() -> None:
    small, factor = shrink(np.arange(600 * 300, dtype=np.float64).reshape(600, 300))
    assert (factor, small.shape) == (3, (200, 100))
    assert small[0, 0] == np.mean([0, 1, 2, 300, 301, 302, 600, 601, 602])
    same, factor = shrink(np.zeros((256, 3)))
    assert (factor, same.shape) == (1, (256, 3))


def test_the_outline_of_one_pixel_is_a_diamond_through_its_edges() -> None:
    mask = np.zeros((3, 3), bool)
    mask[1, 1] = True
    path = outline(mask, spacing=(2.0, 1.0))
    corners = {tuple(map(float, p.split(","))) for p in path.strip("MZ").split("L")}
    assert corners == {(1.5, 2.0), (2.0, 3.0), (1.5, 4.0), (1.0, 3.0)}
    assert outline(np.zeros((3, 3), bool), spacing=(1, 1)) == ""


@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_an_outline_encloses_just_the_mask(mask: np.ndarray) -> None:
    loops = [
        np.array([[float(v) for v in p.split(",")] for p in loop.strip(" MZ").split("L")])
        for loop in outline(mask, spacing=(1.0, 1.0)).split("Z")
        if loop.strip()
    ]
    for row, column in np.ndindex(mask.shape):
        x, y = column + 0.5, row + 0.5 + 1e-4  # off the corners' heights
        crossings = 0
        for loop in loops:
            for (x0, y0), (x1, y1) in zip(loop, np.roll(loop, -1, axis=0), strict=True):
                if (y0 > y) != (y1 > y):
                    crossings += x < x0 + (y - y0) / (y1 - y0) * (x1 - x0)
        assert crossings % 2 == mask[row, column]


def test_rates_lie_on_a_logarithmic_axis() -> None:
    columns = {
        "learning_rate": (1e-4, 1e-3, 1e-2),
        "loss": (2.0, 1.0, 3.0),
        "smoothed_loss": (2.0, 1.5, 2.0),
    }
    (chart,) = draw_rates(columns, taken=1e-3)
    first, middle, last = (float(p.split(",")[0]) for p in chart.lines[0].points.split())
    assert (first, last) == (FRAME.left, FRAME.right)
    assert middle == pytest.approx((first + last) / 2)
    assert chart.best is not None
    assert chart.best.at == middle
    (elsewhere,) = draw_rates(columns, taken=1.0)
    assert elsewhere.best is None
    assert draw_rates({}, taken=1e-3) == ()


def test_curves_skip_empty_cells_and_tell_of_what_is_not_finite() -> None:
    loss, dice = draw_curves(
        {
            "epoch": (1.0, 2.0, 3.0),
            "minutes": (2.5, 5.0, 12.0),
            "loss": (1.5, 0.5, float("nan")),
            "validation_dice": (0.0, None, 1.0),
        },
        best_epoch=3,
    )
    assert loss.n_not_finite == 1
    assert loss.lines[0].last == 0.5
    assert dice.lines[0].points == (
        f"{FRAME.left},{FRAME.bottom} {FRAME.right},{FRAME.top}"  # from 0 to 1
    )
    assert [(t.at, t.text) for t in dice.epochs] == [(40, "1"), (294, "2"), (548, "3")]
    assert [t.text for t in dice.minutes] == ["2.5", "5.0", "12"]
    assert dice.best is not None
    assert dice.best.at == FRAME.right
    assert draw_curves({}) == ()


def test_one_epoch_and_a_constant_loss_still_draw() -> None:
    (loss,) = draw_curves({"epoch": (1.0,), "loss": (0.7,)})
    assert loss.lines[0].dots == ((294.0, 118.0),)  # in the middle


def test_many_labels_are_drawn_thin() -> None:
    columns = {f"validation_dice_l{i}": (0.1, 0.2) for i in range(30)}
    (dice,) = draw_curves(columns | {"validation_dice": (0.1, 0.2)})
    assert [line.style for line in dice.lines] == ["thin"] * 30 + ["colour0"]


def test_a_reason_without_a_field_is_shown_all_the_same() -> None:
    plan = make_plan().model_copy(update={"reasons": {"folds": "no patient column"}})
    rows = {choice.name: choice for choice in list_choices(plan)}
    assert rows["folds"].reason == "no patient column"
    assert rows["folds"].value == ""
    assert rows["training minutes"].value == "7.5"
    assert "training epochs" not in rows


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("plan.json", "{", PlanError, "not JSON"),
        ("run.json", "{", CheckpointError, "not JSON"),
        ("run.json", '{"format": 2}', CheckpointError, "format"),
        ("run.json", json.dumps(make_record(minutes="soon")), CheckpointError, "minutes"),
        ("metrics.csv", "epoch,loss\n1,high\n", CheckpointError, "line 2, column loss: 'high'"),
        ("test/metrics.json", "[]", DataError, "metrics.json"),
    ],
)
def test_damage_is_one_line(
    run: Path, name: str, text: str, error: type[EffsegError], message: str
) -> None:
    (run / "test").mkdir()
    (run / name).write_text(text)
    with pytest.raises(error, match=re.escape(message)) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert str(run / name) in str(caught.value)
    assert not (run / "report.html").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="expected") as caught:
            write_report(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_out_names_the_file_and_must_be_writable(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.html"
    assert write_report(run, out=out) == out
    assert not (run / "report.html").exists()
    with pytest.raises(DataError, match="cannot be written"):
        write_report(run, out=tmp_path / "deep")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]


def test_without_jinja2_the_message_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(EffsegError, match=re.escape('pip install "effseg[report]"')):
        write_report(run)


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_real_liver(run: Path, tmp_path: Path, shared: Callable[[str], Path]) -> None:
    chaos = shared("chaos-liver")
    scores = evaluate(
        chaos / "liver_sample_submission.nii.gz",
        chaos / "liver_expert.nii.gz",
        images=chaos / "ct.nii.gz",
        out=run / "test" / "metrics.json",
    )
    path = write_report(run)
    page = Page(path)
    assert f"{scores.mean_dice:.3f} mean Dice on 1 test case" in page.text
    assert len(page.attributes("href")) == 3
    assert path.stat().st_size < 500_000
