"""What a label map depends on, in a few bytes: whether a stopped write may go on."""

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from effseg.networks import WeightsFile
from effseg.sources import ImageSource


def fingerprint(*parts: object) -> str:
    """A digest of what the parts say of themselves."""
    return hashlib.sha256("\n".join(repr(part) for part in parts).encode()).hexdigest()


def weights_of(networks: Iterable[nn.Module], weights: Iterable[Sequence[WeightsFile]]) -> str:
    """A digest of what networks are made of and their weights and buffers.

    Args:
        networks: each as it is.
        weights: of each network, the files that take turns in it; what it holds itself then does
            not count.
    """
    found = hashlib.sha256()
    for network, files in zip(networks, weights, strict=True):
        found.update(repr(network).encode())
        for file in files:
            found.update(file.digest().encode())
        if files:
            continue
        for name, tensor in network.state_dict().items():
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()


def voxels_of(source: ImageSource, axis: int) -> tuple[object, ...]:
    """A checksum of an image, which is read through once along an axis."""
    found = 0
    for _, planes in source.slabs(axis):
        found = zlib.crc32(np.ascontiguousarray(planes).data.cast("B"), found)
    return (source.n_channels, source.shape, found)


def files_of(paths: Sequence[str | Path]) -> tuple[object, ...]:
    """Names, sizes and times of files; of a folder, of all in it."""
    inside = [
        found
        for path in map(Path, paths)
        for found in (sorted(path.rglob("*")) if path.is_dir() else [path])
    ]
    return tuple((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in inside)
