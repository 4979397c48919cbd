"""The audit of a data set: every case read once, everything that is wrong said in one line each."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from effseg.dataset.cases import Case, Dataset, read_image, read_label, some
from effseg.errors import EffsegError
from effseg.types import Array
from effseg.volume import Volume

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        case: the case's name; None for the data set as a whole.
        severity: an error must be mended before training, a warning should be looked at.
        what: what was found, what was expected, and the next step, in one line.
    """

    case: str | None
    severity: Severity
    what: str


@dataclass(frozen=True)
class AuditReport:
    """What the audit of a data set found.

    Attributes:
        dataset: its name.
        n_cases: how many cases were looked at.
        findings: of the cases in their order, those of the whole data set last.
        labels: label values found, ascending, with their voxels over all readable cases.
    """

    dataset: str
    n_cases: int
    findings: tuple[Finding, ...]
    labels: Mapping[int, int]

    @property
    def ok(self) -> bool:
        """Whether nothing worse than a warning was found."""
        return all(finding.severity != "error" for finding in self.findings)


@dataclass(frozen=True)
class _Seen:
    """What is kept of a case when its voxels are gone."""

    findings: tuple[Finding, ...]
    n_channels: int | None = None
    image_hash: str | None = None
    label_hash: str | None = None
    counts: Mapping[int, int] | None = None


def audit(
    dataset: Dataset, *, progress: Callable[[int, int, str], None] | None = None
) -> AuditReport:
    """Read every case once and say what is wrong; nothing is raised for a bad case.

    Errors: a file that is missing or unreadable, grids that differ, fractions, negative numbers or
    NaN in a label, values outside the declared set, NaN or infinity in an image, a number of
    channels unlike the declared one, one image under two different labels, no foreground at all.
    Warnings: a label without foreground, a constant channel, an image that is its own label, one
    image twice, a declared label that no case holds, a count of cases unlike the declared one.

    Args:
        dataset: as `read_dataset` gives it.
        progress: called after each case with (cases done, cases in all, the case's name).
    """
    seen: dict[str, _Seen] = {}
    for done, case in enumerate(dataset.cases, start=1):
        seen[case.name] = _look(case, dataset)
        if progress is not None:
            progress(done, len(dataset.cases), case.name)
    labels: Counter[int] = Counter()
    for one in seen.values():
        labels.update(one.counts or {})
    return AuditReport(
        dataset=dataset.name,
        n_cases=len(dataset.cases),
        findings=(
            *(finding for one in seen.values() for finding in one.findings),
            *_channel_counts(seen, dataset),
            *_duplicates(seen),
            *_whole(seen, dataset, labels),
        ),
        labels=dict(sorted(labels.items())),
    )


def _look(case: Case, dataset: Dataset) -> _Seen:
    findings: list[Finding] = []
    image = label = None

    def find(severity: Severity, what: str) -> None:
        findings.append(Finding(case=case.name, severity=severity, what=what))

    try:
        image = read_image(case)
    except EffsegError as error:
        find("error", str(error))
    try:
        label = read_label(case)
    except EffsegError as error:
        find("error", str(error))
    if image is not None and label is not None:
        difference = image.grid.difference(label.grid)
        if difference is not None:
            find(
                "error",
                f"image and label differ in {difference}; expected one grid: "
                "bring the label over with resample_like(...)",
            )
    constant = False
    if image is not None:
        for severity, what in _image_faults(image, case):
            constant = constant or severity == "warning"
            find(severity, what)
    counts = _count_values(label.array) if label is not None else None
    if counts is not None:
        for severity, what in _label_faults(counts, dataset):
            find(severity, what)
    image_hash = _hash(image.array) if image is not None else None
    label_hash = _hash(label.array[None]) if label is not None else None
    if image_hash is not None and image_hash == label_hash and not constant:
        find("warning", "the image's voxels are the label's; expected an image: compare the files")
    return _Seen(
        findings=tuple(findings),
        n_channels=image.n_channels if image is not None else None,
        image_hash=image_hash,
        label_hash=label_hash,
        counts=counts,
    )


def _image_faults(image: Volume, case: Case) -> list[tuple[Severity, str]]:
    faults: list[tuple[Severity, str]] = []
    for number, channel in enumerate(image.array):
        if len(case.images) > 1:
            where = case.images[number].name
        else:
            where = case.images[0].name + (f", channel {number}" if image.n_channels > 1 else "")
        n_bad = _count_not_finite(channel)
        if n_bad:
            what = f"{n_bad} voxels are NaN or infinite; expected finite numbers: mend the image"
            faults.append(("error", f"{where}: {what}"))
        elif (low := channel.min()) == channel.max():
            what = f"every voxel is {float(low):.6g}; expected an image: look at the file"
            faults.append(("warning", f"{where}: {what}"))
    return faults


def _count_not_finite(array: Array) -> int:
    if not np.issubdtype(array.dtype, np.inexact):
        return 0
    return array.size - int(np.count_nonzero(np.isfinite(array)))


def _label_faults(counts: Mapping[int, int], dataset: Dataset) -> list[tuple[Severity, str]]:
    faults: list[tuple[Severity, str]] = []
    if dataset.labels is not None:
        allowed = set(dataset.labels)
        if dataset.ignore_label is not None:
            allowed.add(dataset.ignore_label)
        strangers = [f"{v} ({n} voxels)" for v, n in counts.items() if v not in allowed]
        if strangers:
            what = (
                f"label values outside the declared set: {some(strangers)}; expected "
                f"{some([str(v) for v in sorted(allowed)])}: declare them or mend the label"
            )
            faults.append(("error", what))
    if not _foreground(counts, dataset):
        what = "the label has no foreground; expected some in most cases: is it finished?"
        faults.append(("warning", what))
    return faults


def _foreground(counts: Mapping[int, int], dataset: Dataset) -> set[int]:
    return {value for value in counts if value not in (0, dataset.ignore_label)}


def _channel_counts(seen: Mapping[str, _Seen], dataset: Dataset) -> list[Finding]:
    counts = {name: one.n_channels for name, one in seen.items() if one.n_channels is not None}
    if not counts:
        return []
    if dataset.channel_names is not None:
        expected = len(dataset.channel_names)
        source = f"as declared: {', '.join(dataset.channel_names)}"
    else:
        expected = Counter(counts.values()).most_common(1)[0][0]
        source = "as most cases have"
    return [
        Finding(
            case=name,
            severity="error",
            what=f"the image has {n} channels; expected {expected}, {source}: "
            "add what is missing or leave the case out",
        )
        for name, n in counts.items()
        if n != expected
    ]


def _duplicates(seen: Mapping[str, _Seen]) -> list[Finding]:
    by_image: dict[str, list[str]] = defaultdict(list)
    for name, one in seen.items():
        if one.image_hash is not None:
            by_image[one.image_hash].append(name)
    findings = []
    for names in by_image.values():
        first = names[0]
        for name in names[1:]:
            hashes = {seen[name].label_hash, seen[first].label_hash}
            differ = None not in hashes and len(hashes) == 2
            findings.append(
                Finding(
                    case=name,
                    severity="error" if differ else "warning",
                    what=f"the image is that of {first}{', under another label' if differ else ''}"
                    "; expected each image once: keep one of the two cases",
                )
            )
    return findings


def _whole(seen: Mapping[str, _Seen], dataset: Dataset, labels: Mapping[int, int]) -> list[Finding]:
    findings = []
    read_any = any(one.counts is not None for one in seen.values())
    if read_any and not _foreground(labels, dataset):
        findings.append(
            Finding(
                case=None,
                severity="error",
                what="no case has any foreground; expected labels above 0: there is nothing to "
                "learn, look at the label files",
            )
        )
    elif dataset.labels is not None:
        absent = [f"{v} {name}" for v, name in dataset.labels.items() if v and v not in labels]
        if absent:
            findings.append(
                Finding(
                    case=None,
                    severity="warning",
                    what=f"declared labels that no case holds: {some(absent)}; expected each in "
                    "some case: a network cannot learn them",
                )
            )
    if dataset.n_declared is not None and dataset.n_declared != len(dataset.cases):
        findings.append(
            Finding(
                case=None,
                severity="warning",
                what=f"{len(dataset.cases)} cases; expected {dataset.n_declared}, as numTraining "
                "in dataset.json says: are files missing?",
            )
        )
    return findings


def _count_values(label: Array) -> dict[int, int]:
    if label.dtype.itemsize > 2:  # too many values for one counter each
        values, n = np.unique(label, return_counts=True)
        return dict(zip(values.tolist(), n.tolist(), strict=True))
    totals = np.zeros(int(label.max()) + 1, dtype=np.int64)
    for plane in label:  # bincount widens its input eightfold: one plane at a time
        totals += np.bincount(plane.ravel(), minlength=totals.size)
    return {int(value): int(totals[value]) for value in np.flatnonzero(totals)}


def _hash(array: Array) -> str:
    """Of voxel values, whatever the type they are stored in; planes one at a time."""
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    with np.errstate(over="ignore"):
        for channel in array:
            for plane in channel:
                digest.update(plane.astype(np.float32).tobytes())
    return digest.hexdigest()
