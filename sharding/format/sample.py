"""Stored samples: the bytes of one AOI in a shard, checked against the index and decoded."""

from __future__ import annotations

import io
import json
import struct
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from sharding.format.index import IMAGES, JSON_SUFFIX, SampleEntry, ShardEntry
from sharding.storage import CorruptedError, NotFoundError, Storage


class Sample(NamedTuple):
    """One decoded sample, the stored form of an AOI."""

    key: str
    """Its key in the tar."""

    aoi: str
    """The AOI's name."""

    lr: NDArray[np.uint16]
    """[R, C, h, w] revisits in steps of ``sharding.prepare.options.STEP``."""

    clm: NDArray[np.uint8]
    """[R, 1, h, w] cloud masks: 0 clear, 1 cloud, 255 no data."""

    hr: NDArray[np.uint16]
    """[3, H, W] target in the same steps."""

    pan: NDArray[np.uint16]
    """[1, H, W] panchromatic image in the same steps."""

    meta: dict[str, object]
    """JSON of the sample: dates, georeference, source digests, ``clearest`` (0-based index into ``lr``) and more."""


def key_of(aoi: str) -> str:
    """Escape an AOI's name for a tar, where a key ends at its first dot and ``/`` would make a folder."""
    return quote(aoi, safe=" ").replace(".", "%2E")


def aoi_of(key: str) -> str:
    """Return the AOI's name of a key; the inverse of ``key_of``."""
    return unquote(key)


def check_sample(entry: SampleEntry, data: bytes | memoryview) -> None:
    """Compare a sample's bytes with its entry in the index.

    Raises:
        CorruptedError: If the size or the CRC-32 differs.
    """
    if len(data) != entry.size:
        raise CorruptedError(
            f"sample {entry.key!r} (AOI {entry.aoi!r}) has {len(data)} bytes where the index says "
            f"{entry.size}: the shard was cut or replaced, so shard the dataset again"
        )
    if crc32(data) != entry.crc32:
        raise CorruptedError(
            f"sample {entry.key!r} (AOI {entry.aoi!r}) fails its CRC-32: the shard is damaged or was "
            "replaced, so copy or shard the dataset again"
        )


def images_of(entry: SampleEntry, data: bytes | memoryview) -> dict[str, NDArray[Any]]:
    """Return the images of a sample as views of its bytes, by the names in ``IMAGES``."""
    images = {}
    for name in IMAGES:
        offset, length = entry.members[f"{name}.npy"]
        start = offset + _NPY_PREAMBLE.size + _NPY_PREAMBLE.unpack_from(data, offset)[-1]
        dtype, shape = _npy_header(bytes(data[offset:start]))
        count = (offset + length - start) // dtype.itemsize
        images[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
    return images


_NPY_PREAMBLE = struct.Struct("<6sBBH")


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Parse the header of a .npy file of version 1.0; cached, since most samples have the same headers."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise CorruptedError("a .npy member is not of version 1.0: shard the dataset again")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise CorruptedError("a .npy member holds pickled objects, which are never loaded: shard the dataset again")
    return dtype, shape


def decode_sample(entry: SampleEntry, data: bytes) -> Sample:
    """Check a sample's bytes and decode them.

    Args:
        entry: The sample's entry in the index.
        data: ``entry.size`` bytes of the shard from ``entry.offset``.

    Raises:
        CorruptedError: If the size or the CRC-32 differs from the index.
    """
    check_sample(entry, data)
    offset, length = entry.members[JSON_SUFFIX]
    return Sample(entry.key, entry.aoi, **images_of(entry, data), meta=json.loads(data[offset : offset + length]))


def fetch_sample(storage: Storage, shard: ShardEntry, entry: SampleEntry) -> Sample:
    """Read one sample by its byte range, check and decode it: for `verify`, `inspect` and tests.

    Training reads with `pipeline.data.sample_reader`, into buffers that are reused.

    Raises:
        CorruptedError: If the shard is missing or differs from the index; it names the shard.
    """
    try:
        return decode_sample(entry, storage.read_range(shard.name, entry.offset, entry.size))
    except (CorruptedError, NotFoundError) as error:
        raise CorruptedError(f"{storage.uri}/{shard.name}: {error}") from error
