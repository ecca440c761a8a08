"""Entries of an index: samples and shards, and their tables in JSON, in indexes and in sidecars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

from sharding.format.checks import refuse_key, refuse_members, refuse_name, refuse_overlap
from sharding.format.layout import IMAGES, MOST_SAMPLE_BYTES, ArrayLayout, SampleLayout
from sharding.schema import Natural, Positive, Sha256

JSON_SUFFIX = "json"
SUFFIXES = (*(f"{name}.npy" for name in IMAGES), JSON_SUFFIX)

ByteRange = tuple[Natural, Natural]
"""(offset, length) in bytes."""

Values = list[Annotated[float, Meta(ge=-1e12, le=1e12)]]


class BandStatistics(TypedDict):
    """Statistics over all pixels (and revisits) of the training split, one number per band, in reflectance."""

    mean: Values
    std: Values
    min: Values
    max: Values
    percentiles: dict[str, Values]
    """Values per percentage, ``"1"`` to ``"99"``."""


Degrees = Annotated[float, Meta(ge=-1000, le=1000)]
Correlation = Annotated[float, Meta(ge=-1, le=1)]


@dataclass(frozen=True)
class Content:
    """Findings on what a sample shows."""

    correlation: Correlation | None
    """Correlation of the revisits' median with the target on the LR grid, the mean over bands; None if unknown."""

    distance: Annotated[float, Meta(ge=0, le=1e9)] | None
    """Median absolute difference of the two, reflectance; None if unknown."""

    revisits: tuple[Correlation | None, ...]
    """Correlation of each revisit with the target."""

    land: tuple[Degrees, Degrees, Degrees, Degrees] | None
    """West, south, east, north in EPSG:4326; None if unknown."""


def agreement_bin(correlation: float) -> str:
    """Return the name of a correlation's bin in a histogram: ``below 0``, or its first value, ``0.0`` to ``0.9``."""
    return "below 0" if correlation < 0 else f"{min(9, int(correlation * 10)) / 10:.1f}"


@dataclass(frozen=True)
class SampleEntry:
    """Place of one sample in its shard."""

    key: str
    """Its key in the tar: the AOI's name, escaped."""

    aoi: str
    """The AOI's name, not escaped."""

    offset: int
    """First byte of the sample in the shard: the header of its first member."""

    size: int
    """Bytes of the sample, headers and padding included."""

    crc32: int
    """CRC-32 of these bytes."""

    members: Mapping[str, ByteRange]
    """Payloads per suffix (``lr.npy`` ...) as (offset, length); offsets count from the sample's first byte."""

    layout: SampleLayout
    """Layout of its arrays."""

    content: Content | None = None
    """Findings on what it shows; None in older datasets."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard, a tar file."""

    name: str
    """Its key beside the index; shards of one plan may share a folder."""

    bytes: int
    """Its size in bytes."""

    sha256: str
    """SHA-256 of the whole file, in hex."""

    samples: tuple[SampleEntry, ...]
    """Its samples in file order."""


@dataclass(frozen=True)
class Skipped:
    """An AOI that is in no split."""

    aoi: str
    """Its name."""

    reason: str
    """Short code, such as ``too-few-revisits``."""

    detail: str
    """The finding, in words."""


class Layouts:
    """Table of the distinct layouts of samples; a sample stores a layout's number in it."""

    def __init__(self) -> None:
        self._found: dict[tuple[tuple[str, ArrayLayout], ...], int] = {}

    def number(self, layout: SampleLayout) -> int:
        """Return the number of a layout; a new one is added to the table."""
        return self._found.setdefault(tuple(sorted(layout.items())), len(self._found))

    def to_json(self) -> list[dict[str, object]]:
        """Return the table for JSON."""
        return [{name: asdict(array) for name, array in layout} for layout in self._found]


def shard_to_json(shard: ShardEntry, layouts: Layouts) -> dict[str, Any]:
    """Convert a shard's entry to a table for JSON; its layouts are added to ``layouts``."""
    return {**vars(shard), "samples": [_sample_to_json(sample, layouts) for sample in shard.samples]}


def _sample_to_json(sample: SampleEntry, layouts: Layouts) -> dict[str, Any]:
    table = {**vars(sample), "layout": layouts.number(sample.layout)}
    if sample.content is None:
        del table["content"]
    else:
        table["content"] = asdict(sample.content)
    return table


class StoredSample(msgspec.Struct):
    """Schema of a sample's table."""

    key: Annotated[str, Meta(min_length=1, max_length=4096)]
    aoi: Annotated[str, Meta(min_length=1, max_length=4096)]
    offset: Natural
    size: Annotated[int, Meta(ge=1, le=MOST_SAMPLE_BYTES)]
    crc32: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    members: dict[str, ByteRange]
    layout: Natural = 0
    """Number in the table of layouts; format 2 has a single one."""
    content: Content | None = None


class StoredShard(msgspec.Struct):
    """Schema of a shard's table."""

    name: Annotated[str, Meta(min_length=1, max_length=255)]
    bytes: Positive
    sha256: Sha256
    samples: tuple[StoredSample, ...]


def shard_from_json(shard: StoredShard, layouts: Sequence[SampleLayout]) -> ShardEntry:
    """Return a shard's entry.

    Raises:
        ValueError: If it contradicts itself; the message names the sample.
    """
    refuse_name(shard.name)
    try:
        samples = tuple(_sample_from_json(item, layouts) for item in shard.samples)
        refuse_overlap([(item.key, item.offset, item.size) for item in samples], shard.bytes, "sample")
    except ValueError as error:
        raise ValueError(f"{shard.name}: {error}") from None
    return ShardEntry(shard.name, shard.bytes, shard.sha256, samples)


def _sample_from_json(item: StoredSample, layouts: Sequence[SampleLayout]) -> SampleEntry:
    try:
        refuse_key(item.key, item.aoi)
        if item.layout >= len(layouts):
            raise ValueError(f"it has layout {item.layout} of {len(layouts)}")
        layout = layouts[item.layout]
        refuse_members(item.members, layout, item.size)
    except ValueError as error:
        raise ValueError(f"sample {item.key!r}: {error}") from None
    return SampleEntry(item.key, item.aoi, item.offset, item.size, item.crc32, item.members, layout, item.content)
