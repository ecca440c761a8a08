"""Datasets of one geometry as one: their shards side by side, each dataset with its passes per epoch.

The parts of a mix are numbered. Shards, samples and AOIs get their part's number before their names, so that an AOI
may be in several parts; by that number a reader finds the part of a shard.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from pipeline.config import split_weight
from sharding.errors import UserError
from sharding.format.entries import ShardEntry
from sharding.format.index import SPLITS, Index
from sharding.run.groups import overlaps, rectangle
from sharding.storage import Fill, open_storage

logger = logging.getLogger(__name__)


class Retries(Protocol):
    """Counter of retries."""

    @property
    def total(self) -> int:
        """Total number of retries."""
        ...


class SampleStore(Protocol):
    """What the path of the data uses of a storage."""

    request_bytes: int
    """Bytes worth reading by one request; 0 if requests cost nothing."""

    @property
    def uri(self) -> str:
        """Place of the dataset."""
        ...

    @property
    def retries(self) -> Retries:
        """Retries in this process."""
        ...

    def read_into(self, key: str, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; return the number of bytes."""
        ...

    def open_range(self, key: str, offset: int, length: int) -> AbstractContextManager[Fill]:
        """Open bytes that are read into one buffer after the other, by one request."""
        ...


@dataclass(frozen=True)
class Opened:
    """A dataset, or several as one."""

    storage: SampleStore
    """Place of its shards."""

    index: Index
    """Its index; that of a mix is never stored."""

    weights: tuple[float, ...] = ()
    """Passes per epoch over the shards of each part; empty for one pass over a single dataset."""

    def passes(self, shards: Sequence[ShardEntry]) -> tuple[float, ...]:
        """Return the passes per epoch over each of these shards; empty if all have one."""
        if not self.weights:
            return ()
        return tuple(self.weights[int(shard.name.partition("/")[0])] for shard in shards)


def open_dataset(uri: str | Sequence[str], wait_seconds: float | None = None) -> Opened:
    """Open the dataset at a URI, or the mix of a list of ``URI`` or ``URI*weight``.

    Args:
        uri: The URI or the list.
        wait_seconds: Time that a store which is away is waited for (`open_storage`), seconds.

    Raises:
        UserError: No dataset there, or datasets that cannot be mixed; the message names what differs.
    """
    if isinstance(uri, str):
        storage = open_storage(uri, wait_seconds=wait_seconds)
        return Opened(storage, Index.load(storage))
    named = [split_weight(text) for text in uri]
    parts = [open_storage(name, wait_seconds=wait_seconds) for name, _ in named]
    indexes = [Index.load(part) for part in parts]
    weights = tuple(weight for _, weight in named)
    for part, index in zip(parts[1:], indexes[1:], strict=True):
        _refuse_other_geometry(parts[0].uri, indexes[0], part.uri, index)
    _refuse_leaks([part.uri for part in parts], indexes)
    return Opened(MixedStore(parts), _mixed(indexes, weights), weights)


class MixedStore:
    """Places of the parts of a mix; a key begins with the number of its part."""

    def __init__(self, parts: Sequence[SampleStore]) -> None:
        """Join ``parts``."""
        self._parts = tuple(parts)
        self.request_bytes = max(part.request_bytes for part in parts)

    @property
    def uri(self) -> str:
        """Return the places, each with its number."""
        return ", ".join(f"{number} = {part.uri}" for number, part in enumerate(self._parts))

    @property
    def retries(self) -> Retries:
        """Return the retries of all parts."""
        return _AllRetries([part.retries for part in self._parts])

    def read_into(self, key: str, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from the part that the key names."""
        part, name = self._part(key)
        return part.read_into(name, offset, buffer)

    def open_range(self, key: str, offset: int, length: int) -> AbstractContextManager[Fill]:
        """Open bytes of the part that the key names."""
        part, name = self._part(key)
        return part.open_range(name, offset, length)

    def _part(self, key: str) -> tuple[SampleStore, str]:
        number, _, name = key.partition("/")
        return self._parts[int(number)], name


@dataclass(frozen=True)
class _AllRetries:
    """Sum of the retries of several storages."""

    parts: Sequence[Retries]

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)


def _mixed(indexes: Sequence[Index], weights: Sequence[float]) -> Index:
    """Return an index of all shards; its digest is one of the parts' digests and weights."""
    splits = {
        split: tuple(_renamed(shard, number) for number, index in enumerate(indexes) for shard in index.splits[split])
        for split in SPLITS
    }
    described = [[index.digest, weight] for index, weight in zip(indexes, weights, strict=True)]
    data = json.dumps(described, separators=(",", ":")).encode()
    mixed = replace(indexes[0], splits=splits, plan=hashlib.sha256(data).hexdigest(), skipped=(), appended=())
    vars(mixed)["data"] = data  # in place of the JSON of an index, which later versions may write differently
    return mixed


def _renamed(shard: ShardEntry, number: int) -> ShardEntry:
    samples = (replace(sample, key=f"{number}/{sample.key}", aoi=f"{number}/{sample.aoi}") for sample in shard.samples)
    return replace(shard, name=f"{number}/{shard.name}", samples=tuple(samples))


def _refuse_other_geometry(first: str, one: Index, second: str, other: Index) -> None:
    """Refuse datasets whose chips do not fit into one batch, or mean something else."""
    compared = {
        "bands of the revisits": (one.facts.bands.lr, other.facts.bands.lr),
        "bands of the target": (one.facts.bands.hr, other.facts.bands.hr),
        "revisits": (one.preparation.revisits, other.preparation.revisits),
        "ratio": (one.facts.ratio, other.facts.ratio),
        "chips": (one.facts.chips, other.facts.chips),
        "radiometry": (one.facts.radiometry, other.facts.radiometry),
        "type of values": (one.preparation.dtype, other.preparation.dtype),
        "masks": (one.facts.masks, other.facts.masks),
    }
    differs = [f"{name} ({a} and {b})" for name, (a, b) in compared.items() if a != b]
    if differs:
        raise UserError(
            f"data.uri mixes {first} and {second}, which differ in {'; '.join(differs)}: give datasets of one geometry"
        )


def _refuse_leaks(uris: Sequence[str], indexes: Sequence[Index]) -> None:
    """Refuse an AOI that one dataset trains on and another one validates or tests on; name overlapping land."""
    found: dict[str, tuple[int, str]] = {}
    places, splits = {}, {}
    for number, index in enumerate(indexes):
        for split in SPLITS:
            for _, entry in index.samples(split):
                before, where = found.setdefault(entry.aoi, (number, split))
                if where != split:
                    raise UserError(
                        f"data.uri: AOI {entry.aoi!r} is in {where} of {uris[before]} and in {split} of {uris[number]}:"
                        " shard them with the same split, or leave it out of one by --aois"
                    )
                if entry.content is not None and entry.content.land is not None:
                    places[f"{number}/{entry.aoi}"] = rectangle(entry.content.land)
                    splits[f"{number}/{entry.aoi}"] = split
    across = (
        (one, other)
        for one, other in overlaps(places)
        if splits[one] != splits[other] and one.partition("/")[0] != other.partition("/")[0]
    )
    if pairs := list(itertools.islice(across, 1)):
        one, other = pairs[0]
        logger.warning(
            "data.uri: AOI %s in %s and %s in %s show the same land, so scores are of land that was trained on",
            *(one, splits[one], other, splits[other]),
        )
