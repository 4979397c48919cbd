"""Operators on wide features, a tile of voxels at a time: what dense blocks and losses run on."""

import effseg.kernels.cuda  # noqa: F401, gives the operators their kernels
from effseg.kernels.deferred import DeferredLogits, FoldedNorm
from effseg.kernels.derivatives import refuse_second_derivative

__all__ = ["DeferredLogits", "FoldedNorm", "refuse_second_derivative"]
