"""Plan of prefetching: scenes are read before the batches that need them, neighbours in a shard together."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from pipeline.order import Chips


class SceneSource(Protocol):
    """Facts of a dataset that prefetching needs."""

    @property
    def chips_per_scene(self) -> int:
        """Return the number of chips of a scene."""
        ...

    @property
    def scene_capacity(self) -> int:
        """Return the number of scenes that fit in memory."""
        ...

    def neighbourhood(self, scene: int) -> tuple[str, int]:
        """Return the shard and the part of it that one request may read; equal for all scenes of that part."""
        ...

    def prefetch(self, scenes: Sequence[int]) -> None:
        """Read scenes of one neighbourhood into memory, in their order in the shard."""
        ...


class Prefetcher:
    """Prefetches scenes in the order in which batches will need them."""

    def __init__(self, slots: Chips, source: SceneSource, pool: ThreadPoolExecutor, threads: int) -> None:
        """Plan the reads.

        Args:
            slots: [steps, per_rank] chips of the coming batches.
            source: The dataset that reads scenes.
            pool: Thread pool that runs the reads.
            threads: Threads of ``pool``.
        """
        scenes, first = np.unique(slots // source.chips_per_scene, return_index=True)
        order = np.argsort(first)
        self._coming = scenes[order].tolist()
        self._needed_at = (first[order] // max(1, slots.shape[1])).tolist()
        self._places = {scene: place for place, scene in enumerate(self._coming)}
        self._neighbours: dict[tuple[str, int], list[int]] = {}
        for scene in scenes.tolist():
            self._neighbours.setdefault(source.neighbourhood(scene), []).append(scene)
        self._begun: set[int] = set()
        self._source, self._pool = source, pool
        # Prefetched scenes must not evict those in use.
        self._reach = source.scene_capacity // 2
        self._busy = 2 * max(threads, slots.shape[1])
        self._reading: deque[tuple[Future[None], int]] = deque()
        self._used = self._next = 0

    def need(self, batch: int) -> None:
        """Start reads of scenes that ``batch`` is the first to need; call it for each batch before it is prepared."""
        last = self._last()
        while self._next < last and self._needed_at[self._next] <= batch:
            self._begin(last)
        while self._used < len(self._coming) and self._needed_at[self._used] <= batch:
            self._used += 1

    def advance(self) -> None:
        """Start reads for the batches after those in preparation."""
        self._next = max(self._next, self._used)
        while self._reading and self._reading[0][0].done():
            self._reading.popleft()
        last = self._last()
        # A bounded number, because reads that the coming batches need queue behind these.
        while self._next < last and sum(scenes for _, scenes in self._reading) < self._busy:
            self._begin(last)

    def _last(self) -> int:
        return min(len(self._coming), self._used + self._reach)

    def _begin(self, last: int) -> None:
        """Read the next scene, unless its read has begun, with its neighbours that are needed before place ``last``."""
        if self._coming[self._next] not in self._begun:
            together = self._together(self._coming[self._next], last)
            self._begun.update(together)
            self._reading.append((self._pool.submit(self._source.prefetch, together), len(together)))
        self._next += 1

    def _together(self, scene: int, last: int) -> list[int]:
        """Return a scene and its neighbours that are needed before place ``last`` too, in their order in the shard."""
        neighbours = self._neighbours[self._source.neighbourhood(scene)]
        return [other for other in neighbours if self._used <= self._places[other] < last and other not in self._begun]
