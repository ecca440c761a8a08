"""Groups of scenes that one split must hold together: tiles of one scene, and scenes whose footprints overlap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sharding.format.index import SPLITS, Index
from sharding.run.splits import Split, Splits, TooFewError, natural_key, permutation
from sharding.sources.source import Bounds, Corners, SceneFiles

SHRUNK = 0.99
"""Factor by which footprints are shrunk before they are compared: neighbours that only touch do not overlap."""


def overlaps(footprints: Mapping[str, Corners]) -> Iterator[tuple[str, str]]:
    """Yield each pair of names whose footprints overlap."""
    shrunk = {name: _shrunk(corners) for name, corners in footprints.items()}
    ordered = sorted((min(x for x, _ in corners), name) for name, corners in shrunk.items())
    active: list[str] = []
    for west, name in ordered:
        active = [other for other in active if max(x for x, _ in shrunk[other]) > west]
        for other in active:
            if _meet(shrunk[other], shrunk[name]):
                yield other, name
        active.append(name)


def rectangle(land: Bounds) -> Corners:
    """Return the corners of a piece of land from its west, south, east and north."""
    west, south, east, north = land
    return ((west, north), (east, north), (east, south), (west, south))


def leaks(index: Index) -> Iterator[str]:
    """Yield a line on each pair of samples that show the same land in different splits."""
    places = {}
    splits = {}
    for split in SPLITS:
        for _, entry in index.samples(split):
            if entry.content is not None and entry.content.land is not None:
                places[entry.aoi] = rectangle(entry.content.land)
                splits[entry.aoi] = split
    for one, other in overlaps(places):
        if splits[one] != splits[other]:
            yield f"AOI {one!r} in {splits[one]} and {other!r} in {splits[other]} show the same land"


def groups_of(scenes: Sequence[SceneFiles]) -> dict[str, str]:
    """Return the group of each scene, by name: its own, joined with the groups whose footprints it overlaps."""
    parents = {scene.group: scene.group for scene in scenes}

    def root(group: str) -> str:
        while parents[group] != group:
            parents[group] = parents[parents[group]]
            group = parents[group]
        return group

    own = {scene.name: scene.group for scene in scenes}
    for one, other in overlaps({scene.name: scene.footprint for scene in scenes if scene.footprint is not None}):
        first, second = sorted((root(own[one]), root(own[other])), key=natural_key)
        parents[second] = first
    return {name: root(group) for name, group in own.items()}


def grouped_split(aois: Sequence[str], groups: Mapping[str, str], seed: int, fractions: Sequence[float]) -> Split:
    """Shuffle the groups and fill val, then test, then train with whole groups, by their numbers of scenes.

    Val and test each get groups until they hold their share, at least one group.

    Args:
        aois: Usable scenes.
        groups: Group of each scene.
        seed: Seed of the permutation.
        fractions: Shares of train, val and test; the remainder is added to train.

    Raises:
        UserError: For fewer than three groups.
    """
    names = sorted({groups[aoi] for aoi in aois}, key=natural_key)
    if len(names) < len(SPLITS):
        raise TooFewError(
            f"{len(aois)} samples of {len(names)} separate pieces of land cannot fill train, val and test without "
            f"showing one the land of another: give at least {len(SPLITS)} scenes, or divide large ones with "
            "`--split-by block`"
        )
    members: dict[str, list[str]] = {name: [] for name in names}
    for aoi in sorted(aois, key=natural_key):
        members[groups[aoi]].append(aoi)
    waiting = [names[place] for place in permutation(len(names), seed)]
    splits: Splits = {split: [] for split in SPLITS}
    for split, fraction in zip(SPLITS[1:], fractions[1:], strict=True):
        later = len(SPLITS) - SPLITS.index(split)  # groups that the splits after this one need, and train
        while len(waiting) >= later and (not splits[split] or len(splits[split]) < int(fraction * len(aois))):
            splits[split] += members[waiting.pop(0)]
    splits["train"] = [aoi for group in waiting for aoi in members[group]]
    return Split(splits, ())


def _shrunk(corners: Corners) -> Corners:
    x, y = (sum(values) / len(corners) for values in zip(*corners, strict=True))
    return tuple((x + SHRUNK * (a - x), y + SHRUNK * (b - y)) for a, b in corners)


def _meet(one: Corners, other: Corners) -> bool:
    """Return whether two convex pieces of land meet: no line along an edge of one separates them."""
    for corners in (one, other):
        for (a, b), (c, d) in zip(corners, (*corners[1:], corners[0]), strict=True):
            mine, theirs = ([(x - a) * (b - d) + (y - b) * (c - a) for x, y in piece] for piece in (one, other))
            if max(mine) < min(theirs) or max(theirs) < min(mine):
                return False
    return True
