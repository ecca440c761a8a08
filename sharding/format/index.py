"""Index of a dataset: its shards, and the byte range of every sample in them.

Writers and readers share it; it needs neither rasterio nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict, cast

from sharding.errors import UserError
from sharding.prepare.options import SampleOptions
from sharding.storage import BucketNotFoundError, CorruptedError, NotFoundError, Storage

FORMAT_VERSION = 2
SPLITS = ("train", "val", "test")
HR_BANDS = 3
"""Bands of the targets: red, green, blue."""
INDEX_NAME = "index.json"
IMAGES = ("lr", "clm", "hr", "pan")
JSON_SUFFIX = "json"
SUFFIXES = (*(f"{name}.npy" for name in IMAGES), JSON_SUFFIX)

ByteRange = tuple[int, int]
"""(offset, length) in bytes."""


class BandStatistics(TypedDict):
    """Statistics over all pixels (and revisits) of the training split, one number per band, in reflectance."""

    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    percentiles: dict[str, list[float]]
    """Values per percentage, ``"1"`` to ``"99"``."""


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


@dataclass(frozen=True)
class ShardEntry:
    """One shard, a tar file."""

    name: str
    """Its key beside the index."""

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


@dataclass(frozen=True)
class Index:
    """Table of contents of a dataset; its presence makes a folder or prefix a dataset."""

    preparation: SampleOptions
    """Options by which the samples were prepared."""

    split_rule: str
    """Rule of the split: ``published`` (the split file) or ``seeded``."""

    split_seed: int
    """Seed of the seeded rule's permutation and of the order of samples."""

    plan: str
    """SHA-256, in hex, of the plan: the options, and the names and sizes of the source's files."""

    splits: Mapping[str, tuple[ShardEntry, ...]]
    """Shards of each split, in order."""

    statistics: Mapping[str, BandStatistics]
    """Statistics of the training split per image (``lr``, ``hr``, ``pan``)."""

    skipped: tuple[Skipped, ...] = ()
    """Skipped AOIs, sorted by name."""

    format_version: int = FORMAT_VERSION
    """Version of this layout."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the stored ``index.json``, in hex: it identifies the dataset and thereby every byte."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def samples(self, split: str) -> tuple[tuple[ShardEntry, SampleEntry], ...]:
        """Return a split's samples in order, each with its shard.

        Raises:
            UserError: For a split that is not in the index.
        """
        if split not in self.splits:
            raise UserError(f"no split {split!r} in the index; it has {', '.join(self.splits)}")
        return tuple((shard, sample) for shard in self.splits[split] for sample in shard.samples)

    def to_json(self) -> str:
        """Return the canonical JSON: equal indexes give equal text."""
        return json.dumps(
            {
                "format_version": self.format_version,
                "preparation": self.preparation.to_json(),
                "split_rule": self.split_rule,
                "split_seed": self.split_seed,
                "plan": self.plan,
                "splits": {name: list(map(shard_to_json, shards)) for name, shards in self.splits.items()},
                "statistics": self.statistics,
                "skipped": [vars(item) for item in self.skipped],
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Index:
        """Parse the text of ``to_json``.

        Raises:
            UserError: If it is not an index, or has another format version.
        """
        try:
            data = json.loads(text)
            if data["format_version"] != FORMAT_VERSION:
                raise UserError(
                    f"{INDEX_NAME} has format version {data['format_version']!r}, this program reads "
                    f"{FORMAT_VERSION}: shard the dataset again"
                )
            return cls(
                format_version=data["format_version"],
                preparation=SampleOptions.from_json(data["preparation"]),
                split_rule=data["split_rule"],
                split_seed=data["split_seed"],
                plan=data["plan"],
                splits={name: tuple(map(shard_from_json, data["splits"][name])) for name in SPLITS},
                statistics={
                    name: cast(BandStatistics, _table(bands, BandStatistics.__required_keys__))
                    for name, bands in data["statistics"].items()
                },
                skipped=tuple(Skipped(**item) for item in data["skipped"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{INDEX_NAME} is damaged ({type(error).__name__}: {error}): shard the dataset again"
            ) from error

    @classmethod
    def load(cls, storage: Storage) -> Index:
        """Read a dataset's index.

        Raises:
            UserError: If the URI holds no index, or one that cannot be read.
        """
        try:
            text = storage.read(INDEX_NAME).decode("utf-8", errors="replace")
        except BucketNotFoundError:
            raise
        except NotFoundError:
            raise UserError(
                f"{storage.uri} holds no {INDEX_NAME}, so it is not a dataset: "
                f"run `satfusion shard --input DIR --output {storage.uri}`"
            ) from None
        try:
            return cls.from_json(text)
        except UserError as error:
            raise UserError(f"{storage.uri}: {error}") from error


GONE = "is missing"
"""Result of `damage_of` for a shard that does not exist."""


def damage_of(output: Storage, entry: ShardEntry) -> str | None:
    """Compare a stored shard with its entry in the index; return its damage in words, or None."""
    digest, size = hashlib.sha256(), 0
    try:
        for data in output.stream(entry.name):
            digest.update(data)
            size += len(data)
    except NotFoundError:
        return GONE
    except CorruptedError:
        return "does not match the store's checksum"
    if size != entry.bytes:
        return f"has {size} bytes where {entry.bytes} were written"
    if digest.hexdigest() != entry.sha256:
        return "does not match the SHA-256 of the bytes that were written"
    return None


def _table(data: object, keys: Iterable[str]) -> dict[str, object]:
    """Return a JSON object after a check of its keys; TypeError for another value, KeyError for a missing key."""
    if not isinstance(data, dict):
        raise TypeError(f"a table is needed where {type(data).__name__} stands")
    for key in keys:
        data[key]
    return data


def shard_to_json(shard: ShardEntry) -> dict[str, object]:
    """Convert a shard's entry to a table for JSON."""
    return {**vars(shard), "samples": [vars(sample) for sample in shard.samples]}


def shard_from_json(data: dict[str, object]) -> ShardEntry:
    """Parse a table of ``shard_to_json``; TypeError, KeyError or AttributeError for another table."""
    samples = cast(list[dict[str, object]], data["samples"])
    return ShardEntry(**{**data, "samples": tuple(map(_sample_from_json, samples))})  # type: ignore[arg-type]


def _sample_from_json(data: dict[str, object]) -> SampleEntry:
    members = cast(dict[str, list[int]], _table(data["members"], SUFFIXES))
    ranges = {suffix: (offset, size) for suffix, (offset, size) in members.items()}
    return SampleEntry(**{**data, "members": ranges})  # type: ignore[arg-type]
