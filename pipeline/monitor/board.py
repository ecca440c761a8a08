"""Folder that TensorBoard reads: the curves of each run under the shown tags, images, texts and hyperparameters."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from pipeline.monitor import pages
from pipeline.monitor.curves import Curves
from pipeline.monitor.discover import EVENTS, Found
from pipeline.monitor.facts import Facts, read_facts
from pipeline.monitor.feed import Feed, restarted
from pipeline.monitor.records import as_record
from pipeline.reporting.events import AGGREGATE
from pipeline.reporting.tags import ALERTS, STATISTICS, shown, shown_image
from sharding.errors import UserError
from sharding.names import path_below

TRACE_SUFFIX = ".pt.trace.json.gz"
"""Suffix of the profiles of `pipeline.training.profiling`, which TensorBoard's plugin finds by it."""
_KEPT = ("loss/", "quality", "speed/")
"""Beginnings of the tags whose curves stay in memory, for means over runs and the list of runs."""
_COUNTS = "store/"
"""Beginning of the tags that are held back while they are zero."""
_ALL = STATISTICS[0]
_PAGES = "(layout)"
"""Run of TensorBoard that holds what belongs to no run of ours."""
_MOST_PENDING = 10_000
"""Events of a run that wait to be written together, so that a restart can still drop them."""


class Board:
    """TensorBoard's folder, with one event file in each folder below it."""

    def __init__(self, root: Path) -> None:
        """Write the columns of the page HParams and the operator's layout into a folder of ``root``."""
        self.root = root
        self._name = f"events.out.tfevents.{int(time.time()):010d}.monitor"
        self.write(
            _PAGES, [Event(wall_time=time.time(), summary=page) for page in (pages.experiment(), pages.layout())]
        )

    def write(self, folder: str, events: Sequence[Event]) -> None:
        """Append events to the file of a folder, a run of TensorBoard.

        Raises:
            UserError: The folder's name cannot be one.
            OSError: The disk is full, or the name too long.
        """
        if not events:
            return
        path = self.path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with (path / self._name).open("ab", buffering=0) as file:
            begin = file.tell()
            first = [] if begin else [Event(wall_time=events[0].wall_time, file_version="brain.Event:2")]
            left = memoryview(b"".join(as_record(event) for event in (*first, *events)))
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(begin)  # a part of a record would hide all that follow it
                raise

    def path(self, folder: str) -> Path:
        """Return the path of a folder."""
        return path_below(self.root, folder, "the runs")


class RunOnBoard:
    """A run on the board, updated with its new events."""

    def __init__(self, found: Found, board: Board) -> None:
        """Name a run that `update` will show."""
        self.name = found.name
        self.facts: Facts | None = None
        self.curves = Curves()
        """Curves of one value of all ranks, of the tags that are kept."""
        self.first_changed: int | None = None
        """First step that changed since it was last set to None."""
        self._run = found.storage
        self._board = board
        self._feed = Feed(found.storage.child(AGGREGATE))
        self._zeros: dict[str, Event] = {}
        self._risen: set[str] = set()
        self._pending: defaultdict[str, list[Event]] = defaultdict(list)
        self._facts_due: int | None = 0
        self._folders: set[str] = set()
        self._traces: dict[str, int] = {}

    def update(self) -> int:
        """Show what is new; return the number of new events.

        Raises:
            UserError: The store does not answer.
            OSError: The events cannot be written.
        """
        count = 0
        for event in self._feed.events():
            count += 1
            first_void = restarted(event)
            if first_void is not None:
                self._restart(event, first_void)
            elif event.HasField("summary"):
                self._show(event)
            if count % _MOST_PENDING == 0:
                self._flush()
        self._flush()
        # After the curves, which are shown also while the configuration cannot be read.
        if self._facts_due is not None and (count or self._folders):
            self._show_facts(self._facts_due)
            self._flush()
        if self.facts and self.facts.sections.get("train", {}).get("profile"):
            self._copy_traces()
        return count

    def _restart(self, event: Event, first_void: int) -> None:
        """Drop the steps that the run repeats; its configuration may be another one."""
        self.curves.drop(first_void)
        self._changed(first_void)
        # TensorBoard's fast loader drops a step only when a curve takes it again; what it never saw needs no drop.
        for events in self._pending.values():
            events[:] = [before for before in events if before.step < first_void]
        for folder in self._folders or {self.name}:
            self._pending[folder].append(event)
        self._facts_due = first_void

    def _show_facts(self, step: int) -> None:
        """Show the configuration from a step; it is read again with the next update if it is not there yet."""
        facts = read_facts(self._run)
        if facts is None:
            return
        self._facts_due = None
        if facts == self.facts:
            return
        self.facts = facts
        for summary in (*pages.texts(facts), pages.session(facts, self.name)):
            self._pending[self.name].append(Event(wall_time=time.time(), step=step, summary=summary))

    def _show(self, event: Event) -> None:
        """Show the values of a step."""
        scalars: dict[str, dict[str, float]] = {statistic: {} for statistic in STATISTICS}
        others = []
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                place = shown(value.tag)
                scalars[place.statistic][place.tag] = value.simple_value
            elif kind == "image":
                others.append(Summary.Value(tag=shown_image(value.tag), image=value.image))
            elif kind == "tensor" and value.tag == ALERTS:
                others.append(value)
        self._write(self.name, event, self._held_back(event, scalars[_ALL]), others)
        for tag, number in scalars[_ALL].items():
            if tag.startswith(_KEPT):
                self.curves.add(tag, event.step, event.wall_time, number)
        self._changed(event.step)
        low, high = scalars["min"], scalars["max"]
        # Ranks that agree, or are alone, need no band.
        spread = {tag for tag in low if tag in high and low[tag] < high[tag]}
        for statistic in STATISTICS[1:]:
            band = {tag: number for tag, number in scalars[statistic].items() if tag in spread}
            self._write(f"{self.name}/{statistic}", event, band, [])

    def _held_back(self, event: Event, numbers: dict[str, float]) -> dict[str, float]:
        """Return the values without the counts that never left zero; one that does begins with its last zero."""
        kept = {}
        for tag, number in numbers.items():
            if tag.startswith(_COUNTS) and tag not in self._risen:
                if number == 0:
                    self._zeros[tag] = event
                    continue
                self._risen.add(tag)
                if zero := self._zeros.pop(tag, None):
                    self._write(self.name, zero, {tag: 0.0}, [])
            kept[tag] = number
        return kept

    def _write(self, folder: str, event: Event, numbers: dict[str, float], others: list[Summary.Value]) -> None:
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()] + others
        if values:
            summary = Summary(value=values)
            self._pending[folder].append(Event(wall_time=event.wall_time, step=event.step, summary=summary))

    def _changed(self, step: int) -> None:
        self.first_changed = step if self.first_changed is None else min(self.first_changed, step)

    def _flush(self) -> None:
        while self._pending:
            folder, events = next(iter(self._pending.items()))
            self._board.write(folder, events)
            self._folders.add(folder)
            del self._pending[folder]  # each folder by itself: an error of another one must not write it twice

    def _copy_traces(self) -> None:
        """Copy new profiles, which the ranks write beside their events."""
        events = self._run.child(EVENTS)
        for stored in events.list():
            if stored.key.endswith(TRACE_SUFFIX) and self._traces.get(stored.key) != stored.size:
                try:
                    path = path_below(self._board.path(self.name), stored.key, events.uri)
                except UserError:
                    self._traces[stored.key] = stored.size  # said once
                    raise
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    file.writelines(events.stream(stored.key))
                self._traces[stored.key] = stored.size


def start(step: int) -> Event:
    """Return the event after which TensorBoard drops ``step`` and later ones from what it read before."""
    return Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))
