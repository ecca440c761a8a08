"""Sidecars: the JSON beside each shard, from which an interrupted `shard` resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from sharding.format.entries import Layouts, ShardEntry, Skipped, StoredShard, shard_from_json, shard_to_json
from sharding.format.index import Measured
from sharding.format.layout import (
    ArrayLayout,
    Facts,
    SampleLayout,
    refuse_layout,
    worldstrat_facts,
    worldstrat_layout,
)
from sharding.format.statistics import Histogram
from sharding.prepare.options import SampleOptions
from sharding.schema import Sha256, decode
from sharding.storage import BucketNotFoundError, CorruptedError, NotFoundError, Storage

SIDECAR_SUFFIX = ".json"
"""Suffix that turns a shard's name into the name of its sidecar."""

Outcome = Literal["made", "kept", "repaired"]


@dataclass(frozen=True)
class ShardResult:
    """Result of a task."""

    name: str
    """Name of the task and its shard. The task itself lists thousands of files and is not sent back."""

    entry: ShardEntry | None
    """The shard's index entry; None if none of its AOIs could be read."""

    histograms: Mapping[Measured, Histogram]
    """Histograms per image of ``MEASURED``, for a shard of the training split."""

    skipped: tuple[Skipped, ...]
    """AOIs that could not be read."""

    passed: tuple[str, ...] = ()
    """Lines on the revisits that were passed over because others remained."""

    substitutes: str = ""
    """Digest by `sharding.run.build.ShardTask.substitutes`."""

    outcome: Outcome = "made"
    """Outcome: ``made``, ``kept`` (it existed) or ``repaired`` (it was damaged)."""

    why: str = ""
    """Damage of a ``repaired`` shard, in words."""

    bytes_in: int = 0
    """Bytes read from source files."""

    bytes_out: int = 0
    """Bytes of the shard; 0 if this task did not write it."""


def write_sidecar(output: Storage, fingerprint: str, result: ShardResult) -> None:
    """Write the sidecar of a shard.

    Args:
        output: Folder of the shard.
        fingerprint: Fingerprint of the task that built it.
        result: Result of that task, with its ``substitutes``.
    """
    layouts = Layouts()
    described: dict[str, object] = {
        "fingerprint": fingerprint,
        "shard": shard_to_json(result.entry, layouts) if result.entry else None,
        "layouts": layouts.to_json(),
        "skipped": [vars(item) for item in result.skipped],
        "histograms": {name: histogram.to_text() for name, histogram in result.histograms.items()},
    }
    if result.passed:
        described["passed"] = list(result.passed)
    if result.substitutes:
        described["substitutes"] = result.substitutes
    output.write(result.name + SIDECAR_SUFFIX, json.dumps(described, sort_keys=True).encode())


_ANY_SIZES = SampleOptions(lr_size=None, hr_size=None)


class _Sidecar(msgspec.Struct):
    """Schema of a sidecar."""

    fingerprint: Sha256
    shard: StoredShard | None
    skipped: tuple[Skipped, ...]
    histograms: dict[Measured, str]
    layouts: tuple[dict[str, ArrayLayout], ...] = ()
    """Layouts of its samples; none with an index of format 2, whose samples are WorldStrat's."""
    passed: tuple[str, ...] = ()
    """Lines on revisits that were passed over."""
    substitutes: str = ""
    """`sharding.run.build.ShardTask.substitutes` of the task."""


def read_sidecar(
    output: Storage, name: str, options: SampleOptions | None = None, facts: Facts | None = None
) -> tuple[str, ShardResult] | None:
    """Read a shard's sidecar: the fingerprint of the task that built the shard, and its result.

    Args:
        output: Place of the dataset.
        name: Name of the shard.
        options: Options of its samples; the layouts and histograms of others are refused.
        facts: Facts of the dataset; None for WorldStrat's.

    Returns:
        None if the sidecar is missing, damaged or foreign.
    """
    try:
        found = decode(output.read(name + SIDECAR_SUFFIX), _Sidecar)
        layouts = found.layouts or (worldstrat_layout(options or _ANY_SIZES),)
        histograms = {image: Histogram.from_text(text) for image, text in found.histograms.items()}
        if options is not None:
            _refuse_others(options, facts or worldstrat_facts(options), layouts, histograms)
        result = ShardResult(
            name=name,
            entry=shard_from_json(found.shard, layouts) if found.shard else None,
            histograms=histograms,
            skipped=found.skipped,
            passed=found.passed,
            substitutes=found.substitutes,
            outcome="kept",
        )
        entry = result.entry
        return (found.fingerprint, result) if entry is None or entry.name == name else None
    except BucketNotFoundError:
        raise
    except (NotFoundError, CorruptedError, ValueError):
        return None


def _refuse_others(
    options: SampleOptions, facts: Facts, layouts: Sequence[SampleLayout], histograms: Mapping[Measured, Histogram]
) -> None:
    """Refuse layouts and histograms that are not of samples with these options."""
    for layout in layouts:
        refuse_layout(layout, facts, options.revisits, options.dtype)
    bands: dict[Measured, int] = {"lr": len(facts.bands.lr), "hr": len(facts.bands.hr), "pan": 1}
    for image, histogram in histograms.items():
        if len(histogram.counts) != bands[image]:
            raise ValueError(f"the histogram of {image} has {len(histogram.counts)} bands, not {bands[image]}")
