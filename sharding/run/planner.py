"""Planner of one run of `shard`: the AOIs of a source, and the plan of a dataset with what was added to it later.

AOIs that a source gains after a dataset was made are added to it: its plan is that of its first AOIs, which gives the
same shards as before, followed by the plans of all additions in their order. The index lists the AOIs of each addition,
so every later run finds the same plan again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from sharding.errors import UnusableError, UserError
from sharding.format.entries import Skipped
from sharding.format.index import SPLITS, Index
from sharding.prepare.sample import make_sample
from sharding.run.build import ShardTask, skip
from sharding.run.groups import groups_of
from sharding.run.job import ShardOptions
from sharding.run.plan import Plan, extend_plan, make_plan
from sharding.run.splits import TooFewError, natural_key
from sharding.sources.source import SceneFiles, Source
from sharding.storage import Storage

NOT_LISTED = "not-in-split-file"
"""Reason of an AOI that is complete but in no split."""
TORN = "in-two-splits"
"""Reason of an added AOI that shows land of two splits."""


class TooFewAoisError(UserError):
    """Error of a source with too few usable AOIs; the message counts the reasons, each with an example."""

    def __init__(self, message: str, skipped: Sequence[Skipped]) -> None:
        self.skipped = tuple(skipped)
        examples = {item.reason: f"{item.aoi!r}, {item.detail}" for item in reversed(skipped)}
        counts = Counter(item.reason for item in skipped).most_common()
        reasons = "; ".join(f"{count} {reason} (such as {examples[reason]})" for reason, count in counts)
        super().__init__(f"{message}; skipped: {reasons}" if reasons else message)

    def to_json(self) -> dict[str, object]:
        """Return the reasons as the table for a JSON file that a finished run's report is too."""
        return {"error": str(self), **skipped_table(self.skipped)}


class Planner:
    """AOIs of a source, and their plan."""

    def __init__(self, source: Source, output: Storage, options: ShardOptions) -> None:
        """List and check the AOIs.

        Raises:
            UserError: An AOI that ``--aois`` names is missing, or all AOIs lack a target that another option replaces.
        """
        self.source, self.output, self.options = source, output, options
        self.found = _chosen(source.scenes, options.aois)
        self.rows = None if options.plan.splits == "seeded" else source.split_rows()
        self.usable, self.skipped = _sift(self.found, options)
        self.additions: tuple[tuple[str, ...], ...] = ()
        """AOIs of each addition, in order."""

    def plan(self) -> tuple[Plan, list[ShardTask]]:
        """Return the plan of the usable AOIs, and its tasks.

        Raises:
            TooFewAoisError: The first AOIs are too few.
        """
        return self._plan_of(self.usable, self.found, self.additions)

    def adopt(self, index: Index, *, extend: bool) -> tuple[Plan, list[ShardTask]] | None:
        """Return the plan of an existing dataset, if the source and these options give it, else None.

        Its plan differs from the first plan of these options if all AOIs of a split proved unreadable: it was then
        planned again without the unreadable ones. Unusable AOIs that the dataset does not know are ignored, so that
        they can be added when they are complete.

        Args:
            index: Index of the dataset.
            extend: True adds the usable AOIs that it does not know; otherwise there must be none.
        """
        known = _known(index)
        new = {name: scene for name, scene in self.usable.items() if name not in known}
        found = [scene for scene in self.found if scene.name in known]
        usable = {name: scene for name, scene in self.usable.items() if name in known}
        left_out = {item.aoi for item in index.skipped if item.reason not in (NOT_LISTED, TORN)} & usable.keys()
        if new and not extend:
            return None
        for unread in (set[str](), left_out):
            planned = {name: scene for name, scene in usable.items() if name not in unread}
            if self._gives(index, planned, found) and all(self._unread(usable[name]) for name in unread):
                self.found, self.usable = [*found, *new.values()], planned | new
                self.skipped = [item for item in self.skipped if item.aoi in known]
                self.skipped += [item for item in index.skipped if item.aoi in unread]
                self.additions = (*index.appended, tuple(sorted(new, key=natural_key))) if new else index.appended
                return self.plan()
        return None

    def _gives(self, index: Index, usable: Mapping[str, SceneFiles], found: Sequence[SceneFiles]) -> bool:
        """Return True if these AOIs give the plan of a dataset."""
        try:
            _, tasks = self._plan_of(usable, found, index.appended)
        except UserError:  # too few
            return False
        return plan_digest(tasks) == index.plan

    def _plan_of(
        self, usable: Mapping[str, SceneFiles], found: Sequence[SceneFiles], additions: Sequence[Sequence[str]]
    ) -> tuple[Plan, list[ShardTask]]:
        sample, options = self.options.sample, self.options.plan
        size = self.source.sample_bytes(sample)
        added = {name for names in additions for name in names}
        first = {name: scene for name, scene in usable.items() if name not in added}
        try:
            names = [scene.name for scene in found if scene.name not in added]
            plan = make_plan(list(first), names, self.rows, size, options, _groups(first))
        except TooFewError as error:
            raise TooFewAoisError(str(error), self.skipped) from None
        planned = first
        for number, addition in enumerate(additions):
            new = {name: usable[name] for name in addition if name in usable}
            planned = planned | new
            plan = extend_plan(plan, list(new), number, self.rows, size, options, groups_of(list(planned.values())))
        return plan, self._tasks(plan, usable)

    def _tasks(self, plan: Plan, usable: Mapping[str, SceneFiles]) -> list[ShardTask]:
        sample = self.options.sample
        facts = self.source.facts(sample, ())
        return [
            ShardTask(shard.split, shard.name, aois, sample, self.options.strict, self.output, facts, limits)
            for limits in [self.options.source]
            for shard in plan.shards
            for aois in [tuple(usable[aoi] for aoi in shard.aois)]
        ]

    def _unread(self, aoi: SceneFiles) -> Skipped | None:
        """Return the index entry of an AOI that cannot be prepared, else None."""
        try:
            make_sample(aoi, self.options.sample)
        except UnusableError as error:
            return skip(aoi.name, error, self.options.strict)
        return None


def skipped_table(skipped: Sequence[Skipped]) -> dict[str, object]:
    """Return skipped AOIs for JSON, with their number per reason."""
    return {
        "skipped": dict(Counter(item.reason for item in skipped)),
        "skipped_aois": [vars(item) for item in skipped],
    }


def plan_digest(tasks: Sequence[ShardTask]) -> str:
    """Return the digest of a plan: SHA-256, in hex, of its tasks' fingerprints."""
    return hashlib.sha256("".join(task.fingerprint for task in tasks).encode()).hexdigest()


def _groups(usable: Mapping[str, SceneFiles]) -> dict[str, str] | None:
    """Return the group of each scene, by name; None if each is a group of its own."""
    groups = groups_of(list(usable.values()))
    return groups if any(group != name for name, group in groups.items()) else None


def _known(index: Index) -> set[str]:
    """Return the AOIs that an index tells of."""
    stored = {sample.aoi for split in SPLITS for _, sample in index.samples(split)}
    return stored | {item.aoi for item in index.skipped}


def _chosen(found: Sequence[SceneFiles], wanted: Sequence[str] | None) -> list[SceneFiles]:
    if wanted is None:
        return list(found)
    missing = sorted(set(wanted) - {aoi.name for aoi in found}, key=natural_key)
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"--aois names {missing[0]!r}{rest}, which the input does not hold: correct or remove the line")
    return [aoi for aoi in found if aoi.name in set(wanted)]


def _sift(found: Sequence[SceneFiles], options: ShardOptions) -> tuple[dict[str, SceneFiles], list[Skipped]]:
    """Separate the AOIs with complete files from the others.

    Raises:
        UserError: If none is complete, and all lack only targets that another option does not need.
    """
    usable: dict[str, SceneFiles] = {}
    skipped = []
    for aoi in found:
        try:
            aoi.check(options.sample)
            usable[aoi.name] = aoi
        except UnusableError as error:
            skipped.append(skip(aoi.name, error, options.strict))
    if not usable and skipped and all("--hr rgbn" in item.detail for item in skipped):
        raise UserError(f"AOI {skipped[0].aoi!r} and all others cannot be used: {skipped[0].detail}")
    return usable, skipped
