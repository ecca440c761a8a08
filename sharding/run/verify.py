"""Verification of a dataset: its bytes against the index, and some samples against the source."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sharding.errors import UnusableError, UserError
from sharding.format.entries import SampleEntry, ShardEntry
from sharding.format.index import GONE, INDEX_NAME, SPLITS, Index, damage_of
from sharding.format.sample import Sample, decode_sample, fetch_sample
from sharding.format.writer import NewSample
from sharding.progress import progress
from sharding.run.groups import leaks
from sharding.schema import convert
from sharding.sources.options import SourceOptions
from sharding.storage import CorruptedError, Storage

PARALLEL = 4
"""Shards read in parallel: enough to keep a network busy, few enough for a disk."""


@dataclass(frozen=True)
class Problem:
    """Difference between the dataset and its index or source."""

    shard: str
    """Key of the shard."""

    detail: str
    """The finding, in words; it names the AOI if it concerns one sample."""


@dataclass(frozen=True)
class Verified:
    """Result of a verification."""

    shards: int
    """Shards whose size and digest were compared."""

    bytes: int
    """Size of these shards, bytes."""

    samples: int
    """Samples that were decoded; 0 without ``deep``."""

    prepared: tuple[str, ...]
    """AOIs that were prepared again and compared."""

    problems: tuple[Problem, ...]
    """All differences."""

    leaks: tuple[str, ...] = ()
    """Pairs of samples that show the same land in different splits, in words."""

    def summary(self) -> str:
        """Return the result as one line."""
        decoded = f", {self.samples} samples decoded" if self.samples else ""
        again = f", {len(self.prepared)} AOIs prepared again and compared" if self.prepared else ""
        end = f"{len(self.problems)} problems: shard again to repair them" if self.problems else "all as written"
        return f"{self.shards} shards of {self.bytes / 1e6:.1f} MB compared{decoded}{again}: {end}"


def verify(
    storage: Storage, deep: bool = False, folder: Path | None = None, num_aois: int = 5, seed: int = 0
) -> Verified:
    """Compare a dataset with its index, and some samples with the source.

    Args:
        storage: Place of the dataset.
        deep: Also decode each sample.
        folder: Source, from which ``num_aois`` AOIs are prepared again and compared value for value.
        num_aois: Number of these AOIs.
        seed: Seed of their random choice.

    Raises:
        UserError: If there is no dataset, or no source.
    """
    index = Index.load(storage)
    shards = [shard for split in SPLITS for shard in index.splits[split]]
    problems = [Problem(INDEX_NAME, repeat) for repeat in index.repeats]
    with ThreadPoolExecutor(PARALLEL) as threads, progress(len(shards), "verifying", "shard") as shown:
        for found in threads.map(lambda shard: _look_at(storage, shard, deep), shards):
            problems += found
            shown.update(problems=len(problems))
    prepared = _drawn(index, num_aois, seed) if folder is not None else []
    if folder is not None:
        problems += _compare_with_source(storage, index, folder, prepared)
    return Verified(
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        samples=sum(len(shard.samples) for shard in shards) if deep else 0,
        prepared=tuple(entry.aoi for _, entry in prepared),
        problems=tuple(problems),
        leaks=tuple(leaks(index)),
    )


def _look_at(storage: Storage, shard: ShardEntry, deep: bool) -> list[Problem]:
    damage = damage_of(storage, shard)
    found = [Problem(shard.name, damage)] if damage else []
    if damage == GONE or not (deep or damage):
        return found
    # In a damaged shard this names the damaged samples; else it checks that all can be decoded.
    for entry in shard.samples:
        try:
            decode_sample(entry, storage.read_range(shard.name, entry.offset, entry.size))
        except CorruptedError as error:
            found.append(Problem(shard.name, str(error)))
    return found


def _drawn(index: Index, num_aois: int, seed: int) -> list[tuple[ShardEntry, SampleEntry]]:
    pairs = [pair for split in SPLITS for pair in index.samples(split)]
    return random.Random(seed).sample(pairs, min(num_aois, len(pairs)))  # noqa: S311 - repeatable, no secret


def _compare_with_source(
    storage: Storage, index: Index, folder: Path, pairs: Sequence[tuple[ShardEntry, SampleEntry]]
) -> list[Problem]:
    # Here, not above: only this needs rasterio.
    from sharding.prepare.sample import make_sample
    from sharding.sources.registry import open_source

    options, kind = index.preparation, _source_options(storage, index)
    found = {aoi.name: aoi for aoi in open_source(folder, options, kind).scenes}
    problems = []
    with progress(len(pairs), "preparing again", "AOI") as shown:
        for shard, entry in pairs:
            try:
                if entry.aoi not in found:
                    raise UnusableError("missing-file", "the source no longer has it")
                stored = fetch_sample(storage, shard, entry)
                different = _differences(stored, make_sample(found[entry.aoi], options))
            except (UnusableError, CorruptedError) as error:
                different = [str(error)]
            problems += [Problem(shard.name, f"AOI {entry.aoi!r}: {text}") for text in different]
            shown.update()
    return problems


def _source_options(storage: Storage, index: Index) -> SourceOptions:
    """Return the options of the source by which a dataset was made."""
    try:
        return convert({**index.facts.options, "source": index.facts.source}, SourceOptions)
    except (ValueError, UserError) as error:
        raise UserError(
            f"{storage.uri}: {INDEX_NAME} names options of its source that this program does not know ({error}): "
            "verify without --input, or shard again"
        ) from None


def _differences(stored: Sample, again: NewSample) -> list[str]:
    """Return the parts in which a stored sample differs from the one that its source gives now, in words."""
    images = {name: getattr(stored, name) for name in again.images}
    found = [
        f"{name} differs from the source"
        for name, image in again.images.items()
        if image.dtype != images[name].dtype or not np.array_equal(image, images[name])
    ]
    return found or ([] if stored.meta == json.loads(json.dumps(again.meta)) else ["its JSON differs from the source"])
