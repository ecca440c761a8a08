"""A WorldStrat source to a published dataset: plan, work, index.

The plan is pure: which AOI goes into which split and shard. The work is one shard at a time, by any process that sees
source and output: written to a temporary file and digested on the way, published under its name, then described by a
sidecar. The index comes last, so nothing that was interrupted looks like a dataset, and whoever comes again keeps each
shard whose sidecar says the same plan and whose bytes have its digest.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sharding.build import SIDECAR_SUFFIX, ShardResult, ShardTask, skip
from sharding.errors import UnusableError, UserError
from sharding.options import SampleOptions
from sharding.plan import Plan, PlanOptions, make_plan
from sharding.progress import progress
from sharding.schema import INDEX_NAME, SPLITS, Index, ShardEntry, Skipped
from sharding.source import open_source
from sharding.splits import describe_split, natural_key
from sharding.statistics import Histogram
from sharding.storage import NotFoundError, Storage, StorageUnavailableError
from sharding.workers import processes
from sharding.worldstrat import AoiFiles, check_files, find_aois, read_split_file

_OURS = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.tar({re.escape(SIDECAR_SUFFIX)})?")

Runner = Callable[[Sequence[ShardTask]], Iterator[ShardResult]]
"""Does all tasks, anywhere and in any order, and yields each result when it is there."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardOptions:
    """How a source becomes a dataset. The same source and options give the same bytes."""

    sample: SampleOptions = field(default_factory=SampleOptions)
    """What a sample is made of."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    """How samples are shared out."""

    aois: tuple[str, ...] | None = None
    """The only AOIs to take; None takes all."""

    strict: bool = False
    """Refuse the source when an AOI in it is unusable, instead of leaving the AOI out."""


@dataclass(frozen=True)
class Report:
    """What a run of `shard` did."""

    index: Index
    """The index that was written."""

    shards: dict[str, int]
    """How many shards were made, kept, mended (their bytes were damaged), or shared (made by another run meanwhile)."""

    notes: tuple[str, ...]
    """Lines on splits and shards that the user should read."""

    seconds: float
    """From the first look at the source to the index."""

    bytes_in: int
    """Bytes of the source files that were read."""

    bytes_out: int
    """Bytes of the shards that were written."""

    def lines(self) -> Iterator[str]:
        """Yield what a person should know at the end."""
        aois = sum(len(self.index.samples(split)) for split in SPLITS)
        seconds = max(self.seconds, 1e-9)
        yield f"shards  {', '.join(f'{count} {outcome}' for outcome, count in self.shards.items())}"
        yield (
            f"took    {self.seconds:.1f} s for {aois} AOIs ({aois / seconds:.3g}/s), read {self.bytes_in / 1e6:.1f} MB "
            f"({self.bytes_in / seconds / 1e6:.1f} MB/s), wrote {self.bytes_out / 1e6:.1f} MB"
        )

    def to_json(self) -> dict[str, object]:
        """Return it as a table for a file."""
        return {
            "index_sha256": self.index.digest,
            "aois": {split: len(self.index.samples(split)) for split in SPLITS},
            "shards": self.shards,
            "skipped": dict(Counter(item.reason for item in self.index.skipped)),
            "skipped_aois": [vars(item) for item in self.index.skipped],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }


def shard_folder(
    folder: Path,
    output: Storage,
    options: ShardOptions,
    workers: int = 1,
    say: Callable[[str], None] = log.info,
    runner: Runner | None = None,
) -> Report:
    """Make a dataset of a WorldStrat folder, or go on where an earlier run was interrupted.

    Args:
        folder: holds ``hr_dataset`` and ``lr_dataset``, or the published zips.
        output: where shards and index go; a dataset of another source or other options there is replaced.
        options: how.
        workers: processes that prepare shards side by side; their number does not change a byte.
        say: is given each line that the user should read, such as AOIs moved between splits.
        runner: does the tasks instead of ``workers``.

    Raises:
        UserError: for a source, an option or a storage that the user can mend. An older dataset stays as it was if
            nothing was written yet; after that no index is left.
    """
    runner = runner or processes(workers)
    return _Sharding(folder, output, options, say).run(runner)


class _Sharding:
    """One run of `shard`."""

    def __init__(self, folder: Path, output: Storage, options: ShardOptions, say: Callable[[str], None]) -> None:
        self.start = time.monotonic()
        self.output, self.options = output, options
        self.source = open_source(folder, options.sample.level)
        self.found = _chosen(find_aois(self.source), options.aois)
        self.rows = None if options.plan.splits == "seeded" else read_split_file(self.source)
        self.usable, self.skipped = _sift(self.found, options)
        self.notes: list[str] = []
        self._say = say
        for path in self.source.strays:
            self._note(f"{path!r} leaves the folder it lies in, and was not read")

    def run(self, runner: Runner) -> Report:
        plan = self._plan()
        tasks = self._tasks(plan)
        self._withdraw_index(tasks)
        results: list[ShardResult] = []
        while True:
            now, counted = self._do(tasks, runner)
            results += now
            unread = [item for result in now for item in result.skipped]
            self.skipped += unread
            for item in unread:
                del self.usable[item.aoi]
            if {task.split for task, result in zip(tasks, now, strict=True) if result.entry} == set(SPLITS):
                break
            # A split lost all its AOIs while they were read: share out those that can be.
            plan = self._plan()
            tasks = self._tasks(plan)
        index = self._index(plan, tasks, now, counted)
        self._publish(index, now)
        return Report(
            index=index,
            shards=dict(Counter(result.outcome for result in results)),
            notes=tuple(self.notes),
            seconds=time.monotonic() - self.start,
            bytes_in=sum(result.bytes_in for result in results),
            bytes_out=sum(result.bytes_out for result in results),
        )

    def _plan(self) -> Plan:
        names = [aoi.name for aoi in self.found]
        sample_bytes = self.options.sample.sample_bytes
        plan = make_plan(list(self.usable), names, self.rows, sample_bytes, self.options.plan)
        for line in describe_split(plan.split):
            self._note(line)
        return plan

    def _tasks(self, plan: Plan) -> list[ShardTask]:
        return [
            ShardTask(
                shard.split,
                shard.name,
                tuple(self.usable[aoi] for aoi in shard.aois),
                self.options.sample,
                self.options.strict,
                self.output,
            )
            for shard in plan.shards
        ]

    def _withdraw_index(self, tasks: Sequence[ShardTask]) -> None:
        """Take an index away that is not of this plan, before the first of its shards is replaced."""
        try:
            index = Index.load(self.output)
        except (NotFoundError, StorageUnavailableError):  # no bucket, or a store that does not answer
            raise
        except UserError:  # none, or a damaged one
            index = None
        if index is None or index.plan != _digest(tasks):
            self.output.delete(INDEX_NAME)

    def _do(self, tasks: Sequence[ShardTask], runner: Runner) -> tuple[list[ShardResult], dict[str, Histogram]]:
        """Do all tasks; return their results in the order of the tasks, and what these counted, added up."""
        sizes = {task.name: len(task.aois) for task in tasks}
        by_name: dict[str, ShardResult] = {}
        counted: dict[str, Histogram] = {}
        start, skipped, read, written = time.monotonic(), 0, 0, 0
        with progress(sum(len(task.aois) for task in tasks), "sharding", "AOI") as shown:
            for result in runner(tasks):
                # Megabytes of counts a shard: kept for each, they would outgrow the work itself.
                by_name[result.name] = replace(result, histograms={})
                for name, histogram in result.histograms.items():
                    counted[name] = counted[name] + histogram if name in counted else histogram
                seconds = max(time.monotonic() - start, 1e-9)
                skipped += len(result.skipped)
                read += result.bytes_in
                written += result.bytes_out
                rates = {"in": f"{read / seconds / 1e6:.0f} MB/s", "out": f"{written / seconds / 1e6:.0f} MB/s"}
                shown.update(sizes[result.name], **rates, skipped=len(self.skipped) + skipped)
                if result.outcome in ("mended", "shared"):
                    self._note(f"{result.name} {result.why}")
        return [by_name[task.name] for task in tasks], counted

    def _index(
        self,
        plan: Plan,
        tasks: Sequence[ShardTask],
        results: Sequence[ShardResult],
        counted: Mapping[str, Histogram],
    ) -> Index:
        done = list(zip(tasks, results, strict=True))
        splits: dict[str, tuple[ShardEntry, ...]] = {
            split: tuple(result.entry for task, result in done if task.split == split and result.entry)
            for split in SPLITS
        }
        not_listed = [
            Skipped(aoi, "not-in-split-file", "the split file does not list it") for aoi in plan.split.left_out
        ]
        return Index(
            preparation=self.options.sample,
            split_rule=plan.rule,
            split_seed=self.options.plan.seed,
            plan=_digest(tasks),
            splits=splits,
            statistics={name: histogram.statistics() for name, histogram in counted.items()},
            skipped=tuple(sorted([*self.skipped, *not_listed], key=lambda item: natural_key(item.aoi))),
        )

    def _publish(self, index: Index, results: Sequence[ShardResult]) -> None:
        """Write the index, and remove what earlier plans left that is in this one no more."""
        self.output.write(INDEX_NAME, index.to_json().encode())
        names = {result.name for result in results}
        ours = names | {name + SIDECAR_SUFFIX for name in names}
        empty = {result.name for result in results if not result.entry}
        for item in self.output.list():
            if _OURS.fullmatch(item.key) and (item.key not in ours or item.key in empty):
                self.output.delete(item.key)

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
            self._say(line)


def _digest(tasks: Sequence[ShardTask]) -> str:
    """Return what names the plan: the fingerprints of its tasks."""
    return hashlib.sha256("".join(task.fingerprint for task in tasks).encode()).hexdigest()


def _chosen(found: Sequence[AoiFiles], wanted: Sequence[str] | None) -> list[AoiFiles]:
    if wanted is None:
        return list(found)
    missing = sorted(set(wanted) - {aoi.name for aoi in found}, key=natural_key)
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"--aois names {missing[0]!r}{rest}, which the input does not hold: correct or remove the line")
    return [aoi for aoi in found if aoi.name in set(wanted)]


def _sift(found: Sequence[AoiFiles], options: ShardOptions) -> tuple[dict[str, AoiFiles], list[Skipped]]:
    """Part the AOIs whose files are complete from the others.

    Raises:
        UserError: where none is, for want of targets that another option would not need.
    """
    usable: dict[str, AoiFiles] = {}
    skipped = []
    for aoi in found:
        try:
            check_files(aoi, options.sample)
            usable[aoi.name] = aoi
        except UnusableError as error:
            item = skip(aoi.name, error, options.strict)
            if options.sample.hr == "ps" and "ps" not in aoi.hr and "rgbn" in aoi.hr:
                item = replace(item, detail=f"{item.detail}; `--hr rgbn` takes all targets from the 6 m rasters")
            skipped.append(item)
    if not usable and skipped and all("--hr rgbn" in item.detail for item in skipped):
        raise UserError(f"AOI {skipped[0].aoi!r} and all others cannot be used: {skipped[0].detail}")
    return usable, skipped
