"""How data sets lie on disk, found out by looking: nothing is renamed, nothing is configured.

| layout  | known by                                                                           |
|---------|------------------------------------------------------------------------------------|
| nnunet  | `dataset.json`, `imagesTr/{case}_0000{file_ending}`, `labelsTr/{case}{file_ending}` |
| msd     | `dataset.json` with `"training": [{"image": ..., "label": ...}]`                   |
| folders | `images/` and `labels/` with equal names; a `dataset.json` beside them is honoured |
| csv     | a file with the columns `image,label` and, where wanted, `patient`, `name`         |
"""

import csv
import os.path
from collections import defaultdict
from pathlib import Path
from typing import Any

from effseg.dataset.cases import Case, Dataset, case_and_channel, some
from effseg.dataset.declared import LARGEST_TEXT_BYTES, Declared, declared, read_description
from effseg.errors import DataError
from effseg.io import VOLUME_SUFFIXES, is_volume, list_volumes, strip_suffix

LAYOUTS = (
    "expected dataset.json with imagesTr/ and labelsTr/ (nnU-Net v2 raw), dataset.json with a "
    '"training" list (Decathlon), images/ and labels/ with equal names, '
    "or the path of a .csv with the columns image,label"
)
CSV_COLUMNS = ("image", "label", "patient", "name")


def read_dataset(path: str | Path) -> Dataset:
    """Find out how a data set lies and list its labelled cases; no volume is opened.

    Args:
        path: a folder, or a .csv whose paths are relative to itself or absolute.

    Raises:
        DataError: if there is no data set of a known layout, a partner or a channel is missing, or
            a description cannot be used; the message names the place and up to five files.
    """
    path = Path(path)
    try:
        return _read(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror})") from error


def _read(path: Path) -> Dataset:
    if path.suffix.lower() == ".csv" and path.is_file():
        return _read_csv(path)
    if not path.is_dir():
        what = "a file, no data set" if path.exists() else "no such folder or file"
        raise DataError(f"{path}: {what}; {LAYOUTS}")
    description = path / "dataset.json"
    content = read_description(description) if description.exists() else None
    if content is not None and "training" in content and "file_ending" not in content:
        return _read_msd(path, content)
    if all((path / name).is_dir() for name in ("images", "labels")):
        facts = declared(content, description) if content is not None else Declared()
        return _read_folders(path, facts)
    if content is not None and ("dataset" in content or (path / "labelsTr").is_dir()):
        return _read_nnunet(path, content)
    entries = sorted(entry.name for entry in path.iterdir())
    raise DataError(f"{path}: no known layout, found {some(entries) or 'nothing'}; {LAYOUTS}")


def _read_nnunet(root: Path, content: dict[str, Any]) -> Dataset:
    description = root / "dataset.json"
    facts = declared(content, description)
    if facts.channel_names is None or facts.labels is None:
        lacks = "labels" if facts.labels is None else "channel_names"
        raise DataError(f"{description}: no {lacks}; nnU-Net's raw layout declares them")
    if "dataset" in content:
        return _dataset(root, "nnunet", _listed(root, _entries_nnunet(content, root)), facts)
    ending = content.get("file_ending")
    if not isinstance(ending, str) or ending not in VOLUME_SUFFIXES:
        raise DataError(
            f"{description}: file_ending {ending!r}; expected one of {', '.join(VOLUME_SUFFIXES)}"
        )
    labels = {file.name[: -len(ending)]: file for file in _files(root / "labelsTr", ending)}
    images: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in _files(root / "imagesTr", ending):
        name, channel = case_and_channel(file.name[: -len(ending)])
        if channel is None:
            raise DataError(
                f"{file}: no channel in the name; expected {{case}}_0000{ending}, "
                "as nnU-Net's raw layout has it"
            )
        images[name][channel] = file
    _all_paired(root, "imagesTr/", set(images), "labelsTr/", set(labels))
    _all_channels(root / "imagesTr", images, n_channels=len(facts.channel_names))
    cases = [
        Case(name=name, images=_in_order(images[name]), label=labels[name])
        for name in sorted(labels)
    ]
    return _dataset(root, "nnunet", cases, facts)


def _entries_nnunet(content: dict[str, Any], root: Path) -> list[tuple[str | None, Any, Any]]:
    entries = content["dataset"]
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise DataError(
            f'{root / "dataset.json"}: "dataset" is no object of '
            '{"case": {"images": [...], "label": ...}}'
        )
    return [(name, entry.get("images"), entry.get("label")) for name, entry in entries.items()]


def _read_msd(root: Path, content: dict[str, Any]) -> Dataset:
    description = root / "dataset.json"
    entries = content["training"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f'{description}: "training" is no list of {{"image": ..., "label": ...}} objects'
        )
    listed: list[tuple[str | None, Any, Any]] = [
        (None, entry.get("image"), entry.get("label")) for entry in entries
    ]
    return _dataset(root, "msd", _listed(root, listed), declared(content, description))


def _listed(root: Path, entries: list[tuple[str | None, Any, Any]]) -> list[Case]:
    """The cases of (name, image or images, label) as a dataset.json lists them."""
    given: list[str | None] = []
    firsts: list[Path] = []
    files: list[tuple[tuple[Path, ...], Path]] = []
    missing: list[str] = []
    for name, image, label in entries:
        listed = image if isinstance(image, list) and image else [image]
        images = tuple(_inside(root, entry) for entry in listed)
        label_file = _inside(root, label)
        if any(file.name.startswith(".") for file in (*images, label_file)):
            continue  # what macOS leaves beside a file when it packs an archive
        given.append(name)
        firsts.append(images[0])
        if len(images) == 1 and not is_volume(images[0]):
            images = _split_channels(images[0]) or images
        missing += [
            str(file.relative_to(root)) for file in (*images, label_file) if not is_volume(file)
        ]
        files.append((images, label_file))
    if missing:
        raise DataError(
            f"{root / 'dataset.json'}: {len(missing)} listed files are not there: {some(missing)}; "
            "put them back or take their cases off the list"
        )
    return [
        Case(name=derived if name is None else name, images=images, label=label)
        for name, derived, (images, label) in zip(given, _case_names(firsts), files, strict=True)
    ]


def _split_channels(image: Path) -> tuple[Path, ...]:
    """The files `x_0000.nii.gz`, ... where a list says `x.nii.gz`: nnU-Net v1 lies so."""
    stem = strip_suffix(image)
    ending = image.name.removeprefix(stem)
    channels: list[Path] = []
    while is_volume(file := image.with_name(f"{stem}_{len(channels):04d}{ending}")):
        channels.append(file)
    return tuple(channels)


def _inside(root: Path, entry: Any) -> Path:
    """The file of a list's entry; by its words alone, so that links may lead where they like."""
    description = root / "dataset.json"
    if not isinstance(entry, str) or not entry or "\0" in entry:
        raise DataError(f"{description}: entry {entry!r}; expected the path of a file")
    normal = os.path.normpath(entry)
    if Path(normal).is_absolute() or Path(normal).parts[:1] in ((), ("..",)):
        raise DataError(
            f"{description}: entry {entry!r} leads out of {root}; expected a path inside the folder"
        )
    return root / normal


def _read_folders(root: Path, facts: Declared) -> Dataset:
    labels = _by_stem(root / "labels")
    images: dict[str, Path | dict[int, Path]] = {}
    split: dict[str, dict[int, Path]] = defaultdict(dict)
    for stem, file in _by_stem(root / "images").items():
        name, channel = case_and_channel(stem)
        if stem not in labels and channel is not None and name in labels:
            split[name][channel] = file
        else:
            images[stem] = file
    both = sorted(images.keys() & split.keys())
    if both:
        raise DataError(
            f"{root / 'images'}: {some(both)} as one file and as channels _0000, ...; keep one"
        )
    _all_paired(root, "images/", images.keys() | split.keys(), "labels/", set(labels))
    n_channels = len(facts.channel_names or ()) or max(map(len, split.values()), default=1)
    _all_channels(root / "images", split, n_channels=n_channels)
    images |= split
    cases = []
    for name in sorted(labels):
        files = images[name]
        channels = _in_order(files) if isinstance(files, dict) else (files,)
        cases.append(Case(name=name, images=channels, label=labels[name]))
    return _dataset(root, "folders", cases, facts)


def _read_csv(path: Path) -> Dataset:
    if (n_bytes := path.stat().st_size) > LARGEST_TEXT_BYTES:
        raise DataError(f"{path}: {n_bytes} bytes; expected at most {LARGEST_TEXT_BYTES}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a comma-separated table ({error})") from error
    known = all(column in CSV_COLUMNS for column in columns) and len(set(columns)) == len(columns)
    if not known or not {"image", "label"} <= set(columns):
        # A misspelt "patient" would put one patient on both sides of a fold: nothing is guessed.
        raise DataError(
            f"{path}: columns {', '.join(map(repr, columns)) or 'none'}; expected image,label and, "
            "where wanted, patient and name, separated by commas"
        )
    missing: list[str] = []
    for line, row in rows:
        if None in row or not (row["image"] and row["label"]):
            raise DataError(
                f"{path}: line {line} has no {'label' if row['image'] else 'image'}, "
                f"or more than its {len(columns)} columns; expected one case a line"
            )
        missing += [
            f"{row[key]} (line {line})"
            for key in ("image", "label")
            if not (path.parent / row[key]).exists()
        ]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} files are not there: {some(missing)}; "
            "paths are relative to the .csv"
        )
    derived = _case_names([path.parent / row["image"] for _, row in rows])
    cases = [
        Case(
            name=row.get("name") or name,
            images=(path.parent / row["image"],),
            label=path.parent / row["label"],
            patient=row.get("patient") or None,
        )
        for (_, row), name in zip(rows, derived, strict=True)
    ]
    return Dataset(name=path.stem, root=path, layout="csv", cases=tuple(cases))


def _dataset(root: Path, layout: str, cases: list[Case], facts: Declared) -> Dataset:
    return Dataset(
        name=root.resolve().name,
        root=root,
        layout=layout,
        cases=tuple(cases),
        channel_names=facts.channel_names,
        labels=facts.labels,
        ignore_label=facts.ignore_label,
        n_declared=facts.n_cases,
    )


def _case_names(files: list[Path]) -> list[str]:
    """The files' names without suffix, led by as many folders as it takes to tell them apart."""
    names = [strip_suffix(file) for file in files]
    deepest = max((len(file.parts) for file in files), default=0)
    for depth in range(1, deepest):
        if len(set(names)) == len(names):
            break
        names = [
            "_".join([*file.relative_to(file.anchor).parent.parts[-depth:], strip_suffix(file)])
            for file in files
        ]
    return names


def _files(folder: Path, *endings: str) -> list[Path]:
    """The volumes of a folder that end so, sorted; at least one."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {LAYOUTS}")
    files = [file for file in list_volumes(folder) if file.name.lower().endswith(endings)]
    if not files:
        raise DataError(
            f"{folder}: no volume in it; expected files that end in {', '.join(endings)}"
        )
    return files


def _by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in _files(folder, *VOLUME_SUFFIXES):
        other = files.setdefault(strip_suffix(file), file)
        if other != file:
            raise DataError(f"{folder}: {other.name} and {file.name} are one name; keep one")
    return files


def _in_order(channels: dict[int, Path]) -> tuple[Path, ...]:
    return tuple(channels[number] for number in sorted(channels))


def _all_paired(
    root: Path, image_folder: str, images: set[str], label_folder: str, labels: set[str]
) -> None:
    parts = []
    if without_label := sorted(images - labels):
        parts.append(f"{len(without_label)} without a label in {label_folder}: ")
        parts[-1] += some(without_label)
    if without_image := sorted(labels - images):
        parts.append(f"{len(without_image)} without an image in {image_folder}: ")
        parts[-1] += some(without_image)
    if parts:
        raise DataError(f"{root}: {'; '.join(parts)}; add the partners or move these files away")


def _all_channels(folder: Path, cases: dict[str, dict[int, Path]], *, n_channels: int) -> None:
    expected = set(range(n_channels))
    wrong = [
        f"{name} has {', '.join(f'_{number:04d}' for number in sorted(channels))}"
        for name, channels in sorted(cases.items())
        if set(channels) != expected
    ]
    if wrong:
        last = f" to _{n_channels - 1:04d}" if n_channels > 1 else ""
        raise DataError(
            f"{folder}: {len(wrong)} cases without exactly the channels _0000{last}: {some(wrong)}"
        )
