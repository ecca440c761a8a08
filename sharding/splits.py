"""Which AOI is in which split: pure functions of names, rule and seed. An AOI never spans two splits."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sharding.errors import UserError
from sharding.schema import SPLITS

SPLIT_SEED = 386564310
"""The published seed."""
SHARD_SIZE = 32
"""AOIs a shard: 110 MB, enough to stream well, and 3,889 AOIs still make 122 shards to spread over readers."""
TRAIN_SHARE, OTHER_SHARE = 0.8, 0.1

Splits = dict[str, list[str]]


@dataclass(frozen=True)
class Split:
    """The outcome for a list of AOIs."""

    splits: Splits
    """Per split, its AOIs in order."""

    moved: tuple[tuple[str, str, str], ...]
    """(AOI, from, to) for those that were moved so that no split is empty."""

    left_out: tuple[str, ...]
    """AOIs that the rule knows nothing of."""


def natural_key(name: str) -> tuple[str | int, ...]:
    """Sort key in which runs of digits compare as integers: ``a-2`` comes before ``a-10``."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name))


def permutation(num_items: int, seed: int) -> list[int]:
    """Return torch's random permutation of ``range(num_items)`` for a seed, as the published splits use it."""
    import torch  # here, not above: the command's help should not wait for it

    order: list[int] = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def seeded_split(aois: Sequence[str], seed: int) -> Split:
    """Shuffle the naturally sorted AOIs and cut them 80/10/10 by position; those left by rounding go to train.

    Raises:
        UserError: for fewer than three AOIs.
    """
    names = sorted(aois, key=natural_key)
    order = [names[k] for k in permutation(len(names), seed)]
    train, other = int(TRAIN_SHARE * len(order)), int(OTHER_SHARE * len(order))
    cuts = (train, train + other, train + 2 * other)
    splits = {
        "train": order[: cuts[0]] + order[cuts[2] :],
        "val": order[cuts[0] : cuts[1]],
        "test": order[cuts[1] : cuts[2]],
    }
    return Split(splits, _fill(splits), ())


def published_split(aois: Sequence[str], rows: Sequence[tuple[str, str]]) -> Split:
    """Follow the published split file.

    An AOI that the file lists in two splits goes to the rarer of them; one that it does not list is left out.

    Args:
        aois: the AOIs at hand.
        rows: (AOI, split) of the file, repeated rows included.

    Raises:
        UserError: for an unknown split in the file, or fewer than three AOIs that it lists.
    """
    unknown = sorted({split for _, split in rows} - set(SPLITS))
    if unknown:
        raise UserError(f"the split file names the split {unknown[0]!r}: it may say {', '.join(SPLITS)}")
    count = Counter(split for _, split in rows)
    wanted: dict[str, set[str]] = defaultdict(set)
    for aoi, split in rows:
        wanted[aoi].add(split)
    splits: Splits = {split: [] for split in SPLITS}
    left_out = []
    for aoi in sorted(aois, key=natural_key):
        if aoi in wanted:
            splits[min(wanted[aoi], key=lambda split: (count[split], split))].append(aoi)
        else:
            left_out.append(aoi)
    return Split(splits, _fill(splits), tuple(left_out))


def describe_moves(moved: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return a line for the user for each AOI that was moved to fill a split."""
    return [f"split {to} was empty: AOI {aoi!r} was moved to it from {source}" for aoi, source, to in moved]


def _fill(splits: Splits) -> tuple[tuple[str, str, str], ...]:
    """Give each empty split the last AOI of train, or of the largest split where train has one or none."""
    total = sum(map(len, splits.values()))
    if total < len(SPLITS):
        raise UserError(
            f"{total} usable AOIs cannot fill train, val and test: give at least {len(SPLITS)}, complete and listed "
            "in the split file if there is one (`--split seeded` ignores it)"
        )
    moved = []
    for split in reversed(SPLITS):
        if not splits[split]:
            donor = "train" if len(splits["train"]) > 1 else max(SPLITS, key=lambda name: len(splits[name]))
            aoi = splits[donor].pop()
            splits[split].append(aoi)
            moved.append((aoi, donor, split))
    return tuple(moved)


def shard_names(splits: Mapping[str, Sequence[str]], shard_size: int) -> list[tuple[str, str, tuple[str, ...]]]:
    """Cut each split into shards.

    Returns:
        (split, shard's key, its AOIs) in order; at most ``shard_size`` AOIs a shard.
    """
    return [
        (split, f"{split}-{number:05d}.tar", tuple(splits[split][start : start + shard_size]))
        for split in SPLITS
        for number, start in enumerate(range(0, len(splits[split]), shard_size))
    ]
