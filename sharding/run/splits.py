"""Splits of the AOIs: pure functions of names, rule and seed. No AOI is in two splits."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sharding.errors import UserError
from sharding.format.index import SPLITS

SPLIT_SEED = 386564310
"""Published seed."""
FRACTIONS = (0.8, 0.1, 0.1)
"""Published shares of train, val and test."""

Splits = dict[str, list[str]]


class TooFewError(UserError):
    """Error of fewer usable AOIs than there are splits."""


@dataclass(frozen=True)
class Split:
    """Split of a list of AOIs."""

    splits: Splits
    """AOIs of each split, in order."""

    moved: tuple[tuple[str, str, str], ...]
    """Moves (AOI, from, to) that were made so that no split is empty."""

    left_out: tuple[str, ...] = ()
    """AOIs that the rule does not list."""

    disputed: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    """AOIs that the file lists in several splits: (AOI, these splits, the chosen one)."""

    torn: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Added AOIs that show land of several splits, and so are in none: (AOI, these splits)."""


def natural_key(name: str) -> tuple[str | int, ...]:
    """Return a sort key in which runs of digits compare as integers: ``a-2`` comes before ``a-10``."""
    return tuple(int(part) if part.isascii() and part.isdigit() else part for part in re.split(r"([0-9]+)", name))


def permutation(num_items: int, seed: int) -> list[int]:
    """Return torch's random permutation of ``range(num_items)`` for a seed, as in the published splits."""
    import torch  # here, not above: the command's help should not wait for it

    order: list[int] = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def seeded_split(
    aois: Sequence[str], seed: int, fractions: Sequence[float] = FRACTIONS, found: Sequence[str] | None = None
) -> Split:
    """Shuffle all found AOIs, in natural order, and cut by position; the remainder of rounding is added to train.

    Unusable AOIs are shuffled and cut too, as in the published code: an AOI's split does not depend on whether another
    one can be read.

    Args:
        aois: Usable AOIs.
        seed: Seed of the permutation.
        fractions: Shares of train, val and test; the remainder is added to train.
        found: All AOIs; by default the usable ones.

    Raises:
        UserError: For fewer than three usable AOIs.
    """
    names = sorted(aois if found is None else found, key=natural_key)
    order = [names[k] for k in permutation(len(names), seed)]
    sizes = [int(fraction * len(order)) for fraction in fractions]
    first, second = sizes[0], sizes[0] + sizes[1]
    third = second + sizes[2]
    parts = {"train": order[:first] + order[third:], "val": order[first:second], "test": order[second:third]}
    usable = set(aois)
    splits = {split: [aoi for aoi in part if aoi in usable] for split, part in parts.items()}
    return Split(splits, _fill(splits))


def published_split(aois: Sequence[str], rows: Sequence[tuple[str, str]]) -> Split:
    """Split the AOIs by the published split file.

    An AOI that the file lists in two splits is assigned to the rarer one; an AOI that it does not list is skipped.

    Args:
        aois: Usable AOIs.
        rows: Rows (AOI, split) of the file, repeated rows included.

    Raises:
        UserError: For an unknown split in the file, or if it lists fewer than three of the AOIs.
    """
    split = listed_split(aois, rows)
    return replace(split, moved=_fill(split.splits))


def listed_split(aois: Sequence[str], rows: Sequence[tuple[str, str]]) -> Split:
    """Split the AOIs like `published_split`; splits may stay empty.

    Raises:
        UserError: For an unknown split in the file.
    """
    unknown = sorted({split for _, split in rows} - set(SPLITS))
    if unknown:
        raise UserError(f"the split file names the split {unknown[0]!r}: it may say {', '.join(SPLITS)}")
    count = Counter(split for _, split in rows)
    wanted: dict[str, set[str]] = defaultdict(set)
    for aoi, split in rows:
        wanted[aoi].add(split)
    splits: Splits = {split: [] for split in SPLITS}
    left_out, disputed = [], []
    for aoi in sorted(aois, key=natural_key):
        if aoi not in wanted:
            left_out.append(aoi)
            continue
        chosen = min(wanted[aoi], key=lambda split: (count[split], split))
        splits[chosen].append(aoi)
        if len(wanted[aoi]) > 1:
            disputed.append((aoi, tuple(sorted(wanted[aoi])), chosen))
    return Split(splits, (), tuple(left_out), tuple(disputed))


def split_of_added(
    groups: Mapping[str, Sequence[str]], sizes: Mapping[str, int], seed: int, fractions: Sequence[float]
) -> dict[str, str]:
    """Return the splits of groups of AOIs that are added to a dataset, whose AOIs stay where they are.

    The groups are shuffled; each goes to the split that is furthest below its share of the whole.

    Args:
        groups: AOIs of each new group.
        sizes: Number of AOIs in each split so far.
        seed: Seed of the permutation.
        fractions: Shares of train, val and test; the remainder is added to train.
    """
    names = sorted(groups, key=natural_key)
    counts = {split: sizes[split] for split in SPLITS}
    total = sum(counts.values()) + sum(map(len, groups.values()))
    shares = {"train": 1 - fractions[1] - fractions[2], "val": fractions[1], "test": fractions[2]}
    found = {}
    for place in permutation(len(names), seed):
        group = names[place]
        split = max(SPLITS, key=lambda name: shares[name] * total - counts[name])
        counts[split] += len(groups[group])
        found[group] = split
    return found


def describe_split(split: Split) -> list[str]:
    """Return a line for the user on each AOI whose split differs from the plain rule."""
    return [
        *(f"AOI {aoi!r} is listed in {' and '.join(named)}: assigned to {to}" for aoi, named, to in split.disputed),
        *(f"split {to} was empty: AOI {aoi!r} was moved to it from {source}" for aoi, source, to in split.moved),
    ]


def _fill(splits: Splits) -> tuple[tuple[str, str, str], ...]:
    """Move an AOI to each empty split: the last of train, or of the largest split if train has fewer than two."""
    total = sum(map(len, splits.values()))
    if total < len(SPLITS):
        raise TooFewError(
            f"{total} usable AOIs cannot fill train, val and test: give at least {len(SPLITS)}, complete and listed "
            "in the split file if there is one (`--splits seeded` ignores it)"
        )
    moved = []
    for split in reversed(SPLITS):
        if not splits[split]:
            donor = "train" if len(splits["train"]) > 1 else max(SPLITS, key=lambda name: len(splits[name]))
            aoi = splits[donor].pop()
            splits[split].append(aoi)
            moved.append((aoi, donor, split))
    return tuple(moved)
