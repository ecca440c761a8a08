"""A WorldStrat folder to a published dataset: plan, work, index.

The plan is pure: which AOI goes into which split and shard. The work is one shard at a time, written to a
temporary file and uploaded. The index comes last, so nothing that was interrupted looks like a dataset.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch

from sharding.errors import UnusableError, UserError
from sharding.options import HR_SIZE, HR_SOURCES, LR_SIZE, SampleOptions
from sharding.progress import progress
from sharding.sample import make_sample
from sharding.schema import INDEX_NAME, SPLITS, Index, Preparation, ShardEntry, Skipped
from sharding.source import open_source
from sharding.splits import (
    SHARD_SIZE,
    SPLIT_SEED,
    Split,
    describe_moves,
    natural_key,
    published_split,
    seeded_split,
    shard_names,
)
from sharding.storage import Storage
from sharding.worldstrat import SPLIT_FILE, AoiFiles, check_files, find_aois, read_split_file
from sharding.writer import BandSums, NewSample, describe_tar, write_tar

SPLIT_RULES = ("auto", "published", "seeded")
MEASURED = ("lr", "hr", "pan")

_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.tar")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardOptions:
    """How a folder becomes a dataset. The same folder and options give the same bytes."""

    hr_source: str = "ps"
    """``ps`` (1.5 m, pansharpened) or ``rgbn`` (6 m): the raster that targets are made from."""

    revisits: int = 8
    """Revisits a sample; AOIs with fewer are left out."""

    split: str = "auto"
    """``published`` (the split file), ``seeded``, or ``auto``: published where the file is."""

    seed: int = SPLIT_SEED
    """Of the seeded split."""

    shard_size: int = SHARD_SIZE
    """Most AOIs a shard."""

    strict: bool = False
    """Refuse the folder when an AOI in it is unusable, instead of leaving the AOI out."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the option, its value and what it may be.
        """
        for option, value, known in (("--hr", self.hr_source, HR_SOURCES), ("--split", self.split, SPLIT_RULES)):
            if value not in known:
                raise UserError(f"{option} {value!r} is unknown: it may be {', '.join(known)}")
        for option, number, least in (
            ("--revisits", self.revisits, 1),
            ("--shard-size", self.shard_size, 1),
            ("--seed", self.seed, 0),
        ):
            if number < least:
                raise UserError(f"{option} {number} is too small: the least is {least}")

    @property
    def sample(self) -> SampleOptions:
        """What a sample is made of."""
        return SampleOptions(hr=self.hr_source, revisits=self.revisits)


@dataclass(frozen=True)
class Plan:
    """What will be made of the usable AOIs."""

    split: Split
    """Which AOI is in which split."""

    rule: str
    """``published`` or ``seeded``."""

    shards: tuple[tuple[str, str, tuple[str, ...]], ...]
    """(split, shard's key, its AOIs) in order."""


@dataclass(frozen=True)
class ShardTask:
    """One shard to be made, by any process on any machine that sees the folder."""

    split: str
    """Its split."""

    name: str
    """Its key beside the index."""

    aois: tuple[AoiFiles, ...]
    """The AOIs to put into it, in order."""

    options: ShardOptions
    """How to prepare them."""

    output: Storage
    """Where the shard goes."""


@dataclass(frozen=True)
class ShardResult:
    """What became of a task."""

    task: ShardTask
    """The task."""

    entry: ShardEntry | None
    """The shard's line of the index; None where none of its AOIs could be read."""

    sums: Mapping[str, BandSums]
    """Per image of ``MEASURED``, sums over the shard."""

    skipped: tuple[Skipped, ...]
    """AOIs that could not be read."""


def shard_folder(
    folder: Path, output: Storage, options: ShardOptions, workers: int = 1, say: Callable[[str], None] = log.info
) -> Index:
    """Make a dataset of a WorldStrat folder.

    Args:
        folder: holds ``hr_dataset`` and ``lr_dataset``.
        output: where shards and index go; an older dataset there is replaced.
        options: how.
        workers: processes that prepare shards side by side; their number does not change a byte.
        say: is given each line that the user should read, such as AOIs moved between splits.

    Returns:
        The index that was written.

    Raises:
        UserError: for a folder, an option or a storage that the user can mend. An older dataset stays as it was if
            nothing was written yet; after that no index is left.
    """
    if workers < 1:
        raise UserError(f"--workers {workers} is too small: the least is 1")
    source = open_source(folder, options.sample.level)
    found = find_aois(source)
    rows = None if options.split == "seeded" else read_split_file(source)
    usable, skipped = _sift(found, options)
    plan = make_plan(list(usable), rows, options)
    old = [item.key for item in output.list() if _SHARD_NAME.fullmatch(item.key)]
    output.delete(INDEX_NAME)
    with _executor(workers) as executor:
        while True:
            for line in describe_moves(plan.split.moved):
                say(line)
            tasks = [
                ShardTask(split, name, tuple(usable[aoi] for aoi in aois), options, output)
                for split, name, aois in plan.shards
            ]
            results = _run(executor, tasks)
            unread = [item for result in results for item in result.skipped]
            skipped += unread
            for item in unread:
                del usable[item.aoi]
            if {result.task.split for result in results if result.entry} == set(SPLITS):
                break
            # A split lost all its AOIs while they were read: share out those that can be.
            old += [result.entry.name for result in results if result.entry]
            plan = make_plan(list(usable), rows, options)
    index = _make_index(plan, results, skipped, options)
    for name in set(old) - {shard.name for shards in index.splits.values() for shard in shards}:
        output.delete(name)
    output.write(INDEX_NAME, index.to_json().encode())
    return index


def make_plan(aois: Sequence[str], rows: Sequence[tuple[str, str]] | None, options: ShardOptions) -> Plan:
    """Decide splits and shards from names alone.

    Args:
        aois: the usable AOIs.
        rows: (AOI, split) of the published split file, None where there is none.
        options: rule, seed and shard size.

    Raises:
        UserError: where the published split is asked for and missing, or the AOIs are too few.
    """
    rule = ("seeded" if rows is None else "published") if options.split == "auto" else options.split
    if rule == "published":
        if rows is None:
            raise UserError(f"--split published needs {SPLIT_FILE} in the input folder: add it or use seeded")
        split = published_split(aois, rows)
    else:
        split = seeded_split(aois, options.seed)
    return Plan(split, rule, tuple(shard_names(split.splits, options.shard_size)))


def build_shard(task: ShardTask) -> ShardResult:
    """Read, prepare and pack one task's AOIs, and upload the shard.

    Raises:
        UserError: when an AOI cannot be read and the options are strict, or the storage refuses.
    """
    sums: dict[str, list[BandSums]] = {name: [] for name in MEASURED}
    skipped: list[Skipped] = []

    def samples() -> Iterator[NewSample]:
        for aoi in task.aois:
            try:
                sample = make_sample(aoi, task.options.sample)
            except UnusableError as error:
                skipped.append(_skip(aoi.name, error, task.options.strict))
                continue
            for name in MEASURED:
                sums[name].append(BandSums.of(sample.images[name]))
            yield sample

    with tempfile.TemporaryDirectory(prefix="satfusion-") as folder:
        path = Path(folder, task.name)
        write_tar(path, samples())
        if len(skipped) == len(task.aois):
            return ShardResult(task, None, {}, tuple(skipped))
        entry = describe_tar(path, task.name)
        task.output.upload(task.name, path)
    return ShardResult(task, entry, {name: reduce(add, parts) for name, parts in sums.items()}, tuple(skipped))


def _sift(found: Sequence[AoiFiles], options: ShardOptions) -> tuple[dict[str, AoiFiles], list[Skipped]]:
    """Part the AOIs whose files are complete from the others.

    Raises:
        UserError: where the target's raster is missing but another one would do.
    """
    usable: dict[str, AoiFiles] = {}
    skipped = []
    for aoi in found:
        if options.hr_source == "ps" and "ps" not in aoi.hr and "rgbn" in aoi.hr:
            raise UserError(
                f"AOI {aoi.name!r} has no {aoi.name}_ps.tiff: use `--hr rgbn`, which makes all targets from the "
                "6 m rasters, or take the AOI out of the folder"
            )
        try:
            check_files(aoi, options.sample)
            usable[aoi.name] = aoi
        except UnusableError as error:
            skipped.append(_skip(aoi.name, error, options.strict))
    return usable, skipped


def _skip(aoi: str, error: UnusableError, strict: bool) -> Skipped:
    if strict:
        raise UserError(f"AOI {aoi!r} is unusable ({error}): mend it, or leave out --strict to skip it")
    return Skipped(aoi, error.reason, error.detail)


@contextlib.contextmanager
def _executor(workers: int) -> Iterator[Executor]:
    """Give an executor of ``workers`` processes; one worker is a thread here, without the cost of a process."""
    executor: Executor
    if workers == 1:
        executor = ThreadPoolExecutor(1)
    else:
        # Spawned, not forked: torch's and GDAL's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _run(executor: Executor, tasks: Sequence[ShardTask]) -> list[ShardResult]:
    """Do all tasks and return their results in the order of the tasks."""
    total = sum(len(task.aois) for task in tasks)
    futures: dict[Future[ShardResult], ShardTask] = {executor.submit(build_shard, task): task for task in tasks}
    try:
        with progress(total, "sharding", "AOI") as shown:
            for future in as_completed(futures):
                future.result()
                shown.update(len(futures[future].aois))
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most often for want of memory: shard again with fewer --workers"
        ) from None
    return [future.result() for future in futures]


def _make_index(plan: Plan, results: Sequence[ShardResult], skipped: Sequence[Skipped], options: ShardOptions) -> Index:
    splits: dict[str, tuple[ShardEntry, ...]] = {
        split: tuple(result.entry for result in results if result.task.split == split and result.entry)
        for split in SPLITS
    }
    training = [result.sums for result in results if result.task.split == "train" and result.entry]
    not_listed = [Skipped(aoi, "not-in-split-file", f"{SPLIT_FILE} does not list it") for aoi in plan.split.left_out]
    preparation: Preparation = {
        "lr_size": LR_SIZE,
        "hr_size": HR_SIZE,
        "bands": list(options.sample.band_numbers),
        "revisits": options.revisits,
        "hr_source": options.hr_source,
        "step": options.sample.step,
    }
    return Index(
        preparation=preparation,
        split_rule=plan.rule,
        split_seed=options.seed,
        splits=splits,
        statistics={name: reduce(add, (sums[name] for sums in training)).statistics() for name in MEASURED},
        skipped=tuple(sorted([*skipped, *not_listed], key=lambda item: natural_key(item.aoi))),
    )
