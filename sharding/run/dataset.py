"""Dataset from a source: plan, shards, index.

The plan is pure: it assigns each AOI to a split and a shard. A shard is built by any process that sees source and
output: it is written to a temporary file, digested on the way, described by a sidecar, then published under its name,
in the folder of the plan's generation. The index is written last: until then an earlier dataset is published, and
its shards stay until `prune`. A run that resumes keeps each shard whose sidecar has the same plan and whose bytes have
the sidecar's digest. AOIs that the source gained are added (`sharding.run.planner`): the shards of the others stay, and
the index lists all. Files that this program did not write are never overwritten or deleted, see `sharding.run.output`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sharding.format.entries import ShardEntry, Skipped
from sharding.format.index import INDEX_NAME, SPLITS, Index, Measured
from sharding.format.layout import describe_chips
from sharding.format.sidecar import SIDECAR_SUFFIX, ShardResult
from sharding.format.statistics import Histogram
from sharding.progress import progress
from sharding.run.build import ShardTask
from sharding.run.job import ShardOptions
from sharding.run.output import check_space, generation_of, keys_of, look, shards_of
from sharding.run.plan import Plan
from sharding.run.planner import NOT_LISTED, TORN, Planner, plan_digest, skipped_table
from sharding.run.splits import describe_split, natural_key
from sharding.run.workers import processes
from sharding.sources.registry import open_source
from sharding.storage import Storage
from sharding.storage.lock import Lock

EXAMPLES = 5
"""Number of passed-over revisits that a summary names."""

Runner = Callable[[Sequence[ShardTask]], Iterator[ShardResult]]
"""Function that runs all tasks, anywhere and in any order, and yields each result when it is ready."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Report of one run of `shard`."""

    index: Index
    """Index that was written."""

    shards: dict[str, int]
    """Number of shards per outcome: made, kept, or repaired (their bytes were damaged)."""

    notes: tuple[str, ...]
    """Lines on splits and shards that the user should read."""

    passed: tuple[str, ...]
    """Lines on revisits that were passed over."""

    seconds: float
    """Seconds from the first listing of the source to the index."""

    bytes_in: int
    """Bytes read from source files."""

    bytes_out: int
    """Bytes of written shards."""

    def lines(self) -> Iterator[str]:
        """Yield the lines of a summary for the user."""
        aois = sum(len(self.index.samples(split)) for split in SPLITS)
        seconds = max(self.seconds, 1e-9)
        if self.passed:
            yield f"passed over {len(self.passed)} revisits, since others remained, such as:"
            yield from (f"  {line}" for line in self.passed[:EXAMPLES])
        yield f"shards  {', '.join(f'{count} {outcome}' for outcome, count in self.shards.items())}"
        yield (
            f"took    {self.seconds:.1f} s for {aois} AOIs ({aois / seconds:.3g}/s), read {self.bytes_in / 1e6:.1f} MB "
            f"({self.bytes_in / seconds / 1e6:.1f} MB/s), wrote {self.bytes_out / 1e6:.1f} MB"
        )

    def to_json(self) -> dict[str, object]:
        """Return the report as a table for a JSON file."""
        return {
            "index_sha256": self.index.digest,
            "aois": {split: len(self.index.samples(split)) for split in SPLITS},
            "shards": self.shards,
            **skipped_table(self.index.skipped),
            "passed_over": list(self.passed),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }


@dataclass(frozen=True)
class Placed:
    """Tasks of a plan with the folders of their shards."""

    folder: str
    """Folder of new shards; empty beside the index."""

    folders: Mapping[str, str]
    """Folders of the shards that an index lists, by name without folder."""

    tasks: list[ShardTask] = field(default_factory=list)
    """Tasks that build the shards there."""

    def of(self, name: str) -> str:
        """Return the folder of a shard."""
        return self.folders.get(name, self.folder)

    def key(self, name: str) -> str:
        """Return the key of a shard."""
        below = self.of(name)
        return f"{below}/{name}" if below else name


def shard_folder(
    folder: Path,
    output: Storage,
    options: ShardOptions,
    workers: int = 1,
    say: Callable[[str], None] = logger.info,
    runner: Runner | None = None,
    overwrite: bool = False,
) -> Report:
    """Make a dataset from a folder of scenes, or resume an interrupted run.

    Args:
        folder: The source.
        output: Destination of shards and index. Files there that this program did not write are refused and stay.
        options: Options of the dataset.
        workers: Processes that build shards in parallel; their number does not change a byte.
        say: Function that gets each line for the user, such as AOIs moved between splits.
        runner: Runs the tasks in place of ``workers`` processes.
        overwrite: Replace a published dataset of another source or other options; otherwise it is refused.

    Raises:
        UserError: For a source, an option or a storage that the user can correct, or another writer. A published
            dataset is unchanged.
    """
    runner = runner or processes(workers)
    return _Sharding(folder, output, options, say).run(runner, overwrite)


class _Sharding:
    """State of one run of `shard`."""

    def __init__(self, folder: Path, output: Storage, options: ShardOptions, say: Callable[[str], None]) -> None:
        self.start = time.monotonic()
        self.output, self.options = output, options
        self.source = open_source(folder, options.sample, options.source)
        self.planner = Planner(self.source, output, options)
        self.notes: list[str] = []
        self._say = say
        for line in self.source.notes:
            self._note(line)

    def run(self, runner: Runner, overwrite: bool) -> Report:
        plan, tasks = self.planner.plan()  # refuses a source with too few AOIs before anything is written
        with Lock(self.output, "shard", self._note) as lock:
            self.there = look(self.output)
            if aborted := self.output.abort_uploads(self.there.claims):
                self._note(f"removed the parts of killed uploads: {len(aborted)}, such as {aborted[0]}")
            index = self.there.latest
            if index and index.plan != plan_digest(tasks):
                plan, tasks = self.planner.adopt(index, extend=not overwrite) or (plan, tasks)
            return self._make(plan, tasks, runner, overwrite, lock)

    def _make(self, plan: Plan, tasks: list[ShardTask], runner: Runner, overwrite: bool, lock: Lock) -> Report:
        results: list[ShardResult] = []
        abandoned: set[str] = set()
        while True:
            placed = self._placed(plan, tasks, overwrite)
            now, counted = self._do(placed.tasks, runner)
            results += now
            unread = [item for result in now for item in result.skipped]
            self.planner.skipped += unread
            for item in unread:
                del self.planner.usable[item.aoi]
            if {task.split for task, result in zip(tasks, now, strict=True) if result.entry} == set(SPLITS):
                break
            # All AOIs of a split proved unreadable: plan again with the readable ones.
            abandoned |= {placed.key(task.name) + suffix for task in tasks for suffix in ("", SIDECAR_SUFFIX)}
            plan, tasks = self.planner.plan()
        index = self._publish(self._index(plan, placed, now, counted), placed.folder, lock)
        for key in sorted(abandoned - self.there.ours - keys_of(index)):
            self.output.delete(key)
        return Report(
            index=index,
            shards=dict(Counter(result.outcome for result in results)),
            notes=tuple(self.notes),
            passed=tuple(line for result in now for line in result.passed),
            seconds=time.monotonic() - self.start,
            bytes_in=sum(result.bytes_in for result in results),
            bytes_out=sum(result.bytes_out for result in results),
        )

    def _placed(self, plan: Plan, tasks: Sequence[ShardTask], overwrite: bool) -> Placed:
        """Return the folders of a plan's shards, and the tasks that build them there.

        Shards to which others are added keep their places, and their bytes are not read again.

        Raises:
            UserError: Files that this program did not write are in the way, another dataset is published there, or the
                disk is too small.
        """
        digest, prints, earlier = plan_digest(tasks), [task.fingerprint for task in tasks], self.there.latest
        folder = self.there.folder(digest, prints)
        adds = earlier is not None and earlier.plan != digest and bool(self.planner.additions)
        self.there.refuse_foreign(folder)
        if not (overwrite or adds) and self.there.holds_another(digest, prints):
            self.there.refuse_another(self.options.sample, plan.rule, self.options.plan.seed)
        kept = shards_of(earlier) if earlier and (adds or earlier.plan == digest) else {}
        placed = Placed(folder, {name: entry.name.rpartition("/")[0] for name, entry in kept.items()})
        missing = [task for task in tasks if placed.key(task.name) not in self.there.ours]
        size = self.source.sample_bytes(self.options.sample)
        check_space(self.output, size * sum(len(task.aois) for task in missing))
        for line in describe_split(plan.split):
            self._note(line)
        if adds:
            self._note(f"{len(self.planner.additions[-1])} AOIs are added; the shards of the others stay as they are")
        for task in tasks:
            below = placed.of(task.name)
            entry = kept.get(task.name)
            placed.tasks.append(
                replace(
                    task,
                    output=self.output.child(below) if below else self.output,
                    published=self.there.index is not None and (entry is not None or self.there.index.plan == digest),
                    trusted=adds and entry is not None and self.there.sizes.get(entry.name) == entry.bytes,
                )
            )
        return placed

    def _do(self, tasks: Sequence[ShardTask], runner: Runner) -> tuple[list[ShardResult], dict[Measured, Histogram]]:
        """Run all tasks; return their results in task order, and the sum of their histograms."""
        sizes = {task.name: len(task.aois) for task in tasks}
        by_name: dict[str, ShardResult] = {}
        counted: dict[Measured, Histogram] = {}
        start, skipped, read, written = time.monotonic(), 0, 0, 0
        with progress(sum(len(task.aois) for task in tasks), "sharding", "AOI") as shown:
            for result in runner(tasks):
                # Counts take megabytes per shard: do not keep them for each.
                by_name[result.name] = replace(result, histograms={})
                for name, histogram in result.histograms.items():
                    counted[name] = counted[name] + histogram if name in counted else histogram
                seconds = max(time.monotonic() - start, 1e-9)
                skipped += len(result.skipped)
                read += result.bytes_in
                written += result.bytes_out
                rates = {"in": f"{read / seconds / 1e6:.0f} MB/s", "out": f"{written / seconds / 1e6:.0f} MB/s"}
                shown.update(sizes[result.name], **rates, skipped=len(self.planner.skipped) + skipped)
                if result.why:
                    self._note(f"{result.name} {result.why}")
        return [by_name[task.name] for task in tasks], counted

    def _index(
        self,
        plan: Plan,
        placed: Placed,
        results: Sequence[ShardResult],
        counted: Mapping[Measured, Histogram],
    ) -> Index:
        done = list(zip(placed.tasks, results, strict=True))
        splits: dict[str, tuple[ShardEntry, ...]] = {
            split: tuple(
                replace(result.entry, name=placed.key(result.name))
                for task, result in done
                if task.split == split and result.entry
            )
            for split in SPLITS
        }
        not_listed = [Skipped(aoi, NOT_LISTED, "the split file does not list it") for aoi in plan.split.left_out]
        torn = [Skipped(aoi, TORN, f"it shows land of {' and '.join(splits)}") for aoi, splits in plan.split.torn]
        samples = [(item.aoi, item.layout) for shards in splits.values() for shard in shards for item in shard.samples]
        facts = self.source.facts(self.options.sample, (layout for _, layout in samples))
        for line in describe_chips(facts, self.options.source.chip, samples):
            self._note(line)
        return Index(
            preparation=self.options.sample,
            split_rule=plan.rule,
            split_seed=self.options.plan.seed,
            plan=plan_digest(placed.tasks),
            splits=splits,
            statistics={name: histogram.statistics() for name, histogram in counted.items()},
            skipped=tuple(sorted([*self.planner.skipped, *not_listed, *torn], key=lambda item: natural_key(item.aoi))),
            facts=replace(facts, options=self.options.source.given),
            appended=self.planner.additions,
        )

    def _publish(self, index: Index, folder: str, lock: Lock) -> Index:
        """Make a generation the published one, by one write at the end; return the published index.

        An index of this generation with the same content stays as it is, also if an earlier version wrote it in another
        format. Otherwise copies of both indexes are stored first: later they show which files this program wrote.
        """
        before, known = self.there.index, self.there.generations.get(generation_of(index.plan))
        lock.check()
        if known is not None and _same(known, index):
            index = known
        if before is not None and before.digest == index.digest:
            return before
        if before is not None:
            self.output.create(f"{generation_of(before.plan)}/{INDEX_NAME}", self.there.text)
        if folder:
            self.output.write(f"{folder}/{INDEX_NAME}", index.data)
        lock.check()
        self.output.write(INDEX_NAME, index.data)
        return index

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
            self._say(line)


def _same(one: Index, other: Index) -> bool:
    """Return True if two indexes have the same plan, shards and skipped AOIs, whatever their format versions."""

    def content(index: Index) -> object:
        shards = {name: [(shard.name, shard.sha256) for shard in index.splits[name]] for name in SPLITS}
        return index.plan, shards, [(item.aoi, item.reason) for item in index.skipped]

    return content(one) == content(other)
