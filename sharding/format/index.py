"""Index of a dataset: its shards, and the byte range of every sample in them.

Writers and readers share it; it needs neither rasterio nor torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, cast

import msgspec

from sharding.errors import UserError
from sharding.format.entries import (
    BandStatistics,
    Layouts,
    SampleEntry,
    ShardEntry,
    Skipped,
    StoredShard,
    shard_from_json,
    shard_to_json,
)
from sharding.format.layout import (
    ArrayLayout,
    Facts,
    SampleLayout,
    refuse_layout,
    worldstrat_facts,
    worldstrat_layout,
)
from sharding.prepare.options import SampleOptions
from sharding.schema import Seed, Sha256, decode
from sharding.storage import BucketNotFoundError, CorruptedError, NotFoundError, Storage

FORMAT_VERSION = 3
"""Version of the index that this program writes; it adds layouts and facts to version 2, and reads both."""
READABLE = (2, FORMAT_VERSION)
SPLITS = ("train", "val", "test")
INDEX_NAME = "index.json"

Measured = Literal["lr", "hr", "pan"]
"""Images with statistics."""


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

    statistics: Mapping[Measured, BandStatistics]
    """Statistics of the training split per image (``lr``, ``hr``, ``pan``)."""

    facts: Facts
    """Facts of the dataset."""

    skipped: tuple[Skipped, ...] = ()
    """Skipped AOIs, sorted by name."""

    format_version: int = FORMAT_VERSION
    """Version of this layout."""

    appended: tuple[tuple[str, ...], ...] = ()
    """AOIs that were added to the dataset after it was made, for each addition in order."""

    @cached_property
    def data(self) -> bytes:
        """Bytes of ``index.json``: those that were read, or the canonical JSON of a new index."""
        layouts = Layouts()
        splits = {name: [shard_to_json(shard, layouts) for shard in self.splits[name]] for name in SPLITS}
        table = {
            "format_version": self.format_version,
            "preparation": self.preparation.to_json(),
            "split_rule": self.split_rule,
            "split_seed": self.split_seed,
            "plan": self.plan,
            "splits": splits,
            "statistics": self.statistics,
            "skipped": [vars(item) for item in self.skipped],
        }
        if self.format_version == 2:
            for shard in itertools.chain.from_iterable(splits.values()):
                for sample in shard["samples"]:
                    del sample["layout"]
                    sample.pop("content", None)
        else:
            facts = asdict(self.facts)
            if not self.facts.options:  # as in the indexes of earlier versions
                del facts["options"]
            table |= {"facts": facts, "layouts": layouts.to_json()}
            if self.appended:
                table["appended"] = self.appended
        return json.dumps(table, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the stored ``index.json``, in hex: it identifies the dataset and thereby every byte."""
        return hashlib.sha256(self.data).hexdigest()

    def samples(self, split: str) -> tuple[tuple[ShardEntry, SampleEntry], ...]:
        """Return a split's samples in order, each with its shard.

        Raises:
            UserError: For a split that is not in the index.
        """
        if split not in self.splits:
            raise UserError(f"no split {split!r} in the index; it has {', '.join(self.splits)}")
        return tuple((shard, sample) for shard in self.splits[split] for sample in shard.samples)

    @cached_property
    def repeats(self) -> tuple[str, ...]:
        """AOIs that occur more than once, in words: evaluation would then measure what training has seen."""
        places: dict[str, list[str]] = defaultdict(list)
        for split in SPLITS:
            for _, sample in self.samples(split):
                places[sample.aoi].append(split)
        return tuple(f"AOI {aoi!r} is in {' and '.join(found)}" for aoi, found in places.items() if len(found) > 1)

    def to_json(self) -> str:
        """Return the stored JSON: equal new indexes give equal text, and an index that was read its own."""
        return self.data.decode(errors="replace")

    @classmethod
    def from_json(cls, text: str | bytes) -> Index:
        """Parse the content of ``index.json``.

        Raises:
            UserError: If it is not an index, contradicts itself, or has another format version.
        """
        data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        try:
            version = decode(data, _Version).format_version
            if version not in READABLE:
                raise UserError(
                    f"{INDEX_NAME} has format version {version!r}, this program reads "
                    f"{' and '.join(map(str, READABLE))}: shard the dataset again"
                )
            index = cls._from(decode(data, _Stored2 if version == 2 else _Stored))
        except ValueError as error:
            raise UserError(f"{INDEX_NAME} is damaged ({error}): shard the dataset again") from error
        vars(index)["data"] = data
        return index

    @classmethod
    def _from(cls, stored: _Stored2 | _Stored) -> Index:
        preparation = SampleOptions.from_json(stored.preparation)
        facts = stored.facts if isinstance(stored, _Stored) else worldstrat_facts(preparation)
        layouts: Sequence[SampleLayout] = (
            stored.layouts if isinstance(stored, _Stored) else (worldstrat_layout(preparation),)
        )
        for number, layout in enumerate(layouts):
            try:
                refuse_layout(layout, facts, preparation.revisits, preparation.dtype)
            except ValueError as error:
                raise ValueError(f"layouts[{number}]: {error}") from None
        splits = {
            name: tuple(shard_from_json(shard, layouts) for shard in getattr(stored.splits, name)) for name in SPLITS
        }
        _refuse_namesakes([shard for shards in splits.values() for shard in shards])
        _refuse_statistics(stored.statistics, {"lr": len(facts.bands.lr), "hr": len(facts.bands.hr), "pan": 1})
        return cls(
            preparation=preparation,
            split_rule=stored.split_rule,
            split_seed=stored.split_seed,
            plan=stored.plan,
            splits=splits,
            statistics=stored.statistics,
            skipped=stored.skipped,
            facts=facts,
            format_version=stored.format_version,
            appended=stored.appended if isinstance(stored, _Stored) else (),
        )

    @classmethod
    def load(cls, storage: Storage) -> Index:
        """Read a dataset's index.

        Raises:
            UserError: If the URI holds no index, or one that cannot be read.
        """
        try:
            data = storage.read(INDEX_NAME)
        except BucketNotFoundError:
            raise
        except NotFoundError:
            raise UserError(
                f"{storage.uri} holds no {INDEX_NAME}, so it is not a dataset: "
                f"run `satfusion shard --input DIR --output {storage.uri}`"
            ) from None
        try:
            return cls.from_json(data)
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


def _refuse_namesakes(shards: Sequence[ShardEntry]) -> None:
    """Refuse two different shards of one name."""
    by_name: dict[str, ShardEntry] = {}
    for shard in shards:
        if by_name.setdefault(shard.name, shard).sha256 != shard.sha256:
            raise ValueError(f"the shard {shard.name!r} stands there twice with different content")


def _refuse_statistics(statistics: Mapping[Measured, BandStatistics], bands: Mapping[Measured, int]) -> None:
    """Refuse statistics that have not one number a band."""
    for image, table in statistics.items():
        for name, values in (*table.items(), *table["percentiles"].items()):
            if name != "percentiles" and len(cast(list[float], values)) != bands[image]:
                raise ValueError(f"statistics.{image}: {name!r} has not one number for each of {bands[image]} bands")


class _Splits(msgspec.Struct):
    train: tuple[StoredShard, ...]
    val: tuple[StoredShard, ...]
    test: tuple[StoredShard, ...]


class _Version(msgspec.Struct):
    format_version: int


class _Stored2(msgspec.Struct):
    """Schema of format 2."""

    format_version: int
    preparation: dict[str, Any]
    split_rule: Literal["published", "seeded"]
    split_seed: Seed
    plan: Sha256
    splits: _Splits
    statistics: Mapping[Measured, BandStatistics]
    skipped: tuple[Skipped, ...]


class _Stored(_Stored2, kw_only=True):
    """Schema of format 3."""

    facts: Facts
    layouts: tuple[dict[str, ArrayLayout], ...]
    appended: tuple[tuple[str, ...], ...] = ()
