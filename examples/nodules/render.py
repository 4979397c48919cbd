"""Chest CT rendered around real nodules: an nnU-Net raw data set without a single image.

The outlines and the ratings of the nodules are those of LIDC-IDRI's readers. Everything else - the
lung, its wall, vessels, airways, density, blur, noise - is drawn by formulas.
"""

import csv
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from effseg import DataError
from lidc import list_patients, read_nodules
from nnunet import IGNORE, MIN_READERS, NODULE, new_dataset, write_case
from nodule import MAX_READERS, Nodule
from scene import Scanner, render_scene


@dataclass(frozen=True, eq=False)
class Finding:
    """A nodule in a rendered volume.

    Attributes:
        case: the volume's name.
        held_out: whether that lies in imagesTs.
        nodule: with its readers and their ratings.
        centre_mm: where its middle lies in the volume's world, (z, y, x).
    """

    case: str
    held_out: bool
    nodule: Nodule
    centre_mm: tuple[float, float, float]

    @property
    def is_target(self) -> bool:
        """Whether enough readers outlined it; the others are to be ignored."""
        return self.nodule.n_readers >= MIN_READERS


def render_dataset(
    out: Path,
    database: Path,
    *,
    n_train: int,
    n_test: int,
    seed: int,
    min_diameter_mm: float = 6.0,
    max_diameter_mm: float = 25.0,
    scanner: Scanner | None = None,
    n_threads: int = 2,
) -> list[Finding]:
    """Write a new nnU-Net raw data set of rendered chest CT around real nodules.

    Each volume holds one to three nodules that at least three readers outlined (label 1), and in
    two of five volumes one that only one or two readers outlined (label 2, to be ignored). No
    patient lends nodules to both the training and the held-out volumes. The same arguments give the
    same voxels, on any number of threads.

    Args:
        out: the new folder; held-out volumes go to imagesTs and labelsTs.
        database: from `find_database`.
        n_train: volumes to train on.
        n_test: volumes to hold out.
        seed: of everything random.
        min_diameter_mm: of a ball of the nodule's volume, for targets.
        max_diameter_mm: the same, upwards.
        scanner: how images are taken; the default one where None.
        n_threads: volumes rendered at a time.

    Returns:
        Every nodule that found a place, case by case; `nodules.csv` in the folder lists the same.

    Raises:
        DataError: if `out` exists, or the database has too few such nodules.
    """
    scanner = scanner or Scanner()
    rng = np.random.default_rng(seed)
    patients = rng.permutation(list_patients(database)).tolist()
    n_targets = rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2], size=n_train + n_test)
    n_ignored = rng.choice([0, 1], p=[0.6, 0.4], size=n_train + n_test)

    def is_target(nodule: Nodule) -> bool:
        fits = min_diameter_mm <= nodule.diameter_mm <= max_diameter_mm
        return MIN_READERS <= nodule.n_readers <= MAX_READERS and nodule.diameter_mm > 0 and fits

    def is_doubtful(nodule: Nodule) -> bool:
        return nodule.n_readers < MIN_READERS and 3 <= nodule.diameter_mm <= max_diameter_mm

    # Patients are dealt from one deck: once held out, a patient is not seen again.
    deck = iter(patients)
    queues = {}
    for part, begin, end in (("test", 0, n_test), ("train", n_test, n_test + n_train)):
        targets, doubtful = int(n_targets[begin:end].sum()), int(n_ignored[begin:end].sum())
        found = _deal(database, deck, (is_target, targets), (is_doubtful, doubtful))
        queues[part] = [iter(nodules) for nodules in found]
    cases = []
    for index, (n_one, n_two) in enumerate(zip(n_targets, n_ignored, strict=True)):
        targets, doubtful = queues["test" if index < n_test else "train"]
        chosen = [next(targets) for _ in range(n_one)] + [next(doubtful) for _ in range(n_two)]
        cases.append((index, f"rendered_{index:03d}", chosen))

    def render(case: tuple[int, str, list[Nodule]]) -> list[Finding]:
        index, name, nodules = case
        scene = render_scene(nodules, np.random.default_rng([seed, index]), scanner=scanner)
        held_out = index < n_test
        write_case(folder, name, image=scene.image, label=scene.label, held_out=held_out)
        return [
            Finding(case=name, held_out=held_out, nodule=nodule, centre_mm=centre_mm)
            for nodule, centre_mm in zip(scene.nodules, scene.centres_mm, strict=True)
        ]

    out = Path(out)
    with new_dataset(out) as folder, ThreadPoolExecutor(n_threads) as pool:
        findings = [finding for found in pool.map(render, cases) for finding in found]
        _write_table(folder / "nodules.csv", findings)
    return findings


def _deal(database: Path, deck: Iterator[str], *wanted: tuple) -> list[list[Nodule]]:
    """Take patients from a deck until each (condition, count) has its nodules."""
    found: list[list[Nodule]] = [[] for _ in wanted]
    while any(len(have) < n for have, (_, n) in zip(found, wanted, strict=True)):
        patients = list(islice(deck, 20))
        if not patients:
            short = ", ".join(
                f"{len(have)} of {n}" for have, (_, n) in zip(found, wanted, strict=True)
            )
            raise DataError(
                f"{database}: too few nodules of the diameters asked for, {short}; "
                "render fewer volumes or widen the diameters"
            )
        for nodule in read_nodules(database, patients):
            for have, (is_wanted, n) in zip(found, wanted, strict=True):
                if len(have) < n and is_wanted(nodule):
                    have.append(nodule)
    return found


def _write_table(path: Path, findings: Iterable[Finding]) -> None:
    """One row per nodule: which one, what its readers said, where it lies."""
    rated = ("texture", "calcification", "margin", "malignancy")
    header = ("case", "held_out", "label", "patient", "n_readers", "diameter_mm", *rated)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*header, "z_mm", "y_mm", "x_mm"])
        for finding in findings:
            nodule = finding.nodule
            table.writerow(
                [
                    finding.case,
                    int(finding.held_out),
                    NODULE if finding.is_target else IGNORE,
                    nodule.patient,
                    nodule.n_readers,
                    f"{nodule.diameter_mm:.1f}",
                    *(nodule.rating(name) for name in rated),
                    *(f"{place:.1f}" for place in finding.centre_mm),
                ]
            )
