"""Account of a run's time over all its starts: how much was spent in steps that count, and what the rest went to.

Rank 0 keeps it in ``time.json`` of the run folder. A process that resumes adds what its predecessors spent, takes the
time of steps after the checkpoint off those that count, and adds the time since their last record as ``restarts``.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pipeline.reporting.phases import Phase
from pipeline.reporting.run_folder import TEMPORARY_SUFFIX, RunFolder
from pipeline.world import World
from sharding.schema import Natural, Positive, decode
from sharding.storage import NotFoundError, Storage

logger = logging.getLogger(__name__)

TIME_FILE = "time.json"
RECORD_EVERY_S = 15.0
"""Seconds between two records: the time of steps after the last one counts as ``restarts`` if the process is killed."""
Use = Literal["steps", "lost steps", "data", "validation", "checkpoints", "start", "restarts", "end"]
USES: Mapping[Phase, Use] = {
    "step": "steps",
    "data": "data",
    "validation": "validation",
    "checkpoint": "checkpoints",
    "store": "checkpoints",
    "start": "start",
    "first step": "start",
    "end": "end",
}
"""Use of the time of each phase (`pipeline.reporting.phases`)."""


class TimeRecord(msgspec.Struct, frozen=True):
    """Time of a run, as its file holds it."""

    format_version: Literal[1]
    starts: Positive
    """Number of processes that began or resumed the training one after the other, as rank 0 logs it."""
    step: Natural
    """Last optimizer step."""
    counted: Natural
    """Steps that count."""
    recorded: Annotated[float, Meta(ge=0, le=1e11)]
    """Time of the record, seconds since 1970."""
    complete: bool
    """Whether the run had reached its last step: what passes until it is extended is no loss."""
    seconds: dict[Use, Annotated[float, Meta(ge=0, le=1e11)]]
    """Seconds by use."""


def read_record(runs: Storage) -> TimeRecord | None:
    """Return the record of a run folder; None if there is none, or none that can be read, which is logged."""
    try:
        return decode(runs.read(TIME_FILE), TimeRecord)
    except NotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s/%s is not a record of a run's time (%s): counted from now on", runs.uri, TIME_FILE, error)
        return None


def shared_record(runs: Storage, world: World) -> TimeRecord | None:
    """Return on every rank what `read_record` returns on rank 0; all ranks call it together."""
    return world.gather_objects(read_record(runs) if world.is_main else None)[0]


class TimeAccount:
    """Account of one rank: what earlier processes spent, and the phases of this one."""

    def __init__(self, phases: Callable[[], Mapping[Phase, float]], before: TimeRecord | None, step: int) -> None:
        """Begin, or continue.

        Args:
            phases: Function that returns the seconds of this process by phase.
            before: Record of the processes before, the same on every rank.
            step: Step at which this process resumes.
        """
        self._phases = phases
        self._starts, self._counted, self._step = 1, 0, step
        self._earlier: defaultdict[Use, float] = defaultdict(float)
        self._resumed = before is not None and not before.complete
        self._recorded = time.monotonic()
        self.lost = 0
        """Steps that this process takes again."""
        if before is None:
            return
        self._starts = before.starts + 1
        self._earlier.update(before.seconds)
        self.lost = max(0, min(before.step - step, before.counted))
        if self.lost:
            each = self._earlier["steps"] / before.counted
            self._earlier["steps"] -= self.lost * each
            self._earlier["lost steps"] += self.lost * each
        self._counted = before.counted - self.lost
        if self._resumed:
            self._earlier["restarts"] += max(0.0, time.time() - before.recorded)

    def count(self, step: int) -> None:
        """Count a step that ended."""
        self._step, self._counted = step, self._counted + 1

    def seconds(self) -> dict[Use, float]:
        """Return the seconds of the whole run by use."""
        total = self._earlier.copy()
        for phase, spent in self._phases().items():
            use = USES[phase]
            total["restarts" if use == "start" and self._resumed else use] += spent
        return total

    @property
    def effective(self) -> float:
        """Return the effective training time: the share of time in steps that count, from 0 to 1."""
        seconds = self.seconds()
        return seconds.get("steps", 0.0) / max(sum(seconds.values()), 1e-9)

    def begin(self, run: RunFolder) -> None:
        """Write the first record of this process to the store: one that is killed in its first seconds counts too.

        The run's ``config.json`` is there already: a folder with this file alone would be taken for another program's.
        """
        self.record(run, due=True)
        run.sync(everything=False)

    def record(self, run: RunFolder, *, due: bool = False, complete: bool = False) -> None:
        """Write the record to the run folder, at most every `RECORD_EVERY_S` seconds unless it is due."""
        if not due and time.monotonic() - self._recorded < RECORD_EVERY_S:
            return
        self._recorded = time.monotonic()
        record = TimeRecord(1, self._starts, self._step, self._counted, time.time(), complete, dict(self.seconds()))
        path = run.local / TIME_FILE
        beside = path.with_suffix(TEMPORARY_SUFFIX)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
            os.replace(beside, path)
        except OSError as error:  # a full disk must not end the training
            logger.warning("the account of time was not written: %s", error)

    def summary(self) -> str:
        """Return the account in one line."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        largest = sorted(seconds.items(), key=lambda item: -item[1])
        rest = ", ".join(f"{use} {100 * spent / total:.1f} %" for use, spent in largest if use != "steps")
        return (
            f"effective training time {100 * self.effective:.1f} % of {total:.0f} s in {self._starts} starts; the rest:"
            f" {rest}"
        )
