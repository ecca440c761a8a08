"""Event files in segments: a run on S3 uploads each event once, since a closed segment never changes.

A store cannot append to an object, so a growing event file would be sent whole at each upload. Here the events of a
process go to a hidden open segment. Before an upload it is closed under its final name, and the next event opens
another one. TensorBoard reads the event files of a folder in the order of their names as one curve.

Two limits conflict in a slow run: few objects, and events that are visible within a minute. `may_close` gives the
number of objects priority: a segment then stays open over several uploads, and only its own bytes are sent again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline.reporting.run_folder import TEMPORARY_SUFFIX

LONGEST_WAIT_S = 45.0
"""Longest time that an event waits to be due, seconds; then it is part of the next upload."""
WAIT_SHARE = 0.05
"""Share of a run's time so far that an event may wait: the first events of a run are visible at once."""
FREE_SEGMENTS, STEPS_PER_SEGMENT = 200, 334
"""Segments that may always be closed, and steps that allow another one: 500 in 100,000 steps."""
LARGEST_SEGMENT = 4 << 20
"""Size from which a segment is closed in any case, bytes: larger ones would be costly to send again."""


def may_close(closed: int, steps: int, size: int) -> bool:
    """Return True if another segment may be closed.

    Args:
        closed: Segments closed so far.
        steps: Steps of these segments and the open one.
        size: Size of the open segment, bytes.
    """
    return closed < FREE_SEGMENTS + steps // STEPS_PER_SEGMENT or size >= LARGEST_SEGMENT


class EventFile:
    """TensorBoard events of one process in one folder: one growing file, or segments for a folder that is uploaded."""

    def __init__(self, folder: Path, first_step: int, segmented: bool) -> None:
        """Create the folder and the first file.

        Args:
            folder: Events folder of a rank, or of all ranks together.
            first_step: Readers drop events of this and later steps from earlier files, left by a killed process.
            segmented: True if the folder is uploaded, and `settle` is called before each upload.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._prefix = folder / _name()
        self._first_step = self._step = first_step
        self._segmented = segmented
        self._closed = 0
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._start = time.monotonic()
        self._unsent_since: float | None = None
        self._open()
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, summary: Summary) -> None:
        """Write the values of a step as one event.

        Raises:
            OSError: It cannot be written, for example to a full disk; the next event begins another file.
        """
        with self._lock:
            try:
                if self._file is None:
                    self._open()
                self._step = step
                self._write(Event(step=step, summary=summary))
            except OSError:
                self._leave()
                raise

    def settle(self, everything: bool) -> None:
        """Give the events that are due their final name, for an upload that follows.

        Args:
            everything: True if all events are due, else only those that have waited long enough.
        """
        with self._lock:
            if self._file is None or self._unsent_since is None:
                return
            now = time.monotonic()
            patience = min(LONGEST_WAIT_S, WAIT_SHARE * (now - self._start))
            if not everything and now - self._unsent_since < patience:
                return
            self._unsent_since = None
            if may_close(self._closed, self._step - self._first_step, self._file.tell()):
                self._close()
                return
            copy = self._path.with_name(f"{self._path.name}-copy{TEMPORARY_SUFFIX}")
            shutil.copyfile(self._open_path, copy)
            os.replace(copy, self._path)

    def close(self) -> None:
        """Close the last segment."""
        with self._lock, contextlib.suppress(OSError):  # the events that a full disk did not take are lost already
            if self._file is not None:
                self._close()

    @property
    def _path(self) -> Path:
        """Final path of the open segment."""
        if not self._segmented and not self._closed:
            return self._prefix
        return self._prefix.with_name(f"{self._prefix.name}.{self._closed:06d}")

    @property
    def _open_path(self) -> Path:
        """Path of the segment while it is open; a folder that is not uploaded is read while the file grows."""
        return self._path.with_name(self._path.name + TEMPORARY_SUFFIX) if self._segmented else self._path

    def _open(self) -> None:
        self._file = self._open_path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()
        if self._unsent_since is None:
            self._unsent_since = time.monotonic()

    def _leave(self) -> None:
        """Close a segment whose end could not be written: readers stop there and continue with the next one."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.replace(self._open_path, self._path)
        self._file = None
        self._closed += 1

    def _close(self) -> None:
        self._records.close()
        os.replace(self._open_path, self._path)
        self._file = None
        self._closed += 1


# A process may open several files in one second.
_numbers = itertools.count()


def _name() -> str:
    """Return a file name that sorts after those of earlier processes."""
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):04d}"
