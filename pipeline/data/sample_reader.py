"""Samples' bytes, compared with the index: read from the node's disk cache, or else from the store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from functools import partial

from pipeline.data.disk_cache import DiskCache
from pipeline.data.mix import SampleStore
from sharding.format.entries import SampleEntry, ShardEntry
from sharding.format.sample import check_sample
from sharding.storage import BucketNotFoundError, CorruptedError, Fill, NotFoundError

logger = logging.getLogger(__name__)


class SampleReader:
    """Reader of a dataset's samples. Every read is compared with the index's CRC-32. Thread-safe.

    Each of its `Fill`s is for one sample: it fills a buffer of the sample's length, or raises.
    """

    def __init__(self, storage: SampleStore, disk: DiskCache | None) -> None:
        """Read from ``disk`` if it has the sample, else from ``storage``; then store the sample in ``disk``."""
        self._storage = storage
        self._disk = disk
        self._lock = threading.Lock()
        self.refetched = 0
        """Samples that were read a second time, because the bytes of the disk cache or the store were damaged."""

    @property
    def request_bytes(self) -> int:
        """Return the bytes of neighbours that are worth one request; 0 means one request per sample.

        It is 0 with a disk cache, because the ranks of a node share the reads sample by sample.
        """
        return 0 if self._disk else self._storage.request_bytes

    def read(self, shard: ShardEntry, entry: SampleEntry, buffer: memoryview) -> int:
        """Fill ``buffer``, of the sample's length, with its bytes; return how many these are.

        Raises:
            CorruptedError: The bytes are damaged in the store (after two reads), or absent; it names shard, sample and
                AOI.
            StorageUnavailableError: The store does not answer.
        """
        if self._disk is None:
            return self._fetch(shard, entry, buffer)
        name = f"{shard.sha256[:32]}-{entry.offset}"
        if self._read_cached(self._disk, name, entry, buffer):
            return len(buffer)
        with self._disk.lock(name):
            # Another rank of the node may have fetched it in the meantime.
            if not self._read_cached(self._disk, name, entry, buffer):
                self._fetch(shard, entry, buffer)
                self._disk.put(name, buffer)
        return len(buffer)

    def fills(self, shard: ShardEntry, entries: Sequence[SampleEntry]) -> Iterator[Fill]:
        """Yield the `Fill` of each of the samples, which are contiguous; call each before you take the next.

        They share one request if that is worth it: a sample is complete in its buffer while later ones are still being
        transferred. Each raises like `read`; a damaged sample is read again with a request of its own.
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
            except BucketNotFoundError:  # the whole dataset is absent: this is no damage of the sample
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
