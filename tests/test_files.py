"""Text files: whole, and refused by name."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from effseg.errors import DataError, PlanError
from effseg.files import load_model, read_json, write_text_whole


class Numbers(BaseModel):
    """As a file may hold them."""

    model_config = ConfigDict(extra="forbid")

    first: int
    second: int = 0


def load(path: Path) -> Numbers:
    return load_model(Numbers, path, error=PlanError, what="numbers", hint="write some")


def test_a_model_comes_back_from_its_file(tmp_path: Path) -> None:
    path = write_text_whole(tmp_path / "deep" / "n.json", '\ufeff{"first": 1}')
    assert load(path) == Numbers(first=1)
    assert [entry.name for entry in path.parent.iterdir()] == ["n.json"]


def test_a_file_that_is_not_there_has_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"n.json: no such numbers; write some$"):
        load(tmp_path / "n.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON: .* in line 1, column 2"),
        ('{"first": 1, "first": 2}', "the key 'first' stands in it twice"),
        ("[" * 200_000, "JSON that cannot be used"),
        ("\udcff", "cannot be read as text"),
        ("[]", "numbers: "),
        ("{}", "first: Field required"),
        ('{"first": "one"}', "first: .* got 'one'$"),
        ('{"first": 1, "a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1}', "e: .*; and 1 more$"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_file_and_place(tmp_path: Path, text, words) -> None:
    path = tmp_path / "n.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(PlanError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as text"):
        read_json(tmp_path, error=DataError)
    with pytest.raises(DataError, match="cannot be written"):
        write_text_whole(tmp_path, "x")
