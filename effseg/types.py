"""Shapes and triples, named once. Every triple is (z, y, x)."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

Shape3: TypeAlias = tuple[int, int, int]
"""Voxels along (z, y, x)."""

Spacing: TypeAlias = tuple[float, float, float]
"""Millimetres between voxel centres along (z, y, x)."""

Slices3: TypeAlias = tuple[slice, slice, slice]
"""A box of voxels, (z, y, x)."""

Array: TypeAlias = npt.NDArray[Any]
"""A numpy array of any type."""

FloatArray: TypeAlias = npt.NDArray[np.float64]
"""Coordinates, matrices and statistics."""

Features: TypeAlias = Float[Tensor, "batch channels *space"]
"""What flows between the layers of a network."""

Logits: TypeAlias = Float[Tensor, "batch classes *space"]
"""What a network's head returns, before any softmax."""
