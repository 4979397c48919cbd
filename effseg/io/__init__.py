"""Volumes in and out: NIfTI, NRRD and MHA files, Zarr stores, a DICOM series in a folder or a zip.

Headers are read and judged in Python before anything is allocated, voxels go from the file into
the one array that is returned, or into one slab after the other, and what is written is read back
before it takes its name. The only place that knows (x, y, z) order and RAS worlds.
"""

from effseg.io.formats import (
    VOLUME_SUFFIXES,
    WRITTEN_SUFFIXES,
    is_volume,
    list_volumes,
    strip_suffix,
)
from effseg.io.reading import read_grid, read_volume
from effseg.io.slab_reader import SlabReader
from effseg.io.slab_writer import SlabWriter
from effseg.io.store import library_bytes
from effseg.io.stored import StoredVolume
from effseg.io.writing import write_volume, writing_bytes

__all__ = [
    "VOLUME_SUFFIXES",
    "WRITTEN_SUFFIXES",
    "SlabReader",
    "SlabWriter",
    "StoredVolume",
    "is_volume",
    "library_bytes",
    "list_volumes",
    "read_grid",
    "read_volume",
    "strip_suffix",
    "write_volume",
    "writing_bytes",
]
