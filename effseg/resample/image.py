"""Images: linear, in float32."""

import numpy as np

from effseg.errors import DataError
from effseg.resample.mapping import Mapping
from effseg.types import Array, Slices3


def interpolate_image(voxels: Array, *, mapping: Mapping, given: Slices3, wanted: Slices3) -> Array:
    """The target's voxels in a box, float32.

    Args:
        voxels: the source's voxels in `given`, numbers of any type.
        mapping: from the source's voxels to the target's.
        given: the source voxels that `wanted` needs.
        wanted: a box of the target.

    Raises:
        DataError: if a voxel is NaN or infinite.
    """
    # One such voxel would reach all of its box: even a weight of 0 times NaN is NaN.
    if voxels.dtype.kind == "f" and not np.isfinite((voxels.min(), voxels.max())).all():
        raise DataError(
            "the image to resample holds NaN or infinite voxels; expected finite numbers: "
            "replace them before, with numpy.nan_to_num for one"
        )
    return mapping.apply(voxels.astype(np.float32, copy=False), given=given, wanted=wanted)
