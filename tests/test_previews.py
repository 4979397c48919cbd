"""What augmentation does to a patch, drawn in the report."""

import base64
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from effseg.plans import CHANGES, AugmentConfig, Plan
from effseg.record import RunRecord
from effseg.report import write_report
from effseg.report.previews import Row, Tile, preview_augmentation


def record_of(dataset: Path, *train: str) -> RunRecord:
    return RunRecord(
        format=1, effseg="0.1.0", dataset=str(dataset), train=train, validation=("ball_5",)
    )


def with_augment(plan: Plan, **changes: object) -> Plan:
    training = plan.training.model_copy(update={"augment": AugmentConfig(**changes)})
    return plan.model_copy(update={"training": training})


@pytest.fixture(scope="module")
def rows(tiny_plan: Plan, tiny_dataset: Path) -> dict[str, Row]:
    shown = preview_augmentation(
        with_augment(tiny_plan, policy="light", ignore_outside=True, scale=(0.5, 0.6)),
        record_of(tiny_dataset, "ball_2"),
    )
    assert shown.problem == ""
    assert shown.case == "ball_2"
    return {row.name: row for row in shown.rows} | {"before": Row("", "", (shown.before,))}


def pixels(tile: Tile, folder: Path) -> np.ndarray:
    path = folder / "tile.png"
    path.write_bytes(base64.b64decode(tile.picture.removeprefix("data:image/png;base64,")))
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).astype(float)


def test_each_transform_and_each_policy_has_a_row(rows: dict[str, Row]) -> None:
    policies = ["policy light", "policy default", "policy strong", "this run", "before"]
    assert list(rows) == [change.replace("_", " ") for change in CHANGES] + policies
    assert rows["gamma"].chance == "10% of patches"
    assert rows["blur"].chance == "never"
    for name, row in rows.items():
        assert row.tiles, name
        assert len(set(row.tiles)) == len(row.tiles)


def test_before_and_after_differ_as_the_transform_says(
    rows: dict[str, Row], tmp_path: Path
) -> None:
    (before,) = rows["before"].tiles
    assert before.label
    (flipped,) = rows["flip"].tiles  # along x alone
    assert np.array_equal(pixels(flipped, tmp_path), pixels(before, tmp_path)[:, ::-1])
    for name in ("gamma", "noise", "blur", "contrast", "brightness", "low resolution"):
        for tile in rows[name].tiles:
            assert tile.label == before.label
            assert tile.picture != before.picture
    blurred, noisy = (pixels(rows[name].tiles[0], tmp_path) for name in ("blur", "noise"))
    grain = [np.abs(np.diff(p)).mean() for p in (blurred, pixels(before, tmp_path), noisy)]
    assert grain == sorted(grain)


def test_what_came_in_from_outside_has_an_outline_of_its_own(rows: dict[str, Row]) -> None:
    assert all(tile.ignored for tile in rows["affine"].tiles)  # shrunk to 0.6 at most
    assert not any(tile.ignored for tile in rows["gamma"].tiles)


def test_the_page_holds_the_patch_once_and_stays_small(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    tiny_plan.save(tmp_path / "plan.json")
    record = record_of(tiny_dataset, "ball_0").model_dump_json()
    (tmp_path / "run.json").write_text(record)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    shown = preview_augmentation(tiny_plan, RunRecord.load(tmp_path / "run.json"))
    assert page.count(shown.before.picture) == 1
    assert page.count('href="#patch-before"') >= len(shown.rows) - 1
    assert all(tile.picture in page for row in shown.rows for tile in row.tiles)
    n_tiles = 1 + sum(len(row.tiles) for row in shown.rows)
    assert n_tiles <= 27
    assert max(len(t.picture) for row in shown.rows for t in row.tiles) < 16 * 1024


def test_data_that_are_gone_leave_a_sentence(
    tiny_plan: Plan, tiny_dataset: Path, tmp_path: Path
) -> None:
    gone = preview_augmentation(tiny_plan, record_of(tmp_path / "gone", "a"))
    assert "gone" in gone.problem
    other = preview_augmentation(tiny_plan, record_of(tiny_dataset, "ball_99"))
    assert "holds no case ball_99 any more" in other.problem
    assert "has ended" in preview_augmentation(tiny_plan, None).problem
    tiny_plan.save(tmp_path / "plan.json")
    (tmp_path / "run.json").write_text(record_of(tmp_path / "gone", "a").model_dump_json())
    assert gone.problem.split(":")[0] in write_report(tmp_path).read_text(encoding="utf-8")
