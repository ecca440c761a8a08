"""Cache of a dataset's scenes in memory: each scene is read once, and kept until it is evicted."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pipeline.data.chips import Memory
from pipeline.data.sample_reader import SampleReader
from pipeline.data.scene_layout import Scene, SceneLayout
from sharding.format.entries import SampleEntry, ShardEntry
from sharding.storage import CorruptedError, Fill, StorageUnavailableError

logger = logging.getLogger(__name__)

# Number of scenes whose memory is allocated at once: from 4 MiB up numpy asks for huge pages, which need a hundredth of
# the page faults.
BLOCK = 16


@dataclass
class _CachedScene:
    """A scene that is cached or being read."""

    memory: Memory | None = None
    users: int = 0
    """Threads that use it; its memory may be given to another scene only when this is 0."""
    ready: threading.Event = field(default_factory=threading.Event)
    scene: Scene | None = None
    error: BaseException | None = None


class SceneCache:
    """Scenes by key, in memory that is allocated once and reused; the least recently used is evicted.

    Thread-safe: threads that need the same scene share one read. A sample that is damaged in the store raises an error
    in each thread that uses it, or is quarantined: logged once, and yielded as None from then on.
    """

    def __init__(
        self, reader: SampleReader, layout: SceneLayout, limit_bytes: int, threads: int, *, quarantine: bool
    ) -> None:
        """Create an empty cache.

        Args:
            reader: Reader of the samples.
            layout: Layout of a scene in memory.
            limit_bytes: Memory limit; raised where needed so that the scenes in use by ``threads`` fit.
            threads: Upper bound of the threads that use scenes at once.
            quarantine: True quarantines a damaged sample instead of raising.
        """
        self.reader = reader
        self._layout = layout
        # Each thread may use one scene and read another.
        self.capacity = max(limit_bytes // max(1, layout.scene_bytes), 2 * threads)
        """Number of scenes that fit."""
        self._quarantine = quarantine
        self._changed = threading.Condition()
        self._cached: OrderedDict[str, _CachedScene] = OrderedDict()
        """Scenes by the key of their sample, the least recently used first."""
        self._free: list[Memory] = []
        self._allocated = 0
        self._timed_out = False
        self.quarantined: dict[str, str] = {}
        """Error message by the key of a sample that is damaged in the store."""

    def prefetch(self, shard: ShardEntry, entries: Iterable[SampleEntry]) -> None:
        """Prefetch scenes of a shard, with one request where they are contiguous.

        A scene that fails is read again by the thread that uses it, which gets the error. After a timeout, prefetching
        stops until one on-demand read succeeds: a thread that needs a scene now must not wait behind many that are
        needed later.
        """
        remaining = deque(entries)
        while not self._timed_out and (claimed := self._claim(remaining)):
            timeout: StorageUnavailableError | None = None
            fills = self.reader.fills(shard, [entry for entry, _ in claimed])
            # Memory is allocated for one scene at a time, so that no thread holds some memory while it waits for more;
            # the store may be slow.
            for fill, (entry, cached) in zip(fills, claimed, strict=True):
                if timeout:
                    self._fail(cached, entry, timeout)
                else:
                    self._read(cached, entry, fill)
                self._release(cached)
                if isinstance(cached.error, StorageUnavailableError):
                    timeout, self._timed_out = cached.error, True
                elif cached.error is not None:
                    logger.info("not prefetched: %s", cached.error)

    def _claim(self, entries: deque[SampleEntry]) -> list[tuple[SampleEntry, _CachedScene]]:
        """Take the next scenes that are neighbours, and neither cached nor being read, off ``entries``."""
        claimed: list[tuple[SampleEntry, _CachedScene]] = []
        with self._changed:
            while entries:
                entry = entries[0]
                if claimed and entry.offset != claimed[-1][0].offset + claimed[-1][0].size:
                    break
                entries.popleft()
                if entry.key not in self._cached and entry.key not in self.quarantined:
                    cached = self._cached[entry.key] = _CachedScene(users=1)
                    claimed.append((entry, cached))
        return claimed

    @contextlib.contextmanager
    def use(self, shard: ShardEntry, entry: SampleEntry) -> Iterator[Scene | None]:
        """Yield a scene, read if it is not cached; None if it is quarantined.

        Raises:
            UserError: The store does not answer, or the sample is damaged and quarantine is off.
        """
        cached = self._acquire(shard, entry)
        try:
            if cached.error is not None:
                raise cached.error
            yield cached.scene
        finally:
            self._release(cached)

    def _acquire(self, shard: ShardEntry, entry: SampleEntry) -> _CachedScene:
        with self._changed:
            if entry.key in self.quarantined:
                return _CachedScene(users=1)
            cached = self._cached.get(entry.key)
            if cached is not None:
                cached.users += 1
                self._cached.move_to_end(entry.key)
            else:
                own = self._cached[entry.key] = _CachedScene(users=1)
        if cached is None:
            self._read(own, entry, partial(self.reader.read, shard, entry))
            return own
        cached.ready.wait()
        return cached

    def _release(self, cached: _CachedScene) -> None:
        with self._changed:
            cached.users -= 1
            if cached.users == 0:
                if cached.scene is None and cached.memory is not None:
                    self._free.append(cached.memory)
                self._changed.notify()

    def _take_memory(self) -> Memory:
        """Return memory that is free or new, or evict the least recently used scene and return its memory."""
        while True:
            if self._free:
                return self._free.pop()
            if self._allocated < self.capacity:
                block = np.empty((min(BLOCK, self.capacity - self._allocated), self._layout.scene_bytes), np.uint8)
                self._allocated += len(block)
                self._free.extend(block)
                continue
            for key, cached in self._cached.items():
                if cached.users == 0 and cached.memory is not None:
                    del self._cached[key]
                    return cached.memory
            self._changed.wait()

    def _read(self, cached: _CachedScene, entry: SampleEntry, fill: Fill) -> None:
        try:
            with self._changed:
                memory = cached.memory = self._take_memory()
            cached.scene = self._layout.read(entry, memory, fill)
            self._timed_out = False
            cached.ready.set()
        except BaseException as error:
            self._fail(cached, entry, error)

    def _fail(self, cached: _CachedScene, entry: SampleEntry, error: BaseException) -> None:
        with self._changed:
            del self._cached[entry.key]
            if self._quarantine and isinstance(error, CorruptedError):
                self.quarantined[entry.key] = str(error)
                logger.warning("quarantined, its chips do not count: %s", error)
            else:
                cached.error = error
        cached.ready.set()
