"""Inspection of an output of `shard`: only files that this program wrote may be overwritten or deleted."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sharding.errors import UserError
from sharding.format.index import INDEX_NAME, SPLITS, Index
from sharding.prepare.options import SampleOptions
from sharding.run.build import SIDECAR_SUFFIX, read_sidecar
from sharding.storage import BucketNotFoundError, CorruptedError, NotFoundError, Storage

_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.tar")
# Such a name may also be a folder's, with files below it.
_IN_THE_WAY = re.compile(rf"({_SHARD.pattern}({re.escape(SIDECAR_SUFFIX)})?|{re.escape(INDEX_NAME)})(/.*)?", re.DOTALL)
_PARALLEL = 8
"""Sidecars read in parallel."""
_OPTIONS = {"hr_source": "hr"}
"""Names in the index that differ from the command line's."""

Described = tuple[str, int | None]
"""Content of a sidecar: the task's fingerprint, and the shard's size in bytes; None if no AOI could be read."""


@dataclass(frozen=True)
class Output:
    """Contents of the place where a dataset is to be written."""

    uri: str
    """URI of the place."""

    index: Index | None
    """Index of a published dataset; None if it is missing or damaged."""

    damaged_index: bool
    """True if there is a damaged index, or one of another format version."""

    fingerprints: frozenset[str]
    """Fingerprints of the shards that no index lists, from their sidecars."""

    ours: frozenset[str]
    """Keys of files that this program wrote: the index, the shards in it, and those that a sidecar describes."""

    lone: frozenset[str]
    """Shards that neither an index nor a sidecar describes."""

    foreign: frozenset[str]
    """Other existing keys among the names of a dataset's files."""

    def refuse_foreign(self, planned: Collection[str]) -> None:
        """Refuse files that this program did not write.

        Without an index, a lone shard of the plan may come from an interrupted run, and then equals the new one.

        Raises:
            UserError: If there are any; it names the first one.
        """
        may_be_ours = set() if INDEX_NAME in self.ours else set(planned)
        foreign = sorted(self.foreign | (self.lone - may_be_ours))
        if foreign:
            more = f" and {len(foreign) - 1} more files" if len(foreign) > 1 else ""
            raise UserError(
                f"--output {self.uri} holds {foreign[0]!r}{more}, which this program did not write: nothing was "
                "changed; move your files away, or give another --output"
            )

    def holds_another(self, plan: str, fingerprints: Collection[str]) -> bool:
        """Return True if a published dataset exists and does not have this plan and these tasks."""
        if self.index is not None:
            return self.index.plan != plan
        return self.damaged_index and not self.fingerprints <= set(fingerprints)

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


def look(output: Storage) -> Output:
    """Inspect an output before anything is written.

    An object is this program's if a valid index lists it, or if a valid sidecar names it and its size. The sidecar of a
    shard in a valid index is this program's, damaged or not.

    Raises:
        UserError: If the store does not answer or cannot be read.
    """
    # In this order, files that another run publishes meanwhile are never taken for foreign ones.
    sizes = {item.key: item.size for item in output.list() if _IN_THE_WAY.fullmatch(item.key)}
    text = _read_index(output)
    index = _parse_index(text)
    listed = {shard.name for shards in index.splits.values() for shard in shards} if index else set()
    candidates = {key: key.removesuffix(SIDECAR_SUFFIX) for key in sizes if key != INDEX_NAME}
    unlisted = sorted({name for name in candidates.values() if _SHARD.fullmatch(name)} - listed)
    described = _described(output, [name for name in unlisted if name + SIDECAR_SUFFIX in sizes])
    ours = {key for key, name in candidates.items() if name in listed or _accounts(described.get(name), key, sizes)}
    if text is not None and (index or _is_ours(text, described)):
        ours.add(INDEX_NAME)
    lone = {name for name in unlisted if name in sizes and name + SIDECAR_SUFFIX not in sizes}
    return Output(
        uri=output.uri,
        index=index,
        damaged_index=index is None and INDEX_NAME in ours,
        fingerprints=frozenset(fingerprint for fingerprint, _ in described.values()),
        ours=frozenset(ours),
        lone=frozenset(lone),
        foreign=frozenset(sizes.keys() - ours - lone),
    )


def _read_index(output: Storage) -> str | None:
    try:
        return output.read(INDEX_NAME).decode("utf-8", errors="replace")
    except BucketNotFoundError:
        raise
    except NotFoundError:
        return None
    except CorruptedError:
        return ""


def _parse_index(text: str | None) -> Index | None:
    try:
        return Index.from_json(text) if text is not None else None
    except UserError:
        return None


def _is_ours(text: str, described: Mapping[str, Described]) -> bool:
    """Return True if an unusable index is this program's, by its keys or by the sidecars beside it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return bool(described)
    return isinstance(data, dict) and {"format_version", "plan", "splits"} <= data.keys()


def _described(output: Storage, names: Sequence[str]) -> dict[str, Described]:
    """Read the shards' sidecars; return the short content of the valid ones, since a whole sidecar takes megabytes."""

    def read(name: str) -> Described | None:
        found = read_sidecar(output, name)
        return (found[0], found[1].entry.bytes if found[1].entry else None) if found else None

    with ThreadPoolExecutor(_PARALLEL) as threads:
        return {name: found for name, found in zip(names, threads.map(read, names), strict=True) if found}


def _accounts(described: Described | None, key: str, sizes: Mapping[str, int]) -> bool:
    """Return True if a valid sidecar shows that the shard of this key, or the sidecar itself, is this program's."""
    return described is not None and (key.endswith(SIDECAR_SUFFIX) or described[1] == sizes[key])


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
