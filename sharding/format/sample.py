"""Stored samples: the bytes of one AOI in a shard, checked against the index and decoded."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, cast

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from sharding.format.checks import NPY_PREAMBLE
from sharding.format.entries import JSON_SUFFIX, SampleEntry, ShardEntry
from sharding.format.layout import DTYPES, ArrayLayout, Dtype
from sharding.schema import Natural, decode, refuse_deep
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

    valid: NDArray[np.uint8] | None = None
    """[1, H, W] mask of the pixels whose target and PAN hold data, 1 or 0; None in datasets that store none."""


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
    """Return the images of a sample as views of its bytes, by name.

    Each header is compared with the index's layout, and the length of its array with the member's, before anything is
    allocated.

    Raises:
        CorruptedError: If a member is not the array that the index says.
    """
    images = {}
    for name, layout in entry.layout.items():
        offset, length = entry.members[f"{name}.npy"]
        member = memoryview(data)[offset : offset + length]
        try:
            dtype, shape, start = _npy_header(bytes(member[: _header_end(member)]))
            if not layout.fits(shape, dtype):
                raise CorruptedError(f"it is {ArrayLayout(shape, dtype)}, and the index says {layout}")
            count = math.prod(shape)
            if start + count * DTYPES[dtype] != length:
                raise CorruptedError(f"it has {length} bytes, and its header says {start + count * DTYPES[dtype]}")
        except CorruptedError as error:
            raise CorruptedError(
                f"sample {entry.key!r} (AOI {entry.aoi!r}): {name}.npy cannot be read, since {error}: "
                "shard the dataset again"
            ) from None
        images[name] = np.frombuffer(member, dtype, count, start).reshape(shape)
    return images


# As numpy writes it. Nothing else is parsed, so that no header costs more than its bytes.
_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>\|u1|<u2|<f4|\|O)', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:[0-9]{1,10}, ?)*[0-9]{0,10})\), \} *\n"
)


def _header_end(member: memoryview) -> int:
    """Return the end of a .npy file's header."""
    if len(member) < NPY_PREAMBLE or bytes(member[:8]) != b"\x93NUMPY\x01\x00":
        raise CorruptedError("it is no .npy file of version 1.0")
    return NPY_PREAMBLE + int.from_bytes(member[8:NPY_PREAMBLE], "little")


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[Dtype, tuple[int, ...], int]:
    """Parse the header of a .npy file; cached, since most samples have the same headers.

    Returns:
        Type of the values, shape, and length of the header.
    """
    found = _NPY_HEADER.fullmatch(header, NPY_PREAMBLE)
    if found is None:
        raise CorruptedError("its header is not one that this program writes")
    if found["fortran"] == b"True":
        raise CorruptedError("its values are in Fortran order")
    if found["dtype"] == b"|O":
        raise CorruptedError("it holds pickled objects, which are never loaded")
    shape = tuple(int(size) for size in found["shape"].split(b",") if size.strip())
    return cast(Dtype, found["dtype"].decode()), shape, len(header)


def decode_sample(entry: SampleEntry, data: bytes) -> Sample:
    """Check a sample's bytes and decode them.

    Args:
        entry: The sample's entry in the index.
        data: ``entry.size`` bytes of the shard from ``entry.offset``.

    Raises:
        CorruptedError: If the size, the CRC-32 or an array differs from the index, or the JSON is not a sample's.
    """
    check_sample(entry, data)
    images = images_of(entry, data)
    return Sample(entry.key, entry.aoi, **images, meta=_meta_of(entry, data, len(images["lr"])))


def _meta_of(entry: SampleEntry, data: bytes | memoryview, revisits: int) -> dict[str, Any]:
    """Return the JSON of a sample with ``revisits`` revisits; CorruptedError if it is not a sample's."""
    clearest_of(entry, data)
    try:
        text = _json_of(entry, data)
        found = len(decode(text, _Meta).revisits)
        if found != revisits:
            raise ValueError(f"revisits: expected {revisits}, got {found}")
        meta = decode(text, dict[str, Any])
        refuse_deep(meta)
    except ValueError as error:
        raise _damaged_json(entry, error) from None
    return meta


def clearest_of(entry: SampleEntry, data: bytes | memoryview) -> int:
    """Return the clearest revisit of a sample, 0-based, as its JSON says.

    Raises:
        CorruptedError: If the JSON is not a sample's.
    """
    revisits = entry.layout["lr"].shape[0]
    try:
        clearest = clearest_in(_json_of(entry, data))
        if revisits is not None and clearest >= revisits:
            raise ValueError(f"clearest: expected a number below {revisits}, got {clearest}")
    except ValueError as error:
        raise _damaged_json(entry, error) from None
    return clearest


def clearest_in(text: bytes) -> int:
    """Return the clearest revisit that a sample's JSON names, 0-based; ValueError if it names none."""
    return decode(text, _Clearest).clearest


def _damaged_json(entry: SampleEntry, error: ValueError) -> CorruptedError:
    return CorruptedError(
        f"sample {entry.key!r} (AOI {entry.aoi!r}): its JSON is damaged ({error}): shard the dataset again"
    )


def _json_of(entry: SampleEntry, data: bytes | memoryview) -> bytes:
    offset, length = entry.members[JSON_SUFFIX]
    return bytes(data[offset : offset + length])


class _Clearest(msgspec.Struct):
    """Schema of what training uses of a sample's JSON."""

    clearest: Natural


class _Revisit(msgspec.Struct):
    date: str | None


_Number = Annotated[float, Meta(ge=-1e300, le=1e300)]


class _Meta(msgspec.Struct):
    """Schema of what `inspect` and `predict` use of a sample's JSON."""

    revisits: tuple[_Revisit, ...]
    step: Annotated[float, Meta(gt=0, le=1e6)]
    # An authority's code or WKT, as rasterio writes them; nothing that names a file. Early versions wrote "None".
    crs: Annotated[str, Meta(pattern=r"^([A-Za-z]\w*:[\w.]+|[A-Z_]+\[[^\x00-\x1f]*\]|None)$")] | None
    pan_transform: tuple[_Number, _Number, _Number, _Number, _Number, _Number]


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
