"""What a dataset.json declares: labels, channels, how many cases. Read as data, never trusted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effseg.errors import DataError
from effseg.files import read_json

LARGEST_TEXT_BYTES = 16 * 2**20
"""A list of a hundred thousand cases fits in; nothing bigger is a data set's description."""

IGNORE = "ignore"


@dataclass(frozen=True)
class Declared:
    """The fields of a dataset.json that say what the cases hold.

    Attributes:
        channel_names: in the channels' order, or None.
        labels: value to name without the ignore label, or None.
        ignore_label: the value of the label named "ignore", or None.
        n_cases: "numTraining", or None.
    """

    channel_names: tuple[str, ...] | None = None
    labels: dict[int, str] | None = None
    ignore_label: int | None = None
    n_cases: int | None = None


def read_description(path: Path) -> dict[str, Any]:
    """The object in a dataset.json.

    Raises:
        DataError: if it cannot be read, is larger than 16 MiB, is no JSON object, or says one key
            twice; the message names the file.
    """
    if not path.is_file():  # a pipe of that name would never end
        raise DataError(f"{path}: not a regular file; expected a JSON object in a file")
    if (n_bytes := path.stat().st_size) > LARGEST_TEXT_BYTES:
        raise DataError(f"{path}: {n_bytes} bytes; expected at most {LARGEST_TEXT_BYTES}")
    content = read_json(path, error=DataError)
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON {type(content).__name__}; expected an object {{...}}")
    return content


def declared(content: dict[str, Any], path: Path) -> Declared:
    """What `content`, the object read from `path`, declares.

    Raises:
        DataError: if labels or channels are not what nnU-Net or the Decathlon write.
    """
    labels = _labels(content["labels"], path) if "labels" in content else None
    ignore_label = None
    if labels is not None:
        ignored = [value for value, name in labels.items() if name == IGNORE]
        if len(ignored) > 1:
            raise DataError(f'{path}: labels {ignored} are all named "{IGNORE}"; expected one')
        ignore_label = ignored[0] if ignored else None
        labels = {value: name for value, name in labels.items() if name != IGNORE}
        if 0 not in labels:
            raise DataError(f"{path}: no label has the value 0; expected 0 to be the background")
    key = "channel_names" if "channel_names" in content else "modality"
    n_cases = content.get("numTraining")
    return Declared(
        channel_names=_channel_names(content[key], key, path) if key in content else None,
        labels=labels,
        ignore_label=ignore_label,
        n_cases=n_cases if isinstance(n_cases, int) else None,
    )


def _labels(content: Any, path: Path) -> dict[int, str]:
    """Value to name, sorted. nnU-Net writes name to value, the Decathlon value to name."""
    hint = 'expected {"background": 0, "name": 1, ...} or {"0": "background", "1": "name", ...}'
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: labels {_short(content)}; {hint}")
    for name, value in content.items():
        if isinstance(value, list):
            raise DataError(
                f"{path}: label {name!r} is a region, {_short(value)}; regions of several labels "
                "are not supported: declare one number a name"
            )
    names_first = all(_is_number(value) for value in content.values()) and not (
        all(_is_number(key) for key in content)
        and all(isinstance(value, str) for value in content.values())
    )
    pairs = [(v, k) if names_first else (k, v) for k, v in content.items()]
    labels: dict[int, str] = {}
    for value, name in pairs:
        if not _is_number(value) or not isinstance(name, str):
            raise DataError(f"{path}: labels {_short(content)}; {hint}")
        if int(value) in labels:
            raise DataError(
                f"{path}: labels {labels[int(value)]!r} and {name!r} both have the value "
                f"{int(value)}; expected one name a value"
            )
        labels[int(value)] = name
    return dict(sorted(labels.items()))


def _channel_names(content: Any, key: str, path: Path) -> tuple[str, ...]:
    hint = 'expected {"0": "CT", "1": ...}, numbered from 0 without gaps'
    if not isinstance(content, dict) or not all(
        _is_number(number) and isinstance(name, str) for number, name in content.items()
    ):
        raise DataError(f"{path}: {key} {_short(content)}; {hint}")
    names = {int(number): name for number, name in content.items()}
    if not names or sorted(names) != list(range(len(content))):
        raise DataError(f"{path}: {key} numbered {sorted(names)}; {hint}")
    return tuple(names[number] for number in sorted(names))


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() and value.isdigit() and len(value) <= 10
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
