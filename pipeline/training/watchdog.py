"""Watchdog of a rank: ends the process, with the stacks of its threads in the log, if the group makes no progress.

Each rank sends a beat to others every few seconds, through the store of the process group and not by a collective: its
phase, its step, and for how long it has made no progress. A group hangs if no rank makes progress for as long as its
phase allows, or if a rank is silent: stopped, or cut off. The rank that finds it tells the others, so that the log has
the stacks of every rank that still can write them. Torchrun or Ray then starts the group again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from pipeline.config import TrainConfig
from pipeline.reporting.phases import Phase, Phases
from pipeline.signals import HUNG_STATUS
from pipeline.world import Channel, World

logger = logging.getLogger(__name__)

LONGEST_BEAT_S = 2.0
"""Longest time between two beats, seconds; with short limits a tenth of `TrainConfig.hang_seconds`."""
MANY_STEPS = 10
"""A step that takes this many times the mean is a hang, if `TrainConfig.hang_seconds` is less: chips may be large."""
PATIENT: frozenset[Phase] = frozenset({"start", "first step", "store"})
"""Phases in which a rank may be without progress for `TrainConfig.hang_start_seconds`."""
FOUND = "hang"
"""Name of the message of the rank that found a hang."""
GRACE_BEATS = 3
"""Beats that a rank waits for the store, and those that the others get to write their stacks."""
WATCHED = 8
"""Ranks whose beats each rank reads, those after it: in a group that hangs, no rank makes progress."""
SLACK_S = 10.0
"""Time beyond a limit after which the process ends without the interpreter, which a thread then does not let go."""
STDERR = 2


@dataclass(frozen=True)
class Beat:
    """State of a rank as it tells the others."""

    number: int
    """Number of the beat."""
    phase: Phase
    """Phase of its training thread."""
    step: int
    """Step in progress or done last."""
    idle: float
    """Time without progress, seconds."""
    limit: float
    """Time that it may be without progress in this phase, seconds."""
    place: str
    """Host and process."""


@dataclass
class Peer:
    """Another rank as this one sees it."""

    beat: Beat
    """Its last beat."""
    silent: float = 0.0
    """Time since that arrived, seconds of this process."""

    @property
    def idle(self) -> float:
        """Return its time without progress, seconds."""
        return self.beat.idle + self.silent

    def __str__(self) -> str:
        quiet = f", silent for {self.silent:.1f} s" if self.silent else ""
        place, step, phase = self.beat.place, self.beat.step, self.beat.phase
        return f"({place}) at step {step} in phase {phase!r} without progress for {self.idle:.1f} s{quiet}"


def verdict(own: Beat, peers: Mapping[int, Peer], hang_seconds: float) -> bool:
    """Return True if the group hangs: all ranks are without progress beyond every limit, or one is silent.

    Args:
        own: This rank.
        peers: Other ranks that have sent a beat and have not ended.
        hang_seconds: Longest time between two beats.
    """
    limit = max([own.limit, *(peer.beat.limit for peer in peers.values())])
    idle = min([own.idle, *(peer.idle for peer in peers.values())])
    # A rank alone may be silent because it has ended after an error, which the others then meet in a collective.
    silent = own.idle > hang_seconds and any(peer.silent > hang_seconds for peer in peers.values())
    return idle > limit or silent


def report(rank: int, own: Beat, peers: Mapping[int, Peer]) -> str:
    """Return what is known of each rank, in one line; those that are silent or without progress for longest first."""
    ranks = {rank: Peer(own), **peers}
    longest = sorted(ranks, key=lambda number: (-ranks[number].silent, -ranks[number].idle))
    return "; ".join(f"rank {number} {ranks[number]}" for number in longest)


class Watchdog:
    """Watchdog of this rank within a ``with`` block; all ranks run one."""

    def __init__(self, phases: Phases, world: World, channel: Channel, config: TrainConfig) -> None:
        """Prepare to watch.

        Args:
            phases: Phases of this rank.
            world: This process's place.
            channel: Messages between the ranks.
            config: Limits; ``hang_seconds`` 0 watches nothing.
        """
        self._phases, self._world, self._channel, self._config = phases, world, channel, config
        self._beat_seconds = min(LONGEST_BEAT_S, config.hang_seconds / 10)
        self._place = f"{socket.gethostname()}, pid {os.getpid()}"
        self._peers: dict[int, Peer] = {}
        self._own = self._look(0, 0.0)
        self._found: str | None = None
        """Message of another rank that found a hang."""
        self._stop, self._hangs, self._heard, self._told = (threading.Event() for _ in range(4))
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("watchdog", self._watch), ("watchdog-beats", self._exchange))
        ]

    def __enter__(self) -> Self:
        """Start watching."""
        if self._config.hang_seconds:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching. A thread that waits for the store is left to itself."""
        self._stop.set()
        if self._threads[0].is_alive():
            self._threads[0].join()
            self._threads[1].join(self._beat_seconds)
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """Count the time without progress; no call of this thread waits for another process.

        Time is counted in short pieces, so that a process which was stopped itself does not count that time.
        """
        idle, signs, number, before = 0.0, -1, 0, time.monotonic()
        while not self._stop.wait(self._beat_seconds):
            number += 1
            now = time.monotonic()
            piece, before = min(now - before, 2 * self._beat_seconds), now
            seen = self._phases.signs
            idle, signs = (0.0 if seen != signs else idle + piece), seen
            self._own = self._look(number, idle)
            for peer in list(self._peers.values()):
                peer.silent += piece
            if self._found is not None or verdict(self._own, dict(self._peers), self._config.hang_seconds):
                self._end()
            # Its timer counts time in which the process was stopped, after which a single process goes on.
            alone = self._world.size == 1
            faulthandler.dump_traceback_later(self._own.limit + SLACK_S, exit=not alone, file=STDERR)

    def _look(self, number: int, idle: float) -> Beat:
        phase, step = self._phases.now
        limit = max(self._config.hang_seconds, MANY_STEPS * self._phases.step_seconds)
        if phase in PATIENT:
            limit = max(limit, self._config.hang_start_seconds)
        return Beat(number, phase, step, idle, limit, self._place)

    def _end(self) -> None:
        """Write what is known and the stacks, and end the process at once: its threads may wait for ever."""
        rank = self._world.rank
        if self._found is not None:
            logger.error("rank %d ends too, with status %d, because %s", rank, HUNG_STATUS, self._found)
        else:
            self._hangs.set()
            self._heard.wait(GRACE_BEATS * self._beat_seconds)
            known = report(rank, self._own, dict(self._peers))
            limit = f"train.hang_seconds = {self._config.hang_seconds:g}"
            logger.error("the training hangs (%s), so rank %d ends with status %d: %s", limit, rank, HUNG_STATUS, known)
        faulthandler.dump_traceback(STDERR, all_threads=True)
        if self._found is None:
            self._told.wait(2 * GRACE_BEATS * self._beat_seconds)
        os._exit(HUNG_STATUS)

    def _exchange(self) -> None:
        """Send this rank's beats and read those of the others, until the store is gone or the group hangs."""
        world = self._world
        others = [(world.rank + distance) % world.size for distance in range(1, world.size)]
        warned = False
        while not self._stop.wait(self._beat_seconds):
            try:
                if self._hangs.is_set():
                    self._tell(others)
                    return
                self._channel.put(f"beat/{world.rank}", msgspec.json.encode(self._own).decode())
                for rank in others[:WATCHED]:
                    self._hear(rank)
                self._found = self._channel.get(FOUND)
            except RuntimeError as error:  # for a moment, or with the process that serves the store
                if not warned and not self._stop.is_set():
                    logger.warning("rank %d cannot reach the store of the process group: %s", world.rank, error)
                warned = True
                self._peers.clear()  # No rank is judged by what cannot be heard.
        with contextlib.suppress(RuntimeError):
            self._channel.put(f"beat/{world.rank}", "ended")

    def _tell(self, others: Sequence[int]) -> None:
        """Hear all ranks once more, then tell them of the hang and give them time to write their stacks."""
        for rank in others:
            self._hear(rank)
        self._heard.set()
        self._channel.put(FOUND, f"rank {self._world.rank} found that the training hangs")
        self._stop.wait(GRACE_BEATS * self._beat_seconds)
        self._told.set()

    def _hear(self, rank: int) -> None:
        """Read the last beat of a rank; a rank that ended its training is forgotten."""
        text = self._channel.get(f"beat/{rank}")
        if text == "ended":
            self._peers.pop(rank, None)
        elif text is not None:
            beat = msgspec.json.decode(text, type=Beat)
            if rank not in self._peers or self._peers[rank].beat.number != beat.number:
                self._peers[rank] = Peer(beat)
