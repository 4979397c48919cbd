"""Files that appear under their name whole or not at all, and JSON that is refused by name."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from effseg.errors import DataError, EffsegError

Model = TypeVar("Model", bound=BaseModel)

MOST_PLACES = 5
"""Of a document's mistakes, named in one message."""


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to; once the block ends well, what is there takes its place under `path`.

    Missing folders are made. The file is forced to the disk before it gets its name, so a crash or
    a power cut leaves the old file or the new one. A link keeps pointing: what is behind it is
    replaced. If the block fails, nothing is left behind and what was there before stays. It may be
    a folder too; one that was there before has another name, hidden, while the new one is put in
    its place.

    Raises:
        OSError: if the folder cannot be made or the file cannot be put in place.
    """
    target = Path(os.path.realpath(path))
    partial = target.parent / f".{secrets.token_hex(6)}.partial"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        put_in_place(partial, target)
    finally:
        with suppress(OSError):
            remove(partial)


def remove(path: Path) -> None:
    """Take away a file, or a folder and all in it; neither need be there.

    Raises:
        OSError: if it cannot be done.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(partial: Path, target: Path) -> None:
    """Give a finished file or folder, forced to the disk, its name; both names are of one folder.

    Raises:
        OSError: if it cannot be done; what was there before stays then.
    """
    if partial.is_dir():
        for inside in partial.rglob("*"):
            sync(inside)
    sync(partial)
    if partial.is_dir() and target.exists():
        _exchange(partial, target)
    else:
        partial.replace(target)
    if os.name == "posix":  # make the new name last, too, where the system can
        sync(target.parent)


def sync(path: Path) -> None:
    """Bring what lies in a file, or the names in a folder, to the disk.

    Raises:
        OSError: if it cannot be done.
    """
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(partial: Path, target: Path) -> None:
    """Put a folder in another's place: no system call of all systems does it at once."""
    before = target.with_name(f".{secrets.token_hex(6)}.before")
    target.replace(before)
    try:
        partial.replace(target)
    except OSError:
        before.replace(target)
        raise
    shutil.rmtree(before)


def write_text_whole(path: str | Path, text: str) -> Path:
    """Write a text file as `written_whole` does; what UTF-8 cannot hold becomes `?`.

    Raises:
        DataError: if it cannot be written.
    """
    path = Path(path)
    try:
        with written_whole(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def read_json(path: Path, *, error: type[EffsegError]) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        error: what to raise.

    Raises:
        EffsegError: `error`, if the file cannot be read, is no JSON, or says one key twice; the
            message names the file and the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_key_twice)
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path}: cannot be read as text ({cause})") from cause
    except json.JSONDecodeError as cause:
        raise error(
            f"{path}: not JSON: {cause.msg} in line {cause.lineno}, column {cause.colno}"
        ) from cause
    except (RecursionError, ValueError) as cause:
        raise error(f"{path}: JSON that cannot be used ({cause})") from cause


def load_model(
    kind: type[Model], path: str | Path, *, error: type[EffsegError], what: str, hint: str
) -> Model:
    """What a JSON file holds, as a model.

    Args:
        kind: of the model.
        path: of the file.
        error: what to raise.
        what: the model's name in a message.
        hint: the next step where there is no such file.

    Raises:
        EffsegError: `error`, as `read_json`, and if the content is not what the model allows; the
            message names the file and each place in it.
    """
    path = Path(path)
    if not path.exists():
        raise error(f"{path}: no such {what}; {hint}")
    try:
        return kind.model_validate(read_json(path, error=error))
    except ValidationError as cause:
        raise error(f"{path}: {name_places(cause, what=what, kind=kind)}") from cause


def name_places(error: ValidationError, *, what: str, kind: type[BaseModel] | None = None) -> str:
    """What a model refused and where, in one line.

    Args:
        error: as the model raised it.
        what: the model's name, where the whole is meant.
        kind: the model; the keys of it and of its parts are offered for those it does not know.
    """
    named = []
    for entry in error.errors()[:MOST_PLACES]:
        said, given = entry["msg"].removeprefix("Value error, "), entry.get("input")
        if entry["type"] == "extra_forbidden":
            said = "no such key" + _did_you_mean(entry["loc"], kind)
        keys = _keys(entry["loc"], kind)
        if entry["type"] == "union_tag_invalid":
            keys.append("kind")
            said, given = f"expected one of {entry['ctx']['expected_tags']}", given["kind"]
        place = ".".join(keys) or what
        named.append(f"{place}: {said}{_got(given)}")
    more = error.error_count() - len(named)
    return "; ".join(named) + (f"; and {more} more" if more > 0 else "")


def _keys(place: tuple[int | str, ...], kind: type[BaseModel] | None) -> list[str]:
    """A place as it is found in the document: without what tells one of several models."""
    return [str(part) for part, is_key in _walk(place, kind)[0] if is_key]


def _did_you_mean(place: tuple[int | str, ...], kind: type[BaseModel] | None) -> str:
    """The key most like the last of a place, among those that the model there has."""
    _, models = _walk(place[:-1], kind)
    known = models[0].model_fields if len(models) == 1 else ()
    near = get_close_matches(str(place[-1]), known, n=1)
    return f", did you mean {near[0]}" if near else ""


def _walk(
    place: tuple[int | str, ...], kind: type[BaseModel] | None
) -> tuple[list[tuple[int | str, bool]], list[type[BaseModel]]]:
    """Follow a place into a model: which parts of it are keys, and the models that may be there.

    Where one of several models may stand pydantic names the `kind` of the one that did, after the
    key.
    """
    parts: list[tuple[int | str, bool]] = []
    models = [] if kind is None else [kind]
    for part in place:
        told = [model for model in models if len(models) > 1 and _kind_of(model) == part]
        parts.append((part, not told))
        if told:
            models = told
        elif isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = _models_in(fields[0].annotation) if fields else []
    return parts, models


def _kind_of(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return None if field is None else next(iter(get_args(field.annotation)), None)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation such as `tuple[Label, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _got(value: Any) -> str:
    text = repr(value)
    return f", got {text}" if len(text) <= 60 else ""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands in it twice")
    return content
