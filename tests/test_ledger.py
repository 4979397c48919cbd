"""The table of runs: what a line says, and that nobody's cells are lost."""

import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from effseg.errors import CheckpointError, DataError
from effseg.evaluation import CaseScore, LabelScore, Scores
from effseg.ledger import RUNS, add_run, list_changes, note_run, read_line
from effseg.ledger.lines import FIRST, SAME
from effseg.ledger.table import COLUMNS, RunTable, put_line
from effseg.plans import Plan
from effseg.record import PLAN, RECORD, SCORES, VALIDATION, RunMemory, RunRecord

MIB = 2**20


def put_run(
    folder: Path, plan: Plan, *, hour: int, scores: tuple[float | None, ...] = (), **changes: object
) -> Path:
    """A run folder as training leaves it, begun at an hour of one day."""
    record = RunRecord(
        format=1,
        effseg="0.1.0",
        dataset="/data/lungs",
        fold=0,
        train=("a", "b"),
        validation=("c", "d"),
        started=datetime(2026, 11, 22, hour),
        minutes=12.34,
        steps=600,
        best_score=0.5,
        stopped_by="minutes",
        memory=RunMemory(
            budget_bytes=1024 * MIB, predicted_peak_bytes=500 * MIB, measured_peak_bytes=510 * MIB
        ),
    )
    plan.save(folder / PLAN)
    record.model_copy(update=changes).save(folder / RECORD)
    if scores:
        cases = tuple(_case(f"case_{i}", dice) for i, dice in enumerate(scores))
        found = Scores(tolerance_mm=1.0, ignore_label=None, conventions="", cases=cases)
        found.save(folder / VALIDATION / SCORES)
    return folder


def _case(name: str, dice: float | None) -> CaseScore:
    rest = dict.fromkeys(LabelScore.model_fields)
    known = {"label": 1, "name": "core", "reference_mm3": 1.0, "prediction_mm3": 1.0, "dice": dice}
    return CaseScore(case=name, labels=(LabelScore(**(rest | known)),), lesions=())


def read_lines(folder: Path) -> list[dict[str, str]]:
    with (folder / RUNS).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def with_training(plan: Plan, **changes: object) -> Plan:
    return plan.model_copy(update={"training": plan.training.model_copy(update=changes)})


def test_a_line_says_what_changed_what_came_of_it_and_what_it_took(
    tiny_plan: Plan, tmp_path: Path
) -> None:
    add_run(put_run(tmp_path / "first", tiny_plan, hour=1))
    changed = with_training(tiny_plan, seed=7, foreground=0.25)
    add_run(put_run(tmp_path / "second", changed, hour=2, scores=(0.7, 0.8, None, 0.9), fold=1))
    first, second = read_lines(tmp_path)
    assert (first["run"], first["parent"], first["changes"]) == ("first", "", FIRST)
    assert (first["score"], first["score_of"]) == ("0.5000", "best Dice of validation patches")
    assert second["parent"] == "first"
    assert second["changes"] == "fold 0 -> 1; training.foreground 0.5 -> 0.25; training.seed 0 -> 7"
    assert (second["score"], second["score_of"]) == ("0.8000", "mean Dice of 3 validation cases")
    assert 0.7 <= float(second["score_low"]) < 0.8 < float(second["score_high"]) <= 0.9
    assert [second[name] for name in ("minutes", "steps", "data")] == ["12.3", "600", "lungs"]
    memory = [second[name] for name in ("peak_mib", "predicted_mib", "budget_mib")]
    assert memory == ["510", "500", "1024"]
    assert second["conclusion"] == ""


def test_the_parent_is_the_newest_earlier_run_on_the_same_data(
    tiny_plan: Plan, tmp_path: Path
) -> None:
    for name, hour, dataset in (
        ("old", 1, "/data/lungs"),
        ("near", 3, "/data/lungs"),
        ("other", 4, "/data/livers"),
        ("later", 9, "/data/lungs"),
    ):
        put_run(tmp_path / name, tiny_plan, hour=hour, dataset=dataset)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / RECORD).write_text("{")
    run = put_run(tmp_path / "run", tiny_plan, hour=5)
    add_run(run)
    assert [(line["parent"], line["changes"]) for line in read_lines(tmp_path)] == [("near", SAME)]
    add_run(run, parent=tmp_path / "old")
    assert read_lines(tmp_path)[0]["parent"] == "old"
    add_run(run)  # the next time, it is still held against the one that was named
    assert [line["parent"] for line in read_lines(tmp_path)] == ["old"]


def test_a_line_outlives_its_parent_and_a_folder_elsewhere_is_named_by_its_way(
    tiny_plan: Plan, tmp_path: Path
) -> None:
    parent = put_run(tmp_path / "archive" / "a", with_training(tiny_plan, seed=3), hour=1)
    run = put_run(tmp_path / "runs" / "b", tiny_plan, hour=2)
    add_run(run, parent=parent)
    told = read_lines(tmp_path / "runs")[0]
    assert (told["parent"], told["changes"]) == ("../archive/a", "training.seed 3 -> 0")
    (parent / PLAN).unlink()
    add_run(run)
    assert read_lines(tmp_path / "runs")[0] == told


def test_a_parent_that_cannot_be_read_costs_no_line(tiny_plan: Plan, tmp_path: Path) -> None:
    parent = put_run(tmp_path / "a", tiny_plan, hour=1)
    (parent / PLAN).write_text('{"format": 2}')
    add_run(put_run(tmp_path / "b", tiny_plan, hour=2, best_score=-1.0))
    (line,) = read_lines(tmp_path)
    assert line["changes"].startswith("cannot be told: ")
    assert (line["score"], line["minutes"]) == ("", "12.3")


def test_what_a_person_wrote_stays(tiny_plan: Plan, tmp_path: Path) -> None:
    run = put_run(tmp_path / "a", tiny_plan, hour=1)
    table = tmp_path / RUNS
    # as a spreadsheet leaves it: a mark, semicolons, its own dates, columns in another order
    table.write_text(
        "\ufeffconclusion;my notes;run;started;score\n"
        '"keep; it\nhelps";two ""quotes"";a;22.11.26 01:00;0,1\n'
        ";;;;\n"
        "written by hand;;z;;;beside the table\n",
        encoding="utf-8",
    )
    add_run(run)
    add_run(put_run(tmp_path / "b", tiny_plan, hour=2))
    found = RunTable.read(table)
    assert table.read_text(encoding="utf-8").startswith("\ufeffconclusion;my notes;run;")
    rows = [dict(zip(found.header, row, strict=False)) for row in found.rows]
    assert [row["run"] for row in rows] == ["a", "", "z", "b"]
    assert rows[0]["conclusion"] == "keep; it\nhelps"
    assert rows[0]["my notes"] == 'two ""quotes""'
    assert rows[0]["score"] == "0.5000"
    assert rows[2]["conclusion"] == "written by hand"
    assert found.rows[2][-1] == "beside the table"
    assert rows[3]["changes"] == SAME
    assert set(COLUMNS) <= set(found.header)
    assert read_line(run) == rows[0]


def test_a_new_run_of_an_old_name_takes_nobodys_conclusion(tiny_plan: Plan, tmp_path: Path) -> None:
    run = put_run(tmp_path / "a", tiny_plan, hour=1)
    add_run(run)
    table = RunTable.read(tmp_path / RUNS)
    table.rows[0][table.header.index("conclusion")] = "no good"
    table.save(tmp_path / RUNS)
    put_run(tmp_path / "a", tiny_plan, hour=2)
    add_run(run)
    assert [line["conclusion"] for line in read_lines(tmp_path)] == ["no good", ""]


@pytest.mark.parametrize("content", [b"x,y\n1,2\n", b"\xff\xfe\x00", b"run\n1\n"])
def test_a_file_that_is_no_table_is_left_alone(
    tiny_plan: Plan, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / RUNS).write_bytes(content)
    run = put_run(tmp_path / "a", tiny_plan, hour=1)
    with pytest.raises(DataError, match=r"runs.csv") as caught:
        add_run(run)
    assert "\n" not in str(caught.value)
    note_run(run)
    assert "no line in the table of runs" in caplog.text
    assert (tmp_path / RUNS).read_bytes() == content
    assert read_line(run) is None


def test_a_parent_must_be_a_run(tiny_plan: Plan, tmp_path: Path) -> None:
    run = put_run(tmp_path / "a", tiny_plan, hour=1)
    with pytest.raises(CheckpointError, match=r"nowhere: no plan.json, so it is no run"):
        add_run(run, parent=tmp_path / "nowhere")
    assert not (tmp_path / RUNS).exists()


def test_runs_that_end_at_once_all_have_a_line(tmp_path: Path) -> None:
    names = [f"run_{i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:  # the lock is between open files, threads or processes
        list(pool.map(lambda name: put_line(tmp_path / RUNS, {"run": name}), names))
    assert sorted(line["run"] for line in read_lines(tmp_path)) == sorted(names)


def test_a_table_that_stays_locked_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effseg.ledger import table

    monkeypatch.setattr(table, "LOCK_SECONDS", 0.05)
    code = (
        "import sys, time\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    path = str(tmp_path / f".{RUNS}.lock")
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(DataError, match="another process has held it"):
                put_line(tmp_path / RUNS, {"run": "a"})
        finally:
            holder.kill()


def test_changes_are_said_by_the_names_in_the_plan(tiny_plan: Plan) -> None:
    content = json.loads(tiny_plan.model_dump_json())
    content["memory"] |= {"budget_bytes": 2**31, "peak_bytes": 7}
    content["labels"][1]["name"] = "shell"
    content["network"]["norm"] = "batch"
    content["policies"] = {f"encoder.{i}": "recompute" for i in range(4)}
    changed = Plan.model_validate(content)
    said = list_changes((tiny_plan, None), (changed, None))
    assert "memory.budget_bytes 1.00 GiB -> 2.00 GiB" in said
    assert f"network.norm {tiny_plan.network.norm} -> batch" in said
    assert "policies of 4 stages" in said
    assert "labels.shell.value - -> 1" in said
    assert not any("peak_bytes" in phrase for phrase in said)
    assert list_changes((tiny_plan, None), (tiny_plan, None)) == ()


def test_a_data_set_that_grew_is_told_in_cases(tiny_plan: Plan, tmp_path: Path) -> None:
    runs = [
        put_run(tmp_path / "a", tiny_plan, hour=1),
        put_run(tmp_path / "b", tiny_plan, hour=2, train=("b", "e", "f"), torch="2.13.0"),
    ]
    pairs = [(Plan.load(run / PLAN), RunRecord.load(run / RECORD)) for run in runs]
    assert list_changes(*pairs) == ("training cases +2 -1",)


def test_training_and_validation_write_the_line(tiny_run: Path) -> None:
    line = read_line(tiny_run)
    assert line is not None
    assert line["run"] == tiny_run.name
    scores = Scores.load(tiny_run / VALIDATION / SCORES)
    assert float(line["score"]) == pytest.approx(scores.mean_dice, abs=1e-4)
    assert line["score_of"] == f"mean Dice of {len(scores.cases)} validation cases"
    assert line["stopped_by"] == "epochs"
