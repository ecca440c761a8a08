"""The scenes of a dataset in memory: each is read once, and held while there is room."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pipeline.data.byte_ranges import ReadSample, Spans
from pipeline.data.chips import Memory
from pipeline.data.scene_layout import Form, Scene
from sharding.format.index import SampleEntry, ShardEntry
from sharding.format.sample import DamagedError
from sharding.storage import StorageUnavailableError

logger = logging.getLogger(__name__)

# Scenes whose memory is taken at once: from 4 MiB up numpy asks for huge pages, which cost a hundredth of the faults.
BLOCK = 16


@dataclass
class _Slot:
    """A scene that is held, or being read."""

    memory: Memory | None = None
    users: int = 0
    """Threads that need it; only without any may its memory be given to another scene."""
    ready: threading.Event = field(default_factory=threading.Event)
    scene: Scene | None = None
    error: BaseException | None = None


class Scenes:
    """Scenes by their place in a dataset, in memory that is taken once and used again. Safe in threads.

    Threads that want the same scene share one read. What is damaged in the store stops whoever asks for it, or is
    quarantined: remembered, told once, and given as None from then on.
    """

    def __init__(self, spans: Spans, form: Form, limit_bytes: int, threads: int, *, quarantine: bool) -> None:
        """Hold nothing yet.

        Args:
            spans: Reads samples.
            form: What is held of a scene.
            limit_bytes: Bound of the memory; it has room for what ``threads`` work on all the same.
            threads: Most threads that use scenes at once.
            quarantine: Whether damage leaves a scene out, and is no error.
        """
        self.spans = spans
        self._form = form
        # Each thread may use one scene and read another.
        self.capacity = max(limit_bytes // max(1, form.bytes), 2 * threads)
        """Scenes that can be held."""
        self._quarantine = quarantine
        self._changed = threading.Condition()
        self._held: OrderedDict[str, _Slot] = OrderedDict()
        self._free: list[Memory] = []
        self._taken = 0
        self._away = False
        self.quarantined: dict[str, str] = {}
        """By key of a sample that is damaged in the store, what is wrong with it."""

    def load(self, shard: ShardEntry, entries: Iterable[SampleEntry]) -> None:
        """Read scenes of a shard that will be used soon, by one request where they lie one after the other.

        If that fails, whoever uses one then reads it again, and is told. A store that was waited for in vain is not
        asked again until somebody needs a scene and gets it: who needs one now must not wait behind many that are
        needed later.
        """
        rest = deque(entries)
        while not self._away and (claimed := self._claim(rest)):
            away: StorageUnavailableError | None = None
            with self.spans.together(shard, [entry for entry, _ in claimed]) as read:
                # Memory is taken for one at a time, so that nobody waits for memory and keeps some; the store may wait.
                for entry, slot in claimed:
                    if away:
                        self._fail(slot, entry, away)
                    else:
                        self._read(slot, entry, read)
                    self._leave(slot)
                    if isinstance(slot.error, StorageUnavailableError):
                        away, self._away = slot.error, True
                    elif slot.error is not None:
                        logger.info("not read ahead: %s", slot.error)

    def _claim(self, entries: deque[SampleEntry]) -> list[tuple[SampleEntry, _Slot]]:
        """Take the next scenes that nobody holds or reads, and that lie one after the other, off ``entries``."""
        claimed: list[tuple[SampleEntry, _Slot]] = []
        with self._changed:
            while entries:
                entry = entries[0]
                if claimed and entry.offset != claimed[-1][0].offset + claimed[-1][0].size:
                    break
                entries.popleft()
                if entry.key not in self._held and entry.key not in self.quarantined:
                    slot = self._held[entry.key] = _Slot(users=1)
                    claimed.append((entry, slot))
        return claimed

    @contextlib.contextmanager
    def use(self, shard: ShardEntry, entry: SampleEntry) -> Iterator[Scene | None]:
        """Give a scene, read if it is not held; None if it is quarantined.

        Raises:
            UserError: The store does not answer, or the scene is damaged and not to be quarantined.
        """
        slot = self._enter(shard, entry)
        try:
            if slot.error is not None:
                raise slot.error
            yield slot.scene
        finally:
            self._leave(slot)

    def _enter(self, shard: ShardEntry, entry: SampleEntry) -> _Slot:
        with self._changed:
            if entry.key in self.quarantined:
                return _Slot(users=1)
            slot = self._held.get(entry.key)
            if slot is not None:
                slot.users += 1
                self._held.move_to_end(entry.key)
            else:
                mine = self._held[entry.key] = _Slot(users=1)
        if slot is None:
            self._read(mine, entry, partial(self.spans.read, shard))
            return mine
        slot.ready.wait()
        return slot

    def _leave(self, slot: _Slot) -> None:
        with self._changed:
            slot.users -= 1
            if slot.users == 0:
                if slot.scene is None and slot.memory is not None:
                    self._free.append(slot.memory)
                self._changed.notify()

    def _memory(self) -> Memory:
        """Return memory that is free, new, or of the scene that was not used for the longest time."""
        while True:
            if self._free:
                return self._free.pop()
            if self._taken < self.capacity:
                block = np.empty((min(BLOCK, self.capacity - self._taken), self._form.bytes), np.uint8)
                self._taken += len(block)
                self._free.extend(block)
                continue
            for key, slot in self._held.items():
                if slot.users == 0 and slot.memory is not None:
                    del self._held[key]
                    return slot.memory
            self._changed.wait()

    def _read(self, slot: _Slot, entry: SampleEntry, read: ReadSample) -> None:
        try:
            with self._changed:
                memory = slot.memory = self._memory()
            slot.scene = self._form.read(entry, memory, partial(read, entry))
            self._away = False
            slot.ready.set()
        except BaseException as error:
            self._fail(slot, entry, error)

    def _fail(self, slot: _Slot, entry: SampleEntry, error: BaseException) -> None:
        with self._changed:
            del self._held[entry.key]
            if self._quarantine and isinstance(error, DamagedError):
                self.quarantined[entry.key] = str(error)
                logger.warning("quarantined, its chips count nothing: %s", error)
            else:
                slot.error = error
        slot.ready.set()
