"""Build of one shard: its AOIs are read, prepared, packed and published, unless a valid shard exists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from sharding.errors import UnusableError, UserError
from sharding.format.entries import Skipped
from sharding.format.index import GONE, Measured, damage_of
from sharding.format.layout import (
    CHIP,
    VALID,
    Facts,
)
from sharding.format.sidecar import ShardResult, read_sidecar, write_sidecar
from sharding.format.statistics import Histogram
from sharding.format.writer import NewSample, ShardWriter
from sharding.prepare.options import SampleOptions
from sharding.prepare.sample import make_sample
from sharding.prepare.scene import quantise
from sharding.scratch import scratch_folder
from sharding.sources.options import SourceOptions
from sharding.sources.source import SceneFiles
from sharding.storage import Storage

SHARD_VERSION = 2
"""Version of a shard's bytes: it is part of each fingerprint, and newer versions of the index keep it."""

MEASURED: tuple[Measured, ...] = ("lr", "hr", "pan")


@dataclass(frozen=True)
class ShardTask:
    """Task to build one shard, for any process on any machine that sees source and output."""

    split: str
    """Its split."""

    name: str
    """Its key in ``output``."""

    aois: tuple[SceneFiles, ...]
    """AOIs of the shard, in order."""

    options: SampleOptions
    """Options of their preparation."""

    strict: bool
    """True if an unreadable AOI is an error; otherwise it is skipped."""

    output: Storage
    """Destination of the shard: the folder of its generation, which only the holder of the dataset's lock writes to."""

    facts: Facts
    """Facts of the dataset, as far as they are known before sharding; its samples agree with them."""

    limits: SourceOptions
    """Limits of samples: their agreement, and their pixels without data."""

    published: bool = False
    """True if the published index lists the shard: then only damage is a reason to build it again."""

    trusted: bool = False
    """True if its bytes need not be read again, since the run only adds other shards to it."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that determines the shard's bytes, except the content of the source files.

        It covers their names and sizes. Only `verify --deep` finds a file that changed and kept its size.
        """
        files = [[aoi.name, *([file.name, file.size] for file in aoi.used(self.options))] for aoi in self.aois]
        described = [SHARD_VERSION, self.split, self.name, asdict(self.options), files]
        recipes = [aoi.recipe for aoi in self.aois]
        limits = [self.limits.min_agreement, self.limits.max_nodata]
        if any(recipes) or limits != [None, None]:
            described.append([recipes, limits])
        if self.limits.chip != CHIP:
            described.append(["chip", self.limits.chip])
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def substitutes(self, skipped: Sequence[Skipped], passed: Sequence[str]) -> str:
        """Return the digest of the files that may stand in for unusable revisits; "" if there are none.

        The fingerprint does not cover them: most samples do not read them.

        Args:
            skipped: AOIs that could not be read.
            passed: Lines on revisits that were passed over.
        """
        names = {item.aoi for item in skipped}
        files = []
        for aoi in self.aois:
            if aoi.name in names or any(line.startswith(_passed_over(aoi.name)) for line in passed):
                files += [[file.name, file.size] for file in aoi.spare(self.options)]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest() if files else ""


def build_shard(task: ShardTask) -> ShardResult:
    """Build one shard and its sidecar, or keep an existing shard whose plan and digest are right.

    Raises:
        UserError: When an AOI cannot be read and the task is strict, the disk is full, or the storage refuses.
    """
    fingerprint, earlier = read_sidecar(task.output, task.name, task.options, task.facts) or ("", None)
    damage = None
    same = earlier is not None and fingerprint == task.fingerprint
    if (
        earlier is not None
        and same
        and (task.published or earlier.substitutes == task.substitutes(earlier.skipped, earlier.passed))
    ):
        damage = damage_of(task.output, earlier.entry) if earlier.entry and not task.trusted else None
        if damage is None:
            for item in earlier.skipped:
                _refuse_if_strict(item, task.strict)
            return earlier
    with scratch_folder("shard") as folder:
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


def _passed_over(aoi: str) -> str:
    return f"AOI {aoi!r} without a revisit:"


def _refuse_if_strict(skipped: Skipped, strict: bool) -> None:
    if strict:
        raise UserError(
            f"AOI {skipped.aoi!r} is unusable ({skipped.reason}: {skipped.detail}): repair it, or drop --strict to "
            "skip it"
        )


def _pack(task: ShardTask, path: Path) -> ShardResult:
    """Write the tar to a local file; skip AOIs that cannot be read."""
    histograms: dict[Measured, Histogram] = {}
    skipped, passed, bytes_in = [], list[str](), 0
    try:
        with path.open("wb") as file:
            writer = ShardWriter(file)
            for aoi in task.aois:
                try:
                    sample = make_sample(aoi, task.options)
                    _check_limits(sample, task)
                except UnusableError as error:
                    skipped.append(skip(aoi.name, error, task.strict))
                    continue
                if task.split == "train":
                    _count(sample, histograms)
                writer.add(sample)
                passed += [f"{_passed_over(aoi.name)} {why}" for why in sample.passed]
                bytes_in += sample.bytes_in
            entry = writer.finish(task.name)
    except OSError as error:
        raise UserError(
            f"cannot write a shard in {path.parent.parent} ({error.strerror}): free some space there, or "
            "set TMPDIR to a folder with space"
        ) from error
    if not entry.samples:
        return ShardResult(task.name, None, {}, tuple(skipped), bytes_in=bytes_in)
    return ShardResult(
        task.name, entry, histograms, tuple(skipped), tuple(passed), bytes_in=bytes_in, bytes_out=entry.bytes
    )


def _check_limits(sample: NewSample, task: ShardTask) -> None:
    least, most = task.limits.min_agreement, task.limits.max_nodata
    found = sample.content.correlation if sample.content else None
    if least is not None and found is not None and found < least:
        raise UnusableError(
            "disagrees", f"its revisits correlate with its target by {found:.3f}, the least is {least:g}"
        )
    missing = 100 * max(cast(Mapping[str, float], sample.meta["nodata_fraction"]).values())
    if most is not None and missing > most:
        raise UnusableError("no-data", f"{missing:.1f} % of its target or PAN hold no data, the most is {most:g}")


def _count(sample: NewSample, histograms: dict[Measured, Histogram]) -> None:
    """Add a sample's values to the counts of its shard."""
    for name in MEASURED:
        image = _in_steps(sample.images[name])
        if VALID in sample.images and name != "lr":  # LR pixels without data are not stored as such
            image = image[:, sample.images[VALID][0] != 0][:, None]
        counted = Histogram.of(image)
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
    entry = result.entry
    result = replace(result, substitutes=task.substitutes(result.skipped, result.passed))
    if entry is not None and damage is not None:
        result = replace(result, outcome="repaired", why=f"{damage}: it was built again")
    elif entry is not None and damage_of(task.output, entry) is None:  # only its sidecar is missing or damaged
        write_sidecar(task.output, task.fingerprint, result)
        return replace(result, outcome="kept", bytes_out=0)
    write_sidecar(task.output, task.fingerprint, result)
    if entry is not None:
        task.output.upload(task.name, path)
    else:
        task.output.delete(task.name)
    return result
