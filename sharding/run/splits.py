"""Which AOI is in which split: pure functions of names, rule and seed. An AOI never spans two splits."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sharding.errors import UserError
from sharding.format.index import SPLITS

SPLIT_SEED = 386564310
"""The published seed."""
FRACTIONS = (0.8, 0.1, 0.1)
"""The published shares of train, val and test."""

Splits = dict[str, list[str]]


@dataclass(frozen=True)
class Split:
    """The outcome for a list of AOIs."""

    splits: Splits
    """Per split, its AOIs in order."""

    moved: tuple[tuple[str, str, str], ...]
    """(AOI, from, to) for those that were moved so that no split is empty."""

    left_out: tuple[str, ...] = ()
    """AOIs that the rule knows nothing of."""

    disputed: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    """(AOI, the splits that the file names, the one it went to) for those listed in more than one."""


def natural_key(name: str) -> tuple[str | int, ...]:
    """Sort key in which runs of digits compare as integers: ``a-2`` comes before ``a-10``."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name))


def permutation(num_items: int, seed: int) -> list[int]:
    """Return torch's random permutation of ``range(num_items)`` for a seed, as the published splits use it."""
    import torch  # here, not above: the command's help should not wait for it

    order: list[int] = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def seeded_split(
    aois: Sequence[str], seed: int, fractions: Sequence[float] = FRACTIONS, found: Sequence[str] | None = None
) -> Split:
    """Shuffle all AOIs that were found, in natural order, and cut by position; those left by rounding go to train.

    Those that are unusable take part in shuffling and cutting, as in the published code: so an AOI's split does not
    depend on whether another one can be read.

    Args:
        aois: the usable AOIs.
        seed: of the permutation.
        fractions: shares of train, val and test; what they leave goes to train.
        found: all AOIs; by default the usable ones.

    Raises:
        UserError: for fewer than three usable AOIs.
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
    left_out, disputed = [], []
    for aoi in sorted(aois, key=natural_key):
        if aoi not in wanted:
            left_out.append(aoi)
            continue
        chosen = min(wanted[aoi], key=lambda split: (count[split], split))
        splits[chosen].append(aoi)
        if len(wanted[aoi]) > 1:
            disputed.append((aoi, tuple(sorted(wanted[aoi])), chosen))
    return Split(splits, _fill(splits), tuple(left_out), tuple(disputed))


def describe_split(split: Split) -> list[str]:
    """Return a line for the user for each AOI whose split is not simply what the rule says."""
    return [
        *(f"AOI {aoi!r} is listed in {' and '.join(named)}: it went to {to}" for aoi, named, to in split.disputed),
        *(f"split {to} was empty: AOI {aoi!r} was moved to it from {source}" for aoi, source, to in split.moved),
    ]


def _fill(splits: Splits) -> tuple[tuple[str, str, str], ...]:
    """Give each empty split the last AOI of train, or of the largest split where train has one or none."""
    total = sum(map(len, splits.values()))
    if total < len(SPLITS):
        raise UserError(
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
