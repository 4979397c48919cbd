"""The bytes of the voxels: streamed in blocks, with their number and checksum checked."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from effseg.errors import DataError
from effseg.io.header import Header, unreadable

BLOCK_BYTES = 2**20


def payload(path: Path, header: Header, *, channel: int | None = None) -> Iterator[bytes]:
    """The stored voxels in blocks: of all channels, or of one that is not interleaved.

    A packed stream is inflated to its end in any case, so that its checksum counts.

    Raises:
        DataError: if the file is cut, corrupt, or longer than its header says.
    """
    first, last = 0, header.payload_bytes
    if channel is not None and not header.interleaved:
        first, last = channel * header.channel_bytes, (channel + 1) * header.channel_bytes
    try:
        with path.open("rb") as file:
            file.seek(header.start)
            if header.packed:
                yield from _packed(path, file, header, first=first, last=last)
            else:
                file.seek(header.start + first)
                yield from _raw(path, file, last - first)
    except OSError as error:
        raise unreadable(path, error) from error


def inflate(path: Path, file: BinaryIO, *, block: int = BLOCK_BYTES) -> Iterator[bytes]:
    """What a zlib or gzip stream holds, from where `file` stands to its end.

    Gzip members that follow one another are joined, as RFC 1952 has it. No step takes more than
    `block` bytes of memory for what comes out, however well it was packed.

    Raises:
        DataError: if the stream is cut or corrupt, or is followed by something else.
    """
    n_out, raw = 0, file.read(block)
    if not raw:
        raise DataError(f"{path}: is cut: no compressed data; get the file again")
    while raw:
        # 47: 15 bits of window, 32 to tell zlib from gzip by its first bytes
        member = zlib.decompressobj(wbits=47)
        while not member.eof:
            try:
                out = member.decompress(raw, block)
            except zlib.error as error:
                raise DataError(
                    f"{path}: corrupt compressed data after {n_out} bytes of voxels and header "
                    f"({str(error).rpartition(': ')[2]}); get the file again"
                ) from error
            raw = member.unconsumed_tail or (b"" if member.eof else file.read(block))
            if not (out or raw or member.eof):
                raise DataError(
                    f"{path}: is cut: the compressed data end after {n_out} bytes of voxels and "
                    "header; get the file again"
                )
            n_out += len(out)
            if out:
                yield out
        raw = member.unused_data or file.read(block)


def _packed(
    path: Path, file: BinaryIO, header: Header, *, first: int, last: int
) -> Iterator[bytes]:
    expected = header.skip + header.payload_bytes
    first, last = header.skip + first, header.skip + last
    at = 0
    for block in inflate(path, file):
        wanted = block[max(0, first - at) : max(0, last - at)]
        at += len(block)
        if at > expected:
            break
        if wanted:
            yield wanted
    if at != expected:
        wrong = "has bytes left over" if at > expected else "is cut"
        found = f"more than {expected}" if at > expected else at
        raise DataError(
            f"{path}: {wrong}: inflates to {found} bytes, expected {expected} for "
            f"{header.n_channels} channel(s) of {header.grid.shape} voxels (z, y, x) of "
            f"{header.dtype}; get the file again"
        )


def _raw(path: Path, file: BinaryIO, n_bytes: int) -> Iterator[bytes]:
    left = n_bytes
    while left:
        block = file.read(min(left, BLOCK_BYTES))
        if not block:
            raise DataError(f"{path}: is cut: {left} of {n_bytes} bytes are missing")
        left -= len(block)
        yield block
