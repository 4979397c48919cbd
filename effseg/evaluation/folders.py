"""Predictions and references as files: which belong together, and their scores."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from effseg.errors import DataError
from effseg.evaluation import lesions, surface
from effseg.evaluation.cases import check_choices, evaluate_case
from effseg.evaluation.scores import CaseScore, Scores
from effseg.io import VOLUME_SUFFIXES, is_volume, list_volumes, read_volume, strip_suffix

CONVENTIONS = (
    "empty: undefined (null) where both masks are, Dice 0 where one is; "
    f"{surface.CONVENTION}; {lesions.CONVENTION}"
)

logger = logging.getLogger("effseg")


def evaluate(
    predictions: str | Path,
    references: str | Path,
    *,
    out: str | Path | None = None,
    labels: Mapping[int, str] | None = None,
    ignore_label: int | None = None,
    tolerance_mm: float = 1.0,
    images: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score predictions against references, case by case.

    Args:
        predictions: a folder of label maps, or one file.
        references: a folder with a label map of the same name (suffix aside) for each prediction,
            others are left out and counted in a warning; or one file, of any name.
        out: where to write the scores as JSON.
        labels: value to name of every label that may occur, each scored; 0 may be left out. None:
            the values that occur.
        ignore_label: the references' value for "unknown"; such voxels count nowhere.
        tolerance_mm: of surface Dice.
        images: a folder with an image (file or DICOM folder) for each case, named like it or with
            `_0000` behind; only noted in the scores, so that a report can show it. One file where
            one case is scored.
        progress: called with (cases done, cases in all) before the first case and after each.

    Returns:
        The scores, cases by name.

    Raises:
        DataError: if a folder is missing or empty, a case lacks its partner, a file cannot be read
            or holds no label map, labels occur that were not declared, or `out` cannot be written.
        GeometryError: if a prediction and its reference lie on different grids.
    """
    check_choices(labels, ignore_label=ignore_label, tolerance_mm=tolerance_mm)
    if out is not None and Path(out).is_dir():
        raise DataError(f"{out} is a folder; expected a file, {Path(out) / 'metrics.json'} say")
    pairs = _pairs(Path(predictions), Path(references))
    shown = {} if images is None else _images(Path(images), sorted(pairs))
    if progress is not None:
        progress(0, len(pairs))
    cases: list[CaseScore] = []
    for case, (prediction, reference) in sorted(pairs.items()):
        score = evaluate_case(
            read_volume(prediction),
            read_volume(reference),
            case=case,
            labels=labels,
            ignore_label=ignore_label,
            tolerance_mm=tolerance_mm,
        )
        places = {"prediction": prediction, "reference": reference, "image": shown.get(case)}
        update = {
            key: None if path is None else str(path.absolute()) for key, path in places.items()
        }
        cases.append(score.model_copy(update=update))
        if progress is not None:
            progress(len(cases), len(pairs))
    scores = Scores(
        tolerance_mm=tolerance_mm,
        ignore_label=ignore_label,
        conventions=CONVENTIONS,
        cases=tuple(cases),
    )
    if out is not None:
        scores.save(out)
        logger.info("scores of %d cases written to %s", len(cases), out)
    return scores


def _pairs(predictions: Path, references: Path) -> dict[str, tuple[Path, Path]]:
    for path in (predictions, references):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected label maps")
    if is_volume(predictions) != is_volume(references):
        raise DataError(
            f"{predictions} and {references}: one is a folder, the other a file; "
            "give two folders or two files"
        )
    if is_volume(predictions):
        return {strip_suffix(references): (predictions, references)}
    predicted, true = _volumes(predictions), _volumes(references)
    lacking = sorted(predicted.keys() - true)
    if lacking:
        more = f" (and {len(lacking) - 1} other cases)" if len(lacking) > 1 else ""
        raise DataError(
            f"{references} lacks a volume named {lacking[0]}, there is "
            f"{predicted[lacking[0]]}{more}; add it, or take that out"
        )
    unscored = len(true) - len(predicted)
    if unscored:
        logger.warning(
            "%d of %d references have no prediction and are not scored", unscored, len(true)
        )
    return {case: (path, true[case]) for case, path in predicted.items()}


def _volumes(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_volumes(folder):
        case = strip_suffix(path)
        if case in found:
            raise DataError(
                f"{folder} holds two volumes of one case, {found[case].name} and {path.name}; "
                "keep one"
            )
        found[case] = path
    if not found:
        raise DataError(f"{folder} holds no volumes; expected {', '.join(VOLUME_SUFFIXES)} files")
    return found


def _images(images: Path, cases: list[str]) -> dict[str, Path]:
    if is_volume(images) and len(cases) == 1:
        return {cases[0]: images}
    if not images.is_dir():
        raise DataError(f"{images}: no such folder; expected the images of the cases")
    found = {p.name: p for p in images.iterdir() if p.is_dir() and not is_volume(p)}
    found |= {strip_suffix(path): path for path in list_volumes(images)}
    shown: dict[str, Path] = {}
    for case in cases:
        path = found.get(case, found.get(f"{case}_0000"))
        if path is None:
            raise DataError(
                f"{images} lacks an image named {case} or {case}_0000; add it, or leave images out"
            )
        shown[case] = path
    return shown
