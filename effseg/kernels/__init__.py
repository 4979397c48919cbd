"""Operators on wide features, a tile of voxels at a time: what dense blocks and losses run on."""
