"""A WorldStrat source to a published dataset: plan, work, index.

The plan is pure: which AOI goes into which split and shard. The work is one shard at a time, by any process that sees
source and output: written to a temporary file and digested on the way, described by a sidecar, then published under its
name. The index comes last, so nothing that was interrupted looks like a dataset, and whoever comes again keeps each
shard whose sidecar says the same plan and whose bytes have its digest. What this program did not write is never
replaced or removed, see `sharding.run.output`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sharding.errors import UnusableError, UserError
from sharding.format.index import INDEX_NAME, SPLITS, Index, ShardEntry, Skipped
from sharding.format.statistics import Histogram
from sharding.prepare.sample import make_sample
from sharding.progress import progress
from sharding.run.build import SIDECAR_SUFFIX, ShardResult, ShardTask, skip
from sharding.run.job import ShardOptions
from sharding.run.output import look
from sharding.run.plan import Plan, make_plan
from sharding.run.splits import describe_split, natural_key
from sharding.run.workers import processes
from sharding.sources.worldstrat.files import open_source
from sharding.sources.worldstrat.layout import AoiFiles, check_files, find_aois, read_split_file
from sharding.storage import Storage

_NOT_LISTED = "not-in-split-file"
"""The reason of an AOI that is complete and in no split."""

Runner = Callable[[Sequence[ShardTask]], Iterator[ShardResult]]
"""Does all tasks, anywhere and in any order, and yields each result when it is there."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What a run of `shard` did."""

    index: Index
    """The index that was written."""

    shards: dict[str, int]
    """How many shards were made, kept, or mended (their bytes were damaged)."""

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
    overwrite: bool = False,
) -> Report:
    """Make a dataset of a WorldStrat folder, or go on where an earlier run was interrupted.

    Args:
        folder: holds ``hr_dataset`` and ``lr_dataset``, or the published zips.
        output: where shards and index go. What is there and was not written by this program is refused and stays.
        options: how.
        workers: processes that prepare shards side by side; their number does not change a byte.
        say: is given each line that the user should read, such as AOIs moved between splits.
        runner: does the tasks instead of ``workers``.
        overwrite: replace a published dataset of another source or other options, which is refused otherwise.

    Raises:
        UserError: for a source, an option or a storage that the user can mend. A published dataset stays as it was,
            unless it is being overwritten: once enough AOIs could be read, its index is gone.
    """
    runner = runner or processes(workers)
    return _Sharding(folder, output, options, say).run(runner, overwrite)


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
        self.ours: set[str] = set()
        self.lone: frozenset[str] = frozenset()
        self._say = say
        for path in self.source.strays:
            self._note(f"{path!r} leaves the folder it lies in, and was not read")

    def run(self, runner: Runner, overwrite: bool) -> Report:
        plan, tasks = self._prepare(overwrite)
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
            self.ours |= {task.name for task in tasks} | {task.name + SIDECAR_SUFFIX for task in tasks}
            plan, tasks = self._plan(self.usable)
            self._tell(plan)
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

    def _prepare(self, overwrite: bool) -> tuple[Plan, list[ShardTask]]:
        """Plan, and see that the output may be written; only an index that is to be replaced is removed."""
        there = look(self.output)
        self.ours |= there.ours
        self.lone = there.lone
        plan, tasks = self._plan(self.usable)
        there.refuse_foreign([task.name for task in tasks])
        if there.index and there.index.plan != _digest(tasks):
            plan, tasks = self._plan_as_before(there.index) or (plan, tasks)
        another = there.holds_another(_digest(tasks), [task.fingerprint for task in tasks])
        if another and not overwrite:
            there.refuse_another(self.options.sample, plan.rule, self.options.plan.seed)
        if another:
            self._check_readable(tasks)
        if another or there.damaged_index:
            self.output.delete(INDEX_NAME)
        self._tell(plan)
        return plan, tasks

    def _plan(self, usable: Mapping[str, AoiFiles]) -> tuple[Plan, list[ShardTask]]:
        names = [aoi.name for aoi in self.found]
        sample = self.options.sample
        plan = make_plan(list(usable), names, self.rows, sample.sample_bytes, self.options.plan)
        tasks = [
            ShardTask(
                shard.split,
                shard.name,
                tuple(usable[aoi] for aoi in shard.aois),
                sample,
                self.options.strict,
                self.output,
                replaces=shard.name in self.ours,
            )
            for shard in plan.shards
        ]
        return plan, tasks

    def _plan_as_before(self, index: Index) -> tuple[Plan, list[ShardTask]] | None:
        """Return the plan of a dataset that was made with these options; None where it was not.

        Such a dataset has another plan at first where a split lost all its AOIs while they were read: it was planned
        again without those that could not be.
        """
        left_out = {item.aoi for item in index.skipped if item.reason != _NOT_LISTED} & self.usable.keys()
        usable = {name: aoi for name, aoi in self.usable.items() if name not in left_out}
        try:
            plan, tasks = self._plan(usable)
        except UserError:  # too few
            return None
        if index.plan != _digest(tasks):
            return None
        if not all(self._unread(self.usable[name]) for name in left_out):
            return None  # what was damaged then can be read now
        self.usable = usable
        self.skipped += [item for item in index.skipped if item.aoi in left_out]
        return plan, tasks

    def _check_readable(self, tasks: Sequence[ShardTask]) -> None:
        """See that enough AOIs can be prepared to fill all splits, before a published dataset is given up for them.

        Raises:
            UserError: too few can be.
        """
        usable = dict(self.usable)
        readable = 0
        for aoi in itertools.chain.from_iterable(task.aois for task in tasks):
            if self._unread(aoi):
                del usable[aoi.name]
            else:
                readable += 1
            if readable == len(SPLITS):
                return
        self._plan(usable)

    def _unread(self, aoi: AoiFiles) -> Skipped | None:
        """Return why an AOI cannot be prepared, or None where it can be."""
        try:
            make_sample(aoi, self.options.sample)
        except UnusableError as error:
            return skip(aoi.name, error, self.options.strict)
        return None

    def _do(self, tasks: Sequence[ShardTask], runner: Runner) -> tuple[list[ShardResult], dict[str, Histogram]]:
        """Do all tasks; return their results in the order of the tasks, and what these counted, added up."""
        sizes = {task.name: len(task.aois) for task in tasks}
        by_name: dict[str, ShardResult] = {}
        counted: dict[str, Histogram] = {}
        start, skipped, read, written = time.monotonic(), 0, 0, 0
        with progress(sum(len(task.aois) for task in tasks), "sharding", "AOI") as shown:
            # What may be refused comes first, before anything else is written.
            parts = [[task for task in tasks if (task.name in self.lone) == lone] for lone in (True, False)]
            for result in itertools.chain.from_iterable(runner(part) for part in parts if part):
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
                if result.why:
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
        not_listed = [Skipped(aoi, _NOT_LISTED, "the split file does not list it") for aoi in plan.split.left_out]
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
        """Write the index, and delete what earlier plans left of this program's that this one does not contain."""
        self.output.write(INDEX_NAME, index.to_json().encode())
        names = {result.name for result in results}
        for key in sorted(self.ours - names - {name + SIDECAR_SUFFIX for name in names} - {INDEX_NAME}):
            self.output.delete(key)

    def _tell(self, plan: Plan) -> None:
        for line in describe_split(plan.split):
            self._note(line)

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
