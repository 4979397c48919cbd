"""A volume that stays in its file until its voxels are asked for."""

from functools import cached_property
from pathlib import Path

from effseg.io.reading import read_grid, read_volume
from effseg.types import Array
from effseg.volume import Volume


class StoredVolume(Volume):
    """A volume in a file: its grid is known, its voxels are read when they are first asked for.

    Args:
        path: as for `read_volume`.

    Attributes:
        path: of the file.

    Raises:
        DataError: if the header cannot be used; from `array`, as `read_volume`.
        GeometryError: if its axes are not orthogonal.
    """

    def __init__(self, path: str | Path) -> None:
        vars(self).update(path=Path(path), grid=read_grid(path)[0])

    path: Path

    @cached_property
    def array(self) -> Array:
        """The voxels, as `read_volume` gives them."""
        return read_volume(self.path).array

    def __repr__(self) -> str:
        return f"StoredVolume({str(self.path)!r})"
