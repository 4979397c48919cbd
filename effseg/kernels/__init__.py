"""Operators on wide features, a tile of voxels at a time: what dense blocks and losses run on."""

from effseg.kernels import tiles

__all__ = ["tiles"]
