"""Shard writer: packs samples into one tar file, whose bytes depend only on the samples, and makes its index entry."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from sharding.format.checks import key_of
from sharding.format.entries import JSON_SUFFIX, ByteRange, Content, SampleEntry, ShardEntry
from sharding.format.layout import ArrayLayout, Dtype

OWNER = "bigdata"
MODE = 0o444
"""Mode of each member, as WebDataset's writer sets it."""

Buffer = bytes | memoryview


@dataclass(frozen=True)
class NewSample:
    """Sample that is ready to be written."""

    aoi: str
    """The AOI's name."""

    images: Mapping[str, NDArray[np.generic]]
    """Images by name: ``lr``, ``clm``, ``hr``, ``pan``."""

    meta: Mapping[str, object]
    """Content of the sample's JSON."""

    content: Content | None = None
    """Findings on what it shows."""

    bytes_in: int = 0
    """Size of the source files that were read for it."""

    passed: tuple[str, ...] = ()
    """Reasons why revisits of the AOI were passed over."""


class ShardWriter:
    """Writer of a tar, byte for byte as WebDataset's writer; it computes the SHA-256 while it writes.

    The library copies each array three times; this class writes the array's memory directly (docs/experiments.md).

    Args:
        file: Destination; it is only written to, sequentially.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0
        self._digest = hashlib.sha256()
        self._samples: list[SampleEntry] = []

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def add(self, sample: NewSample) -> None:
        """Append a sample, with its members sorted by suffix."""
        key = key_of(sample.aoi)
        members: dict[str, list[Buffer]] = {f"{name}.npy": _npy(image) for name, image in sample.images.items()}
        members[JSON_SUFFIX] = [json.dumps(sample.meta, sort_keys=True).encode()]
        start, crc = self._size, 0
        ranges: dict[str, ByteRange] = {}
        for suffix, payload in sorted(members.items()):
            length = sum(len(part) for part in payload)
            header = _header(f"{key}.{suffix}", length)
            ranges[suffix] = (self._size - start + len(header), length)
            for part in (header, *payload, bytes(-length % tarfile.BLOCKSIZE)):
                crc = crc32(part, crc)
                self._write(part)
        layout = {name: ArrayLayout(image.shape, cast(Dtype, image.dtype.str)) for name, image in sample.images.items()}
        self._samples.append(
            SampleEntry(key, sample.aoi, start, self._size - start, crc, ranges, layout, sample.content)
        )

    def finish(self, name: str) -> ShardEntry:
        """Write the end of the tar and return its index entry with the key ``name``."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._size + end) % tarfile.RECORDSIZE))
        self._file.flush()
        return ShardEntry(name, self._size, self._digest.hexdigest(), tuple(self._samples))

    def _write(self, data: Buffer) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._size += len(data)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, MODE, OWNER, OWNER
    return info.tobuf()


def _npy(image: NDArray[np.generic]) -> list[Buffer]:
    """Return header and memory of an array, as in a .npy file."""
    image = np.ascontiguousarray(image)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(image))
    return [header.getvalue(), image.reshape(-1).view(np.uint8).data]
