"""Samples' bytes, checked: from the node's disk cache, or else from the store."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pipeline.data.disk_cache import DiskCache
from sharding.format.index import SampleEntry, ShardEntry
from sharding.format.sample import DamagedError, check_span
from sharding.storage import BucketNotFoundError, CorruptedError, Fill, NotFoundError, Storage

logger = logging.getLogger(__name__)

ReadSample = Callable[[SampleEntry, memoryview], None]
"""Fills memory that is as long as a sample with its bytes, checked."""


class Spans:
    """Reads the spans of a dataset's samples. Every read is compared with the index's CRC-32. Safe in threads."""

    def __init__(self, storage: Storage, disk: DiskCache | None) -> None:
        """Read from ``disk`` what it holds, all else from ``storage``, and then keep it in ``disk``."""
        self._storage = storage
        self._disk = disk
        self._lock = threading.Lock()
        self.refetched = 0
        """How often a span was read once more, because the disk cache's or the store's bytes were damaged."""

    @property
    def request_bytes(self) -> int:
        """Bytes of neighbours that are worth one request; 0 where each sample is read by itself.

        As with a disk cache, where the ranks of a node share the reading sample by sample.
        """
        return 0 if self._disk else self._storage.request_bytes

    def read(self, shard: ShardEntry, entry: SampleEntry, span: memoryview) -> None:
        """Fill ``span``, which is as long as the sample, with its bytes.

        Raises:
            DamagedError: They are damaged in the store, read twice, or gone; it names shard, sample and AOI.
            StorageUnavailableError: The store does not answer.
        """
        if self._disk is None:
            self._fetch(shard, entry, span)
            return
        name = f"{shard.sha256[:32]}-{entry.offset}"
        if self._cached(self._disk, name, entry, span):
            return
        with self._disk.lock(name):
            # Another rank of the node may have fetched it meanwhile.
            if not self._cached(self._disk, name, entry, span):
                self._fetch(shard, entry, span)
                self._disk.put(name, span)

    @contextlib.contextmanager
    def together(self, shard: ShardEntry, entries: Sequence[SampleEntry]) -> Iterator[ReadSample]:
        """Give what reads samples that lie one after the other, in their order: by one request where that is worth it.

        Each comes straight to where it is wanted, while those after it are still on their way. It raises what `read`
        does, and what comes damaged is read by itself as there.
        """
        if len(entries) < 2 or not self.request_bytes:
            yield partial(self.read, shard)
            return
        with self._storage.reading(shard.name, entries[0].offset, sum(entry.size for entry in entries)) as more:
            yield partial(self._fetch, shard, first=more)

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

    def _fetch(self, shard: ShardEntry, entry: SampleEntry, span: memoryview, first: Fill | None = None) -> None:
        """Read from the store: by ``first``, then twice by itself."""

        def alone(span: memoryview) -> int:
            return self._storage.read_into(shard.name, entry.offset, span)

        fills = [first, alone, alone] if first else [alone, alone]
        while fills:
            fill = fills.pop(0)
            try:
                check_span(entry, span[: fill(span)])
                return
            except BucketNotFoundError:  # nothing of the dataset is there: no damage of this sample
                raise
            except (DamagedError, CorruptedError, NotFoundError) as error:
                named = DamagedError(f"{self._storage.uri}/{shard.name}: {error}")
                if not fills or isinstance(error, NotFoundError):
                    raise named from error
                self._note(str(named))

    def _note(self, why: str) -> None:
        with self._lock:
            self.refetched += 1
        logger.info("read again: %s", why)
