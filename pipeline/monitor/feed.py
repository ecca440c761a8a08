"""Events of one folder of a run, read from where the last reading ended."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator

from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from pipeline.monitor.records import DamagedRecordsError, RecordReader
from sharding.storage import NotFoundError, Storage

logger = logging.getLogger(__name__)

_PIECE = 8 << 20
"""Bytes of an event file that are read at once."""
_MARK = "tfevents"


class Feed:
    """New events of a folder of event files, in order; a file that is no event file is skipped with one warning."""

    def __init__(self, folder: Storage) -> None:
        """Read from the first event of ``folder``, such as ``events/aggregate`` of a run."""
        self._folder = folder
        self._read: dict[str, int] = {}
        self._readers: dict[str, RecordReader] = {}
        self._damaged: set[str] = set()
        self._waiting: deque[Event] = deque()

    def events(self) -> Iterator[Event]:
        """Yield the events since the last call; each call costs one listing and the new bytes.

        An event is yielded once, also if its use fails; those that follow it then come with the next call.

        Raises:
            UserError: The store does not answer.
        """
        yield from self._decoded()
        # Names begin with the time of the process and end in the number of the segment, so they sort in order.
        for stored in self._folder.list():
            if _MARK not in stored.key or stored.key in self._damaged:
                continue
            while (begin := self._read.get(stored.key, 0)) < stored.size:
                try:
                    piece = self._folder.read_range(stored.key, begin, min(_PIECE, stored.size - begin))
                except NotFoundError:  # the run was removed
                    break
                if not piece:
                    break
                # Before the events are used: an error in their use must not show them twice.
                self._read[stored.key] = begin + len(piece)
                self._decode(stored.key, piece)
                yield from self._decoded()
                if stored.key in self._damaged:
                    break

    def _decoded(self) -> Iterator[Event]:
        while self._waiting:
            yield self._waiting.popleft()

    def _decode(self, key: str, piece: bytes) -> None:
        try:
            self._waiting.extend(self._readers.setdefault(key, RecordReader()).events(piece))
        except DamagedRecordsError as error:
            logger.warning("%s/%s is skipped from here: %s", self._folder.uri, repr(key)[1:-1], error)
            self._damaged.add(key)
            del self._readers[key]


def restarted(event: Event) -> int | None:
    """Return the step from which earlier events are void, if a process of the run began here; else None."""
    is_start = event.HasField("session_log") and event.session_log.status == SessionLog.START
    return event.step if is_start else None
