"""Samples' bytes, compared with the index: from the node's disk cache, or else from the store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from functools import partial

from pipeline.data.disk_cache import DiskCache
from sharding.format.index import SampleEntry, ShardEntry
from sharding.format.sample import check_sample
from sharding.storage import BucketNotFoundError, CorruptedError, Fill, NotFoundError, Storage

logger = logging.getLogger(__name__)


class SampleReader:
    """Reads the samples of a dataset. Every read is compared with the index's CRC-32. Safe in threads.

    Its `Fill`s are of one sample each: they fill a buffer of the sample's length, or raise.
    """

    def __init__(self, storage: Storage, disk: DiskCache | None) -> None:
        """Read from ``disk`` what it has, all else from ``storage``, and then store it in ``disk``."""
        self._storage = storage
        self._disk = disk
        self._lock = threading.Lock()
        self.refetched = 0
        """Samples that were read a second time, because the disk cache's or the store's bytes were damaged."""

    @property
    def request_bytes(self) -> int:
        """Bytes of neighbours that are worth one request; 0 where each sample is read by itself.

        As with a disk cache, where the ranks of a node share the reading sample by sample.
        """
        return 0 if self._disk else self._storage.request_bytes

    def read(self, shard: ShardEntry, entry: SampleEntry, buffer: memoryview) -> int:
        """Fill ``buffer``, which is as long as the sample, with its bytes; return how many these are.

        Raises:
            CorruptedError: They are damaged in the store, read twice, or gone; it names shard, sample and AOI.
            StorageUnavailableError: The store does not answer.
        """
        if self._disk is None:
            return self._fetch(shard, entry, buffer)
        name = f"{shard.sha256[:32]}-{entry.offset}"
        if self._read_cached(self._disk, name, entry, buffer):
            return len(buffer)
        with self._disk.lock(name):
            # Another rank of the node may have fetched it meanwhile.
            if not self._read_cached(self._disk, name, entry, buffer):
                self._fetch(shard, entry, buffer)
                self._disk.put(name, buffer)
        return len(buffer)

    def fills(self, shard: ShardEntry, entries: Sequence[SampleEntry]) -> Iterator[Fill]:
        """Yield the `Fill` of each of the samples, which lie one after the other; call it before the next is taken.

        They share one request where that is worth it: a sample then arrives in its buffer while those after it are
        still on their way. Each raises like `read`; a damaged sample is read again with a request of its own.
        """
        if len(entries) < 2 or not self.request_bytes:
            for entry in entries:
                yield partial(self.read, shard, entry)
            return
        length = sum(entry.size for entry in entries)
        with self._storage.open_range(shard.name, entries[0].offset, length) as shared:
            for entry in entries:
                yield partial(self._fetch, shard, entry, shared=shared)

    def _read_cached(self, disk: DiskCache, name: str, entry: SampleEntry, buffer: memoryview) -> bool:
        if not disk.get(name, buffer):
            return False
        try:
            check_sample(entry, buffer)
        except CorruptedError as error:
            disk.drop(name)
            self._count_damage(f"the disk cache's copy of {error}")
            return False
        return True

    def _fetch(self, shard: ShardEntry, entry: SampleEntry, buffer: memoryview, shared: Fill | None = None) -> int:
        """Read from the store and check: from the ``shared`` request, then twice with a request of its own."""
        own: Fill = partial(self._storage.read_into, shard.name, entry.offset)
        fills = [shared, own, own] if shared else [own, own]
        while True:
            fill = fills.pop(0)
            try:
                check_sample(entry, buffer[: fill(buffer)])
                return len(buffer)
            except BucketNotFoundError:  # nothing of the dataset is there: no damage of this sample
                raise
            except (CorruptedError, NotFoundError) as error:
                named = CorruptedError(f"{self._storage.uri}/{shard.name}: {error}")
                if not fills or isinstance(error, NotFoundError):
                    raise named from error
                self._count_damage(str(named))

    def _count_damage(self, damage: str) -> None:
        with self._lock:
            self.refetched += 1
        logger.info("read again: %s", damage)
