"""Volumes and files of volumes that several test files share."""

import gzip
import resource
import warnings
import zipfile
from contextlib import contextmanager
from itertools import permutations, product

import nibabel
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation

from effseg.volume import AxisOrder, Grid, Volume

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
DTYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8")
ORDERS = [
    AxisOrder(order=order, flips=flips)
    for order in permutations(range(3))
    for flips in product((False, True), repeat=3)
]
OBLIQUE = Rotation.from_euler("zyx", (20, -10, 5), degrees=True).as_matrix()
GRID = Grid(
    shape=(3, 4, 5),
    spacing=(2.5, 0.7, 0.8),
    origin=(-301.1, 72.3, -45.6),
    direction=tuple(tuple(float(v) for v in row) for row in OBLIQUE),
)


def volume_of(dtype="i2", *, channels=None, grid=GRID):
    rng = np.random.default_rng(0)
    shape = (*((channels,) if channels else ()), *grid.shape)
    return Volume(rng.integers(0, 100, shape).astype(dtype), grid)


def assert_same_place(found, expected, *, exact=False):
    """To 1e-12, or to what an affine of float32 numbers can hold: 6e-8 of each, 3e-5 mm at 500."""
    near = 1e-12 if exact else 1e-6
    assert found.shape == expected.shape
    assert np.allclose(found.affine, expected.affine, rtol=near, atol=near)


def some_voxels(grid, n=20):
    return np.random.default_rng(1).integers(0, grid.shape, (n, 3))


def nifti_file(path, *, array=None, extra=b"", **fields):
    """A NIfTI-1 file, with header fields set by force."""
    array = np.arange(60, dtype="<i2") if array is None else array
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_shape((5, 4, 3))
    header.set_data_dtype(array.dtype)
    header.set_sform(np.diag([0.8, 0.7, 2.5, 1.0]), code=1)
    header["pixdim"][1:4] = 0.8, 0.7, 2.5
    header["vox_offset"] = 352
    for name, value in fields.items():
        where, _, index = name.partition("__")
        if index:
            header[where][int(index)] = value
        else:
            header[where] = value
    data = header.binaryblock + bytes(4) + array.tobytes() + extra
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def nrrd_file(path, *, drop=(), lines="", data=None, **fields):
    array = np.arange(60, dtype="<i2")
    header = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "5 4 3",
        "space directions": "(0.8,0,0) (0,0.7,0) (0,0,2.5)",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(-16,24,40)",
    } | {name.replace("_", " "): value for name, value in fields.items()}
    text = "".join(f"{name}: {value}\n" for name, value in header.items() if name not in drop)
    data = array.tobytes() if data is None else data
    path.write_bytes(f"NRRD0004\n# made by a test\n{text}{lines}\n".encode() + data)
    return path


def mha_file(path, *, drop=(), data=None, **fields):
    header = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "-16 24 40",
        "ElementSpacing": "0.8 0.7 2.5",
        "DimSize": "5 4 3",
        "ElementType": "MET_SHORT",
    } | fields
    header.setdefault("ElementDataFile", "LOCAL")
    text = "".join(f"{name} = {value}\n" for name, value in header.items() if name not in drop)
    path.write_bytes(text.encode() + (data or np.arange(60, dtype="<i2").tobytes()))
    return path


@contextmanager
def room_for(n_bytes):
    """Files may not grow further: what a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CT = "1.2.840.10008.5.1.4.1.1.2"
REPORT = "1.2.840.10008.5.1.4.1.1.88.22"


def ct_slice(index, *, series="1.2.3", affine=None, values=None, syntax=ExplicitVRLittleEndian):
    """Slice `index` of a CT whose 4 x 4 LPS affine (x, y, z) is given."""
    affine = np.diag([0.8, 0.7, 2.5, 1.0]) if affine is None else affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :3] / spacing
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = CT
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = CT, meta.MediaStorageSOPInstanceUID
    data.Modality = "CT"
    data.SeriesInstanceUID, data.FrameOfReferenceUID = series, "1.2.3.4"
    data.ImagePositionPatient = [f"{v:.6f}" for v in affine[:3, 3] + index * affine[:3, 2]]
    data.ImageOrientationPatient = [f"{v:.9f}" for v in cosines[:, :2].T.ravel()]
    data.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
    data.SliceThickness = "9"  # of no use: gaps are what counts
    data.Rows, data.Columns = 4, 5
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = 1
    data.RescaleSlope, data.RescaleIntercept = "1", "-1024"
    values = np.arange(20, dtype="<i2").reshape(4, 5) + 100 * index if values is None else values
    data.PixelData = values.astype("<i2").tobytes()
    return data


def save(data, path):
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are meant to be wrong
        data.save_as(path, enforce_file_format=True)
    return path


def series(folder, slices):
    for n, data in enumerate(slices):
        save(data, folder / f"{n:03d}.dcm")
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"case/{file.name}")
    return path
