"""Phases of a training on one rank: what it is doing, for the watchdog, and how long it took, for the account."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Literal

from pipeline.data.mix import Retries

Phase = Literal["start", "first step", "data", "step", "validation", "checkpoint", "store", "end"]
"""``checkpoint`` copies the state, ``store`` waits until an earlier checkpoint is stored. ``start`` and ``first step``
may compile."""


class Phases:
    """Current phase of a rank. The training thread writes it; other threads may read `now` and `signs`."""

    def __init__(self) -> None:
        """Begin with the phase ``start``."""
        self.now: tuple[Phase, int] = ("start", 0)
        """Current phase, and the step in progress or done last."""
        self.seconds: defaultdict[Phase, float] = defaultdict(float)
        """Seconds spent in each phase before the current one."""
        self.entered: Counter[Phase] = Counter()
        """Number of times that each phase ended."""
        self._since = time.perf_counter()
        self._signs = 0
        self._retries: list[Retries] = []

    def enter(self, phase: Phase, step: int) -> None:
        """End the current phase and begin another, or another time the same."""
        now = time.perf_counter()
        self.seconds[self.now[0]] += now - self._since
        self.entered[self.now[0]] += 1
        self._since = now
        self.now = (phase, step)
        self.progressed()

    def progressed(self) -> None:
        """Show a sign of life within a phase: a part of it is done."""
        self._signs += 1

    def count_retries(self, *retries: Retries) -> None:
        """Take retries of a store for signs of life too: who waits for a store that is away does not hang."""
        self._retries.extend(retries)

    def spent(self) -> dict[Phase, float]:
        """Return the seconds spent in each phase, with those of the current one."""
        now = self.now[0]
        return {**self.seconds, now: self.seconds[now] + time.perf_counter() - self._since}

    @property
    def signs(self) -> int:
        """Return the number of signs of life so far."""
        return self._signs + sum(counter.total for counter in self._retries)

    @property
    def step_seconds(self) -> float:
        """Return the mean time of a step, seconds; 0 before the second one."""
        taken = self.entered["step"]
        return self.seconds["step"] / taken if taken else 0.0
