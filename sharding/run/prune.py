"""Removal of a dataset's earlier generations, which the published index does not need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sharding.errors import UserError
from sharding.run.output import Output, look
from sharding.storage import Storage
from sharding.storage.lock import Lock


@dataclass(frozen=True)
class Removed:
    """Files of one generation that were removed."""

    folder: str
    """Folder of the generation; empty for shards beside the index."""

    files: int
    """Number of removed files."""

    bytes: int
    """Their size."""


@dataclass(frozen=True)
class Pruned:
    """Result of `prune`."""

    uri: str
    """URI of the dataset."""

    removed: tuple[Removed, ...]
    """Removed generations."""

    foreign: tuple[str, ...]
    """Keys among the names of a dataset's files that this program did not write, and that stay."""

    aborted: tuple[str, ...]
    """Keys of unfinished uploads of killed commands, whose parts were removed."""

    def lines(self) -> Iterator[str]:
        """Yield the lines of a summary for the user."""
        for item in self.removed:
            what = item.folder or "shards beside index.json"
            yield f"removed {what}: {_files(item.files)}, {item.bytes / 1e6:.1f} MB"
        for key in self.aborted:
            yield f"removed the parts of an unfinished upload of {key}"
        if not self.removed and not self.aborted:
            yield f"nothing to remove: {self.uri} holds only what its index lists"
        for key in self.foreign:
            yield f"left {key!r}, which this program did not write"


def prune(output: Storage) -> Pruned:
    """Remove this program's files that the published index does not need, and what killed uploads left.

    A training that still reads an earlier generation fails at its next read.

    Raises:
        UserError: No dataset is published there, another job is writing to it, or a file cannot be removed.
    """
    _require_dataset(look(output))  # before a lock is written to a wrong place
    with Lock(output, "prune") as lock:
        there = look(output)
        _require_dataset(there)
        aborted = output.abort_uploads(there.claims)
        older = there.older()
        for keys in older.values():
            lock.check()
            for key in keys:
                output.delete(key)
    removed = (Removed(folder, len(keys), sum(there.sizes[key] for key in keys)) for folder, keys in older.items())
    return Pruned(output.uri, tuple(removed), tuple(sorted(there.sizes.keys() - there.ours)), aborted)


def unneeded(output: Storage) -> str:
    """Return a line about the files that `prune` would remove; empty without such files."""
    there = look(output)
    keys = [key for keys in there.older().values() for key in keys] if there.index is not None else []
    size = sum(there.sizes[key] for key in keys)
    if not keys:
        return ""
    return (
        f"{_files(len(keys))} of earlier datasets ({size / 1e6:.1f} MB) kept for runs that read them: remove them with "
        f"`satfusion prune {output.uri}`"
    )


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _require_dataset(there: Output) -> None:
    if there.index is None:
        raise UserError(
            f"{there.uri} holds no dataset with a valid index.json, so nothing was removed: run `satfusion shard` first"
        )
