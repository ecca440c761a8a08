"""Contents of an output of `shard`: generations of a dataset, and the files that this program did not write.

A generation is the dataset of one plan. Its shards and sidecars are in the folder ``plan-<16 digits of its digest>``,
or beside the index if an earlier version wrote them. ``index.json`` names the shards of the published generation. Each
generation that was ever published is also listed by a copy of its index, ``plan-<...>/index.json``. Only files that an
index lists or a sidecar describes are this program's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sharding.errors import UserError
from sharding.format.entries import ShardEntry
from sharding.format.index import INDEX_NAME, SPLITS, Index
from sharding.format.sidecar import SIDECAR_SUFFIX, read_sidecar
from sharding.prepare.options import SampleOptions
from sharding.storage import BucketNotFoundError, CorruptedError, LocalStorage, NotFoundError, Storage

_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.tar")
_GENERATION = re.compile(r"plan-[0-9a-f]{16}")
# Such a name may also be a folder's, with files below it.
_OURS = rf"({_SHARD.pattern}({re.escape(SIDECAR_SUFFIX)})?|{re.escape(INDEX_NAME)})(/.*)?"
_LOOKED_AT = re.compile(rf"{_GENERATION.pattern}/.*|{_OURS}", re.DOTALL)
_IN_THE_WAY = re.compile(_OURS, re.DOTALL)
_GENERATED = re.compile(
    rf"{_GENERATION.pattern}/({_SHARD.pattern}({re.escape(SIDECAR_SUFFIX)})?|{re.escape(INDEX_NAME)})"
)
_PARALLEL = 8
"""Sidecars read in parallel."""
_OPTIONS = {"hr_source": "hr"}
"""Names in the index that differ from the command line's."""

Described = tuple[str, int | None]
"""Content of a sidecar: the task's fingerprint, and the shard's size in bytes; None if no AOI could be read."""


def generation_of(plan: str) -> str:
    """Return the name of the folder of a plan's generation, from the plan's digest."""
    return f"plan-{plan[:16]}"


def keys_of(index: Index) -> set[str]:
    """Return the keys of an index's shards and their sidecars."""
    shards = {shard.name for shards in index.splits.values() for shard in shards}
    return shards | {name + SIDECAR_SUFFIX for name in shards}


def shards_of(index: Index) -> dict[str, ShardEntry]:
    """Return an index's shards by their names without folder, which are unique."""
    return {shard.name.rpartition("/")[2]: shard for shards in index.splits.values() for shard in shards}


@dataclass(frozen=True)
class Output:
    """Contents of the place of a dataset."""

    uri: str
    """URI of the place."""

    text: bytes
    """Bytes of ``index.json``; empty if there is none."""

    index: Index | None
    """Index of the published generation; None if it is missing or damaged."""

    generations: Mapping[str, Index]
    """Indexes of all generations that were ever published, by folder."""

    fingerprints: Mapping[str, str]
    """Fingerprint of each shard that no index lists, by key, from its sidecar."""

    sizes: Mapping[str, int]
    """Size in bytes of each existing file with a name of a dataset's files, or below a generation's folder."""

    ours: frozenset[str]
    """Those of these keys that this program wrote."""

    @property
    def latest(self) -> Index | None:
        """Index of the published generation; if it is damaged, of the one with the most additions."""
        if self.index is not None or not self.damaged_index:
            return self.index
        return max(self.generations.values(), key=lambda index: len(index.appended), default=None)

    @property
    def damaged_index(self) -> bool:
        """True if there is an index of this program that cannot be read."""
        return self.index is None and INDEX_NAME in self.ours

    def claims(self, key: str) -> bool:
        """Return True if only this program stores an object of this key: it is its own, or in a generation's folder."""
        return key in self.ours or _GENERATED.fullmatch(key) is not None

    def folder(self, plan: str, fingerprints: Collection[str]) -> str:
        """Return the folder of a plan's shards: its generation's, or "" if an earlier version wrote them there."""
        known = self.generations.get(generation_of(plan))
        if known is not None and known.plan == plan and not known.appended:
            return "" if any("/" not in key for key in keys_of(known)) else generation_of(plan)
        begun = {print_ for key, print_ in self.fingerprints.items() if "/" not in key}
        return "" if begun & set(fingerprints) else generation_of(plan)

    def refuse_foreign(self, folder: str) -> None:
        """Refuse files that this program did not write, beside the index or in the folder that is to be written.

        Raises:
            UserError: If there are any; it names the first one.
        """
        foreign = sorted(key for key in self.sizes.keys() - self.ours if _is_in_the_way(key, folder))
        if foreign:
            more = f" and {len(foreign) - 1} more files" if len(foreign) > 1 else ""
            raise UserError(
                f"--output {self.uri} holds {foreign[0]!r}{more}, which this program did not write: nothing was "
                "changed; move your files away, or give another --output"
            )

    def holds_another(self, plan: str, fingerprints: Collection[str]) -> bool:
        """Return True if a dataset is published that does not have this plan, or may not have it."""
        if self.index is not None:
            return self.index.plan != plan
        if self.latest is not None and self.latest.appended and self.latest.plan == plan:
            return False
        others = {index.plan for index in self.generations.values()} - {plan}
        return self.damaged_index and bool(others or set(self.fingerprints.values()) - set(fingerprints))

    def refuse_another(self, sample: SampleOptions, rule: str, seed: int) -> None:
        """Refuse to replace the published dataset.

        Raises:
            UserError: Always; it names the options that differ, as far as they are known.
        """
        differs = _differences(self.index, sample, rule, seed) if self.index else ["its index.json cannot be read"]
        others = "the source's files, the AOIs, or --fractions, --shard-size or --for-ranks are others"
        raise UserError(
            f"--output {self.uri} holds another dataset ({'; '.join(differs) or others}): give --overwrite to replace "
            "it, or another --output"
        )

    def older(self) -> dict[str, list[str]]:
        """Return this program's keys that the published generation does not need, by folder ("" beside the index).

        In the order in which they may be deleted: what claims the other files comes last.
        """
        assert self.index is not None
        kept = {INDEX_NAME, *keys_of(self.index), f"{generation_of(self.index.plan)}/{INDEX_NAME}"}
        found: dict[str, list[str]] = {}
        for key in sorted(self.ours - kept, key=lambda key: (key.endswith(INDEX_NAME), not _is_shard(key), key)):
            found.setdefault(key.rpartition("/")[0], []).append(key)
        if "" in found:
            # The copy of an index lists the shards of an earlier version, so its folder comes last.
            found = {"": found.pop(""), **found}
        return found


def look(output: Storage) -> Output:
    """List an output, and find out which of its files this program wrote.

    An object is this program's if a valid index lists it, or if a valid sidecar names it and its size. The sidecar of a
    shard in a valid index is this program's, damaged or not.

    Raises:
        UserError: If the store does not answer or cannot be read.
    """
    sizes = {item.key: item.size for item in output.list() if _LOOKED_AT.fullmatch(item.key)}
    text = _read_index(output)
    index = _parse_index(text)
    folders = sorted({key.partition("/")[0] for key in sizes if "/" in key and _GENERATION.match(key)})
    generations = {folder: found for folder in folders if (found := _copy_of_index(output, folder, sizes))}
    if index is not None:
        generations[generation_of(index.plan)] = index
    listed = {key for found in generations.values() for key in keys_of(found)}
    unlisted = sorted(key for key in sizes if _is_shard(key) and key not in listed)
    sidecars = {key.removesuffix(SIDECAR_SUFFIX) for key in sizes if key.endswith(SIDECAR_SUFFIX)}
    described = _described(output, sorted(key for key in sidecars - listed if _is_shard(key)))
    ours = {key for key in sizes if key in listed}
    ours |= {key for key in unlisted if key in described and described[key][1] == sizes[key]}
    ours |= {key + SIDECAR_SUFFIX for key in described}
    known = {*generations, *(key.rpartition("/")[0] for key in described)}
    ours |= {f"{folder}/{INDEX_NAME}" for folder in folders if folder in known} & sizes.keys()
    if text is not None and (index or _is_ours(text, bool(described or generations))):
        ours.add(INDEX_NAME)
    return Output(
        uri=output.uri,
        text=text or b"",
        index=index,
        generations=generations,
        fingerprints={key: fingerprint for key, (fingerprint, _) in described.items()},
        sizes=sizes,
        ours=frozenset(ours),
    )


def check_space(output: Storage, need: int) -> None:
    """Refuse a folder whose disk cannot hold ``need`` more bytes.

    Raises:
        UserError: The disk is too small; the message has both sizes.
    """
    if not isinstance(output, LocalStorage):
        return
    free = shutil.disk_usage(output.uri).free
    if need > free:
        raise UserError(
            f"--output {output.uri} has {free / 1e6:,.0f} MB free, and the shards still to be written need about "
            f"{need / 1e6:,.0f} MB: free some space, or give another --output"
        )


def _is_shard(key: str) -> bool:
    return _SHARD.fullmatch(key.rpartition("/")[2]) is not None and key.count("/") <= 1


def _is_in_the_way(key: str, folder: str) -> bool:
    return any(_IN_THE_WAY.fullmatch(key.removeprefix(start)) for start in {"", f"{folder}/"} if key.startswith(start))


def _read_index(output: Storage, key: str = INDEX_NAME) -> bytes | None:
    try:
        return output.read(key)
    except BucketNotFoundError:
        raise
    except NotFoundError:
        return None
    except CorruptedError:
        return b""


def _parse_index(text: bytes | None) -> Index | None:
    try:
        return Index.from_json(text) if text is not None else None
    except UserError:
        return None


def _copy_of_index(output: Storage, folder: str, sizes: Mapping[str, int]) -> Index | None:
    """Return the index of an earlier generation if its copy is whole and lists only files that may be its own."""
    key = f"{folder}/{INDEX_NAME}"
    index = _parse_index(_read_index(output, key)) if key in sizes else None
    if index is None or generation_of(index.plan) != folder:
        return None
    places = {name.rpartition("/")[0] for name in _names(index)} - {"", folder}
    # Shards to which others were added stay in the folders of their own generations.
    sound = len(places) <= len(index.appended) and all(map(_GENERATION.fullmatch, places))
    return index if sound and all(map(_is_shard, _names(index))) else None


def _names(index: Index) -> Iterator[str]:
    return (shard.name for shards in index.splits.values() for shard in shards)


def _is_ours(text: bytes, beside_ours: bool) -> bool:
    """Return True if an unusable index is this program's: with the keys of one, or no JSON and beside our files."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return beside_ours
    return isinstance(data, dict) and {"format_version", "plan", "splits"} <= data.keys()


def _described(output: Storage, keys: Sequence[str]) -> dict[str, Described]:
    """Read the shards' sidecars; return the short content of the valid ones, since a whole sidecar takes megabytes."""

    def read(key: str) -> Described | None:
        folder, _, name = key.rpartition("/")
        found = read_sidecar(output.child(folder) if folder else output, name)
        return (found[0], found[1].entry.bytes if found[1].entry else None) if found else None

    with ThreadPoolExecutor(_PARALLEL) as threads:
        return {key: found for key, found in zip(keys, threads.map(read, keys), strict=True) if found}


def _differences(index: Index, sample: SampleOptions, rule: str, seed: int) -> list[str]:
    """Return the options in which an existing dataset differs from a new one, in words."""
    there, wanted = index.preparation.to_json(), sample.to_json()
    found = [
        f"--{_OPTIONS.get(name, name).replace('_', '-')} is {there[name]} there and {wanted[name]} here"
        for name in wanted
        if there[name] != wanted[name]
    ]
    if index.split_rule != rule:
        found.append(f"the split is {index.split_rule} there and {rule} here")
    elif index.split_seed != seed:
        found.append(f"--seed is {index.split_seed} there and {seed} here")
    return found
