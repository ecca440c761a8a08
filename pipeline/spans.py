"""Samples' bytes, checked: from the node's disk cache, or else from the store."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pipeline.diskcache import DiskCache
from sharding.schema import DamagedError, SampleEntry, ShardEntry, check_span
from sharding.storage import BucketNotFoundError, CorruptedError, NotFoundError, Storage

logger = logging.getLogger(__name__)

Read = Callable[[SampleEntry, memoryview], None]
"""Fills memory that is as long as a sample with its bytes, checked."""

Fetch = Callable[[int, memoryview], int]
"""Fills memory with a shard's bytes from an offset on, and returns how many came."""


class Spans:
    """Reads the spans of a dataset's samples. Every read is compared with the index's CRC-32. Safe in threads."""

    def __init__(self, storage: Storage, disk: DiskCache | None) -> None:
        """Read from ``disk`` what it holds, all else from ``storage``, and then keep it in ``disk``."""
        self._storage = storage
        self._disk = disk
        self._lock = threading.Lock()
        self.refetched = 0
        """Spans that were read once more, because the disk cache's or the store's bytes were damaged."""

    @property
    def request_bytes(self) -> int:
        """Bytes of neighbours that are worth one request; 0 where each sample is read by itself."""
        return self._storage.request_bytes

    def read(self, shard: ShardEntry, entry: SampleEntry, span: memoryview, first: Fetch | None = None) -> None:
        """Fill ``span``, which is as long as the sample, with its bytes.

        Args:
            shard: Where the sample is.
            entry: The sample.
            span: Where it goes.
            first: How the store is read for the first time; by a request for this sample where it is not given.

        Raises:
            DamagedError: They are damaged in the store, read twice by themselves, or gone; it names shard, sample and
                AOI.
            StorageUnavailableError: The store does not answer.
        """
        if self._disk is None:
            self._fetch(shard, entry, span, first)
            return
        name = _name(shard, entry)
        if self._cached(self._disk, name, entry, span):
            return
        with self._disk.lock(name):
            # Another rank of the node may have fetched it meanwhile.
            if not self._cached(self._disk, name, entry, span):
                self._fetch(shard, entry, span, first)
                self._disk.put(name, span)

    @contextlib.contextmanager
    def together(self, shard: ShardEntry, entries: Sequence[SampleEntry]) -> Iterator[Read]:
        """Give what reads samples that lie one after the other, in their order, as `read` does.

        What has to come from the store comes by one request, where that is worth it, straight to where it is wanted,
        while those after it are still on their way.
        """
        if len(entries) < 2 or not self.request_bytes:
            yield partial(self.read, shard)
            return
        with contextlib.closing(_Stretch(self._storage, shard, entries, self._held)) as stretch:
            yield partial(self.read, shard, first=stretch.read)

    def _held(self, shard: ShardEntry, entry: SampleEntry) -> bool:
        return self._disk is not None and self._disk.holds(_name(shard, entry))

    def _cached(self, disk: DiskCache, name: str, entry: SampleEntry, span: memoryview) -> bool:
        if not disk.get(name, span):
            return False
        try:
            check_span(entry, span)
        except DamagedError as error:
            disk.drop(name)
            self._note(f"the disk cache's copy of {error}")
            return False
        return True

    def _fetch(self, shard: ShardEntry, entry: SampleEntry, span: memoryview, first: Fetch | None) -> None:
        alone = partial(self._storage.read_into, shard.name)
        tries: list[Fetch] = [first, alone, alone] if first else [alone, alone]
        while True:
            fetch = tries.pop(0)
            try:
                check_span(entry, span[: fetch(entry.offset, span)])
                return
            except BucketNotFoundError:  # nothing of the dataset is there: no damage of this sample
                raise
            except (DamagedError, CorruptedError, NotFoundError) as error:
                named = DamagedError(f"{self._storage.uri}/{shard.name}: {error}")
                if not tries or isinstance(error, NotFoundError):
                    raise named from error
                self._note(str(named))

    def _note(self, why: str) -> None:
        with self._lock:
            self.refetched += 1
        logger.info("read again: %s", why)


def _name(shard: ShardEntry, entry: SampleEntry) -> str:
    """Return a sample's name in the disk cache."""
    return f"{shard.sha256[:32]}-{entry.offset}"


class _Stretch:
    """Samples one after the other, read in order by one request, up to one that the disk cache holds.

    Another request begins after that, and where the one before ended too early.
    """

    def __init__(
        self,
        storage: Storage,
        shard: ShardEntry,
        entries: Sequence[SampleEntry],
        held: Callable[[ShardEntry, SampleEntry], bool],
    ) -> None:
        self._storage, self._shard, self._entries, self._held = storage, shard, entries, held
        self._request = contextlib.ExitStack()
        self._reached = -1
        self._more: Callable[[memoryview], int]

    def read(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; return how many bytes came."""
        if offset != self._reached:
            self.close()
            behind = (entry for entry in self._entries if entry.offset > offset)
            wanted = itertools.takewhile(lambda entry: not self._held(self._shard, entry), behind)
            length = len(buffer) + sum(entry.size for entry in wanted)
            self._more = self._request.enter_context(self._storage.reading(self._shard.name, offset, length))
            self._reached = offset
        count = self._more(buffer)
        self._reached += count
        return count

    def close(self) -> None:
        """Give up what did not arrive yet."""
        self._request.close()
