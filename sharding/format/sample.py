"""A sample as it is stored: the bytes of one AOI in a shard, checked against the index and decoded."""

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

from sharding.errors import UserError
from sharding.format.index import IMAGES, JSON_SUFFIX, SampleEntry, ShardEntry
from sharding.storage import NotFoundError, Storage


class DamagedError(UserError):
    """Stored bytes are not the ones that were written."""


class Sample(NamedTuple):
    """One AOI as it is stored."""

    key: str
    """Its key in the tar."""

    aoi: str
    """Its name."""

    lr: NDArray[np.uint16]
    """[R, C, h, w] revisits in steps of ``sharding.prepare.options.STEP``."""

    clm: NDArray[np.uint8]
    """[R, 1, h, w] cloud masks: 0 clear, 1 cloud, 255 no data."""

    hr: NDArray[np.uint16]
    """[3, H, W] the target in the same steps."""

    pan: NDArray[np.uint16]
    """[1, H, W] the panchromatic image in the same steps."""

    meta: dict[str, object]
    """The JSON: dates, georeference, source digests, ``clearest`` (0-based index into ``lr``) and more."""


def key_of(aoi: str) -> str:
    """Escape an AOI's name for a tar: a key ends at its first dot there, and ``/`` would make a folder."""
    return quote(aoi, safe=" ").replace(".", "%2E")


def aoi_of(key: str) -> str:
    """Undo ``key_of``."""
    return unquote(key)


def check_span(entry: SampleEntry, span: bytes | memoryview) -> None:
    """Compare a sample's bytes with its line of the index.

    Raises:
        DamagedError: when their number or their CRC-32 is another.
    """
    if len(span) != entry.size:
        raise DamagedError(
            f"sample {entry.key!r} (AOI {entry.aoi!r}) has {len(span)} bytes where the index says "
            f"{entry.size}: the shard was cut or replaced, so shard the dataset again"
        )
    if crc32(span) != entry.crc32:
        raise DamagedError(
            f"sample {entry.key!r} (AOI {entry.aoi!r}) fails its CRC-32: the shard is damaged or was "
            "replaced, so copy or shard the dataset again"
        )


def images_of(entry: SampleEntry, span: bytes | memoryview) -> dict[str, NDArray[Any]]:
    """Return the images in a sample's bytes, views of them, by the names in ``IMAGES``."""
    images = {}
    for name in IMAGES:
        offset, length = entry.members[f"{name}.npy"]
        start = offset + _NPY_PREAMBLE.size + _NPY_PREAMBLE.unpack_from(span, offset)[-1]
        dtype, shape = _npy_header(bytes(span[offset:start]))
        count = (offset + length - start) // dtype.itemsize
        images[name] = np.frombuffer(span, dtype, count, start).reshape(shape)
    return images


_NPY_PREAMBLE = struct.Struct("<6sBBH")


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Parse what stands before an array's memory in a .npy file of version 1.0, the same for most samples."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise DamagedError("a .npy member is not of version 1.0: shard the dataset again")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise DamagedError("a .npy member holds pickled objects, which are never loaded: shard the dataset again")
    return dtype, shape


def decode_sample(entry: SampleEntry, span: bytes) -> Sample:
    """Read a sample from the bytes of its span, after checking them.

    Args:
        entry: the sample's line of the index.
        span: ``entry.size`` bytes of the shard from ``entry.offset``.

    Raises:
        DamagedError: when the size or the CRC-32 is not the index's.
    """
    check_span(entry, span)
    offset, length = entry.members[JSON_SUFFIX]
    return Sample(entry.key, entry.aoi, **images_of(entry, span), meta=json.loads(span[offset : offset + length]))


def read_sample(storage: Storage, shard: ShardEntry, entry: SampleEntry) -> Sample:
    """Fetch one sample by its span.

    Raises:
        DamagedError: when the shard is gone or is not the one of the index; it names the shard.
    """
    try:
        return decode_sample(entry, storage.read_range(shard.name, entry.offset, entry.size))
    except (DamagedError, NotFoundError) as error:
        raise DamagedError(f"{storage.uri}/{shard.name}: {error}") from error
