"""Build of one shard: its AOIs are read, prepared, packed and published, unless a valid shard exists."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from sharding.errors import UnusableError, UserError
from sharding.format.index import GONE, ShardEntry, Skipped, damage_of, shard_from_json, shard_to_json
from sharding.format.statistics import Histogram
from sharding.format.writer import NewSample, ShardWriter
from sharding.prepare.options import SampleOptions
from sharding.prepare.sample import make_sample
from sharding.prepare.scene import quantise
from sharding.sources.worldstrat.layout import AoiFiles
from sharding.storage import BucketNotFoundError, CorruptedError, NotFoundError, Storage

SIDECAR_SUFFIX = ".json"
"""Suffix that turns a shard's name into the name of its sidecar."""

_FINGERPRINT_VERSION = 2
"""Version of a shard's bytes: it changes only if the same sources and options give other bytes."""

MEASURED = ("lr", "hr", "pan")
"""Images with statistics."""

Outcome = Literal["made", "kept", "repaired"]


@dataclass(frozen=True)
class ShardTask:
    """Task to build one shard, for any process on any machine that sees source and output."""

    split: str
    """Its split."""

    name: str
    """Its key in ``output``."""

    aois: tuple[AoiFiles, ...]
    """AOIs of the shard, in order."""

    options: SampleOptions
    """Options of their preparation."""

    strict: bool
    """True if an unreadable AOI is an error; otherwise it is skipped."""

    output: Storage
    """Destination of the shard: the folder of its generation, which only the holder of the dataset's lock writes to."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that determines the shard's bytes, except the content of the source files.

        It covers their names and sizes. Only `verify --deep` finds a file that changed and kept its size.
        """
        files = [[aoi.name, *([file.name, file.size] for file in aoi.used(self.options))] for aoi in self.aois]
        described = [_FINGERPRINT_VERSION, self.split, self.name, asdict(self.options), files]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ShardResult:
    """Result of a task."""

    name: str
    """Name of the task and its shard. The task itself lists thousands of files and is not sent back."""

    entry: ShardEntry | None
    """The shard's index entry; None if none of its AOIs could be read."""

    histograms: Mapping[str, Histogram]
    """Histograms per image of ``MEASURED``, for a shard of the training split."""

    skipped: tuple[Skipped, ...]
    """AOIs that could not be read."""

    outcome: Outcome = "made"
    """Outcome: ``made``, ``kept`` (it existed) or ``repaired`` (it was damaged)."""

    why: str = ""
    """Damage of a ``repaired`` shard, in words."""

    bytes_in: int = 0
    """Bytes read from source files."""

    bytes_out: int = 0
    """Bytes of the shard; 0 if this task did not write it."""


def build_shard(task: ShardTask) -> ShardResult:
    """Build one shard and its sidecar, or keep an existing shard whose plan and digest are right.

    Raises:
        UserError: When an AOI cannot be read and the task is strict, the disk is full, or the storage refuses.
    """
    fingerprint, earlier = read_sidecar(task.output, task.name) or ("", None)
    damage = None
    if earlier is not None and fingerprint == task.fingerprint:
        damage = damage_of(task.output, earlier.entry) if earlier.entry else None
        if damage is None:
            for item in earlier.skipped:
                _refuse_if_strict(item, task.strict)
            return earlier
    with tempfile.TemporaryDirectory(prefix="satfusion-") as folder:
        path = Path(folder, task.name)
        result = _pack(task, path)
        # A missing shard is not damage: a run may have been killed between sidecar and shard.
        return _publish(task, result, path, damage if damage != GONE else None)


def skip(aoi: str, error: UnusableError, strict: bool) -> Skipped:
    """Return the index entry of a skipped AOI.

    Raises:
        UserError: If ``strict``.
    """
    skipped = Skipped(aoi, error.reason, error.detail)
    _refuse_if_strict(skipped, strict)
    return skipped


def _refuse_if_strict(skipped: Skipped, strict: bool) -> None:
    if strict:
        raise UserError(
            f"AOI {skipped.aoi!r} is unusable ({skipped.reason}: {skipped.detail}): repair it, or drop --strict to "
            "skip it"
        )


def _pack(task: ShardTask, path: Path) -> ShardResult:
    """Write the tar to a local file; skip AOIs that cannot be read."""
    histograms: dict[str, Histogram] = {}
    skipped, bytes_in = [], 0
    try:
        with path.open("wb") as file:
            writer = ShardWriter(file)
            for aoi in task.aois:
                try:
                    sample = make_sample(aoi, task.options)
                except UnusableError as error:
                    skipped.append(skip(aoi.name, error, task.strict))
                    continue
                if task.split == "train":
                    _count(sample, histograms)
                writer.add(sample)
                bytes_in += sample.bytes_in
            entry = writer.finish(task.name)
    except OSError as error:
        raise UserError(
            f"cannot write a shard in {path.parent.parent} ({error.strerror}): free some space there, or "
            "set TMPDIR to a folder with space"
        ) from error
    if not entry.samples:
        return ShardResult(task.name, None, {}, tuple(skipped), bytes_in=bytes_in)
    return ShardResult(task.name, entry, histograms, tuple(skipped), bytes_in=bytes_in, bytes_out=entry.bytes)


def _count(sample: NewSample, histograms: dict[str, Histogram]) -> None:
    """Add a sample's values to the counts of its shard."""
    for name in MEASURED:
        counted = Histogram.of(_in_steps(sample.images[name]))
        histograms[name] = histograms[name] + counted if name in histograms else counted


def _in_steps(image: NDArray[np.generic]) -> NDArray[np.uint16]:
    """Return a stored image as integers of ``STEP``; only float32 images are converted."""
    return (
        cast(NDArray[np.uint16], image) if image.dtype == np.uint16 else quantise(cast(NDArray[np.float32], image))[0]
    )


def _publish(task: ShardTask, result: ShardResult, path: Path, damage: str | None) -> ShardResult:
    """Write the sidecar of the packed shard, then publish the shard.

    In this order no shard lies beside a sidecar of another one, even if the run is killed.
    """
    entry, sidecar = result.entry, task.name + SIDECAR_SUFFIX
    if entry is not None and damage is not None:
        result = replace(result, outcome="repaired", why=f"{damage}: it was built again")
    elif entry is not None and damage_of(task.output, entry) is None:  # only its sidecar is missing or damaged
        task.output.write(sidecar, _to_sidecar(task, result))
        return replace(result, outcome="kept", bytes_out=0)
    task.output.write(sidecar, _to_sidecar(task, result))
    if entry is not None:
        task.output.upload(task.name, path)
    else:
        task.output.delete(task.name)
    return result


def _to_sidecar(task: ShardTask, result: ShardResult) -> bytes:
    described = {
        "fingerprint": task.fingerprint,
        "shard": shard_to_json(result.entry) if result.entry else None,
        "skipped": [vars(item) for item in result.skipped],
        "histograms": {name: histogram.to_text() for name, histogram in result.histograms.items()},
    }
    return json.dumps(described, sort_keys=True).encode()


def read_sidecar(output: Storage, name: str) -> tuple[str, ShardResult] | None:
    """Read a shard's sidecar: the fingerprint of the task that built the shard, and its result.

    Returns:
        None if the sidecar is missing, damaged or foreign.
    """
    try:
        described = json.loads(output.read(name + SIDECAR_SUFFIX))
        entry = shard_from_json(described["shard"]) if described["shard"] else None
        result = ShardResult(
            name=name,
            entry=entry,
            histograms={image: Histogram.from_text(text) for image, text in described["histograms"].items()},
            skipped=tuple(Skipped(**item) for item in described["skipped"]),
            outcome="kept",
        )
        return (str(described["fingerprint"]), result) if entry is None or entry.name == name else None
    except BucketNotFoundError:
        raise
    except (NotFoundError, CorruptedError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
