"""A file of weights that is read into a network that exists already, tensor by tensor.

The library that writes such files maps them into memory to read them, and whole pages of a mapped
file count as the process's. Here each tensor is read to where it is to lie: a network takes no
more memory while weights are changed than it takes anyway, which lets several models take turns.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from effseg.errors import CheckpointError
from effseg.networks.state import own_state

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""As the format names them."""

MOST_HEADER_BYTES = 100 * 2**20
"""What the format allows."""

STAGED_BYTES = 4 * 2**20
"""Read at once of what cannot be read to where it is to lie, such as a card."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file, of which only the header is in memory.

    Attributes:
        path: of the file.
        tensors: where each lies, by name.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the header.

        Raises:
            CheckpointError: if the file cannot be read or is cut short.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                n_header = int.from_bytes(file.read(8), "little")
                n_bytes = path.stat().st_size
                if not 2 <= n_header <= min(n_bytes - 8, MOST_HEADER_BYTES):
                    raise ValueError("no header of a safetensors file")
                header = json.loads(file.read(n_header))
            tensors = {
                name: _stored(entry, 8 + n_header, n_bytes)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); train again") from error
        return cls(path=path, tensors=tensors)

    def check(self, network: nn.Module, *, of: str) -> None:
        """See that the file has the tensors of a network, and no others.

        Args:
            network: that they are to be read into.
            of: where the network is described, in words.

        Raises:
            CheckpointError: naming the first tensor that is missing, extra or of another shape.
        """
        expected = own_state(network)
        for name, tensor in expected.items():
            if name not in self.tensors:
                raise CheckpointError(f"{self.path}: no tensor {name}, which {of}'s network has")
            if self.tensors[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {self.tensors[name].shape}; {of}'s network "
                    f"expects {tuple(tensor.shape)}"
                )
        extra = sorted(set(self.tensors) - set(expected))
        if extra:
            raise CheckpointError(f"{self.path}: tensor {extra[0]} is not in {of}'s network")

    @torch.no_grad()
    def fill(self, network: nn.Module) -> None:
        """Read all tensors into a network that `check` found fitting.

        Raises:
            CheckpointError: if the file cannot be read any more, or was cut short meanwhile.
        """
        state = network.state_dict()
        try:
            with FileIO(self.path) as file:
                for name, stored in sorted(self.tensors.items(), key=lambda item: item[1].start):
                    _read_into(file, stored, state[name])
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}); train again") from error

    def tensor(self, name: str) -> Tensor:
        """One of them, on the CPU.

        Raises:
            CheckpointError: if there is none of this name, or the file cannot be read.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name}; expected one, train again")
        stored = self.tensors[name]
        result = torch.empty(stored.shape, dtype=stored.dtype)
        try:
            with FileIO(self.path) as file:
                _read_into(file, stored, result)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}); train again") from error
        return result

    def digest(self) -> str:
        """Of all that the file holds.

        Raises:
            CheckpointError: if it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}); train again") from error


def _stored(entry: Mapping[str, object], first: int, n_bytes: int) -> StoredTensor:
    """An entry of a header, once it is seen to lie in the file."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise TypeError("no header of a safetensors file")
    if dtype not in DTYPES:
        raise ValueError(f"numbers of type {dtype}")
    start, stop = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if not (0 <= start <= stop <= n_bytes - first and stop - start == expected):
        raise ValueError(f"{n_bytes} bytes do not hold what the header says; it was cut short")
    return StoredTensor(DTYPES[dtype], tuple(shape), first + start, expected)


def _read_into(file: FileIO, stored: StoredTensor, target: Tensor) -> None:
    file.seek(stored.start)
    if target.device.type == "cpu" and target.dtype == stored.dtype and target.is_contiguous():
        _read_all(file, target.view(-1))
        return
    # otherwise in pieces: along the first axis, where memory is in another order
    rows = target if target.ndim else target.view(1)
    row_bytes = max(1, stored.n_bytes // max(1, len(rows)))
    step = max(1, STAGED_BYTES // row_bytes)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        staged = torch.empty(part.shape, dtype=stored.dtype)
        _read_all(file, staged.view(-1))
        part.copy_(staged)


def _read_all(file: FileIO, flat: Tensor) -> None:
    """Read as many bytes as a flat tensor on the CPU holds."""
    left = flat.detach().view(torch.uint8).numpy()
    while left.size:
        n_read = file.readinto(left.data)
        if not n_read:
            raise OSError("it was cut short")
        left = left[n_read:]
