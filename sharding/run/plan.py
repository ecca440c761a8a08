"""Plan of a dataset: the shard of each AOI, a pure function of names and options."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from sharding.arguments import check_values
from sharding.errors import UserError
from sharding.format.index import SPLITS
from sharding.run.groups import grouped_split
from sharding.run.splits import (
    FRACTIONS,
    SPLIT_SEED,
    Split,
    listed_split,
    natural_key,
    published_split,
    seeded_split,
    split_of_added,
)
from sharding.schema import Seed

SPLIT_FILE = "stratified_train_val_test_split.csv"
MB = 1_000_000
SHARD_BYTES = 64 * MB
"""Default size of a shard: large enough to stream well; 3,889 AOIs make about 210 shards to spread over readers."""


def _parse_fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--fractions {text} is invalid: give three numbers, such as 0.8,0.1,0.1") from None


@dataclass(frozen=True)
class PlanOptions:
    """Options of splits and shards.

    Raises:
        UserError: For an invalid value; it names the option, the value and the valid ones.
    """

    splits: Literal["auto", "published", "seeded"] = "auto"
    """Rule of the split: ``published`` (the split file), ``seeded``, or ``auto``: published if the file exists."""

    fractions: tuple[float, float, float] = field(
        default=FRACTIONS, metadata={"metavar": "TRAIN,VAL,TEST", "parse": _parse_fractions}
    )
    """Shares of train, val and test in the seeded split; the remainder is added to train."""

    seed: Seed = SPLIT_SEED
    """Seed of the seeded split and of the order within splits."""

    shard_bytes: Annotated[int, Meta(ge=1, le=10**12)] = field(
        default=SHARD_BYTES, metadata={"option": "--shard-size", "metavar": "MB", "parse": float, "unit": MB}
    )
    """Largest size of a shard; a shard has at least one AOI. In bytes; the option is in MB."""

    for_ranks: Annotated[int, Meta(ge=1, le=10**6)] = 1
    """Ranks of later training: the number of training shards is a multiple of it if there are enough AOIs."""

    def __post_init__(self) -> None:
        check_values(self)
        if len(self.fractions) != len(SPLITS) or not (min(self.fractions) >= 0 and 0 < sum(self.fractions) <= 1 + 1e-9):
            given = ",".join(f"{fraction:g}" for fraction in self.fractions)
            raise UserError(f"--fractions {given} is invalid: give three numbers >= 0 whose sum is at most 1")


@dataclass(frozen=True)
class ShardPlan:
    """Plan of one shard."""

    split: str
    """Its split."""

    name: str
    """Its key beside the index."""

    aois: tuple[str, ...]
    """Its AOIs in order."""


@dataclass(frozen=True)
class Plan:
    """Splits and shards of the usable AOIs."""

    split: Split
    """AOIs of each split."""

    rule: str
    """Rule of the split: ``published`` or ``seeded``."""

    shards: tuple[ShardPlan, ...]
    """All shards, split by split."""


def make_plan(
    aois: Sequence[str],
    found: Sequence[str],
    rows: Sequence[tuple[str, str]] | None,
    sample_bytes: int,
    options: PlanOptions,
    groups: Mapping[str, str] | None = None,
) -> Plan:
    """Decide splits and shards.

    Args:
        aois: Usable AOIs.
        found: All AOIs, usable or not.
        rows: Rows (AOI, split) of the published split file; None without the file.
        sample_bytes: Expected size of a sample in a shard.
        options: Rule, seed and sizes.
        groups: Group of each AOI; a seeded split takes whole groups. None makes each AOI a group.

    Raises:
        UserError: If the published split is requested and its file is missing, or the AOIs are too few.
    """
    rule = ("seeded" if rows is None else "published") if options.splits == "auto" else options.splits
    if rule == "seeded" and groups and any(groups[aoi] != aoi for aoi in aois):
        split = grouped_split(aois, groups, options.seed, options.fractions)
    elif rule == "seeded":
        split = seeded_split(aois, options.seed, options.fractions, found)
    elif rows is not None:
        split = published_split(aois, rows)
    else:
        raise UserError(f"--splits published needs {SPLIT_FILE} in the input folder: add it, or use seeded")
    shards = []
    for name in SPLITS:
        members = list(split.splits[name])
        if rule == "published" or groups:
            random.Random(f"{options.seed}:{name}").shuffle(members)  # noqa: S311 - repeatable, no secret
        shards += _shards(name, members, 0, sample_bytes, options)
    return Plan(split, rule, tuple(shards))


def extend_plan(
    plan: Plan,
    aois: Sequence[str],
    number: int,
    rows: Sequence[tuple[str, str]] | None,
    sample_bytes: int,
    options: PlanOptions,
    groups: Mapping[str, str],
) -> Plan:
    """Add AOIs to a plan: no AOI of it moves, and the new ones get shards of their own.

    Args:
        plan: The plan so far.
        aois: Usable AOIs that it lacks.
        number: Number of additions before.
        rows: Rows (AOI, split) of the published split file, as in `make_plan`.
        sample_bytes: Expected size of a sample in a shard.
        options: Rule, seed and sizes.
        groups: Group of each AOI, old and new; an AOI that shows land of one split goes there, one of several nowhere.
    """
    if plan.rule == "published":
        new = listed_split(aois, rows or [])
    else:
        new = _added_split(plan.split.splits, aois, groups, options)
    shards = list(plan.shards)
    for name in SPLITS:
        members = list(new.splits[name])
        random.Random(f"{options.seed}:{number}:{name}").shuffle(members)  # noqa: S311 - repeatable, no secret
        first = sum(shard.split == name for shard in plan.shards)
        shards += _shards(name, members, first, sample_bytes, options)
    whole = Split(
        {name: [*plan.split.splits[name], *new.splits[name]] for name in SPLITS},
        plan.split.moved,
        (*plan.split.left_out, *new.left_out),
        (*plan.split.disputed, *new.disputed),
        (*plan.split.torn, *new.torn),
    )
    return Plan(whole, plan.rule, tuple(shards))


def _added_split(
    old: Mapping[str, Sequence[str]], aois: Sequence[str], groups: Mapping[str, str], options: PlanOptions
) -> Split:
    places = {groups[aoi]: set[str]() for aois in old.values() for aoi in aois}
    for name in SPLITS:
        for aoi in old[name]:
            places[groups[aoi]].add(name)
    free: dict[str, list[str]] = {}
    for aoi in aois:
        if groups[aoi] not in places:
            free.setdefault(groups[aoi], []).append(aoi)
    sizes = {name: len(old[name]) for name in SPLITS}
    chosen = {group: {split} for group, split in split_of_added(free, sizes, options.seed, options.fractions).items()}
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    torn = []
    for aoi in sorted(aois, key=natural_key):
        found = (chosen | places)[groups[aoi]]
        if len(found) > 1:
            torn.append((aoi, tuple(name for name in SPLITS if name in found)))
        else:
            splits[next(iter(found))].append(aoi)
    return Split(splits, (), torn=tuple(torn))


def _shards(split: str, members: Sequence[str], first: int, sample_bytes: int, options: PlanOptions) -> list[ShardPlan]:
    """Cut AOIs of a split into shards, numbered from ``first``."""
    ranks = options.for_ranks if split == "train" else 1
    count = _number_of_shards(len(members), sample_bytes, options.shard_bytes, ranks)
    parts = evenly(members, count) if members else []
    return [ShardPlan(split, f"{split}-{first + i:05d}.tar", tuple(part)) for i, part in enumerate(parts)]


def evenly(items: Sequence[str], parts: int) -> list[Sequence[str]]:
    """Cut a sequence into ``parts`` parts whose lengths differ by at most one."""
    cuts = [len(items) * i // parts for i in range(parts + 1)]
    return [items[start:end] for start, end in itertools.pairwise(cuts)]


def _number_of_shards(samples: int, sample_bytes: int, shard_bytes: int, ranks: int) -> int:
    """Return the number of shards of at most ``shard_bytes``, a multiple of the ranks if there are enough samples."""
    per_shard = max(1, shard_bytes // sample_bytes)
    wanted = math.ceil(samples / per_shard / ranks) * ranks
    return min(wanted, samples)
