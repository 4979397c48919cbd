"""Where the voxels of an OME-Zarr image lie: the metadata of OME-NGFF 0.4 and 0.5.

https://ngff.openmicroscopy.org/0.5/. Scale and translation are all that it knows, so the direction
of the axes stands beside it, under a key of our own; an image without it lies along LPS.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from effseg.errors import DataError, GeometryError
from effseg.files import name_places
from effseg.io.header import check_spacing
from effseg.types import Shape3, Spacing
from effseg.volume import IDENTITY, Grid, Matrix3

VERSION = "0.5"
LEVEL = "0"
"""The path of the one resolution that is written."""

_OURS = "effseg"
_AXES = ("z", "y", "x")
_UNITS_MM = {
    "millimeter": 1.0,
    "micrometer": 1e-3,
    "nanometer": 1e-6,
    "centimeter": 10.0,
    "meter": 1e3,
}


class _Axis(BaseModel):
    """An axis of the image."""

    name: str
    unit: str | None = None


class _Transform(BaseModel):
    """A step from indices to the world, one number an axis."""

    type: str
    scale: tuple[float, ...] | None = None
    translation: tuple[float, ...] | None = None


class _Level(BaseModel):
    """A resolution of the image."""

    path: str
    transforms: tuple[_Transform, ...] = Field(alias="coordinateTransformations")


class _Multiscale(BaseModel):
    """An image in several resolutions, the finest first."""

    axes: tuple[_Axis, ...]
    datasets: tuple[_Level, ...] = Field(min_length=1)
    transforms: tuple[_Transform, ...] = Field((), alias="coordinateTransformations")


class _Ome(BaseModel):
    """What OME-NGFF says of a group."""

    multiscales: tuple[_Multiscale, ...] = Field(min_length=1)


class _Ours(BaseModel):
    """What it cannot say."""

    direction: Matrix3 = IDENTITY


class OmeImage:
    """The metadata of an image in a Zarr group.

    Args:
        path: of the group, for the words of an error.
        attributes: of the group.

    Attributes:
        levels: paths of its resolutions in the group, the finest first.
        has_channels: whether a channel axis stands before (z, y, x).

    Raises:
        DataError: if they do not describe a 3-D image in units of length.
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any]) -> None:
        self._path = path
        try:
            ome = _Ome.model_validate(attributes.get("ome", attributes))  # 0.4: at the root
            self._direction = _Ours.model_validate(attributes.get(_OURS, {})).direction
        except ValidationError as error:
            raise DataError(
                f"{path}: not an OME-Zarr image: {name_places(error, what='attributes')}; give "
                "zarr.open_array(...) to a Predictor instead, if where it lies does not matter"
            ) from error
        image = ome.multiscales[0]
        names = tuple(axis.name for axis in image.axes)
        if names[-3:] != _AXES or names[:-3] not in ((), ("c",)):
            raise DataError(f"{path}: axes {names}; expected (z, y, x), or c before them")
        self.has_channels = len(names) == 4
        self.levels = tuple(level.path for level in image.datasets)
        scale, translation = [1.0] * len(names), [0.0] * len(names)
        for step in (*image.datasets[0].transforms, *image.transforms):
            factors = _numbers(path, step.scale, len(names), 1.0)
            offsets = _numbers(path, step.translation, len(names), 0.0)
            if step.type not in ("scale", "translation", "identity"):
                raise DataError(
                    f"{path}: a transformation of type {step.type!r}; expected scale, translation"
                )
            scale = [a * b for a, b in zip(scale, factors, strict=True)]
            translation = [a * b + c for a, b, c in zip(translation, factors, offsets, strict=True)]
        units = [_millimetres(path, axis) for axis in image.axes[-3:]]
        z, y, x = (n * unit for n, unit in zip(scale[-3:], units, strict=True))
        self._spacing: Spacing = (z, y, x)
        z, y, x = (n * unit for n, unit in zip(translation[-3:], units, strict=True))
        self._origin: Spacing = (z, y, x)

    def grid(self, shape: Shape3) -> Grid:
        """Where voxels of the finest resolution lie.

        Raises:
            DataError: if a spacing is no number between 0.001 and 100 mm.
            GeometryError: if the grid is none.
        """
        check_spacing(self._path, self._spacing)
        try:
            return Grid(
                shape=shape,
                spacing=self._spacing,
                origin=self._origin,
                direction=self._direction,
            )
        except GeometryError as error:
            raise GeometryError(f"{self._path}: {error}") from error


def ome_attributes(grid: Grid, *, name: str, has_channels: bool) -> dict[str, Any]:
    """The attributes of a group that holds an image on a grid, in one resolution."""
    lead = [{"name": "c", "type": "channel"}] if has_channels else []
    transforms: list[dict[str, Any]] = [
        {"type": "scale", "scale": [1.0] * len(lead) + _floats(grid.spacing)},
        {"type": "translation", "translation": [0.0] * len(lead) + _floats(grid.origin)},
    ]
    image = {
        "name": name,
        "axes": [*lead, *({"name": n, "type": "space", "unit": "millimeter"} for n in _AXES)],
        "datasets": [{"path": LEVEL, "coordinateTransformations": transforms}],
    }
    return {
        "ome": {"version": VERSION, "multiscales": [image]},
        _OURS: {"world": "LPS", "direction": [_floats(row) for row in grid.direction]},
    }


def _floats(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]


def _numbers(
    path: Path, values: tuple[float, ...] | None, n_axes: int, neutral: float
) -> Sequence[float]:
    if values is None:
        return (neutral,) * n_axes
    if len(values) != n_axes:
        raise DataError(f"{path}: a transformation {values} of {n_axes} axes; expected one each")
    return values


def _millimetres(path: Path, axis: _Axis) -> float:
    if axis.unit not in _UNITS_MM:
        raise DataError(
            f"{path}: axis {axis.name} is in {axis.unit or 'no unit'}; expected one of "
            f"{', '.join(_UNITS_MM)}"
        )
    return _UNITS_MM[axis.unit]
