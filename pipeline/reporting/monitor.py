"""TensorBoard on runs anywhere: local folders directly, s3:// runs through a copy that is kept up to date."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.reporting.segments import without_segment
from pipeline.signals import dies_with_parent
from sharding.errors import UserError
from sharding.names import path_below
from sharding.scratch import scratch_folder
from sharding.storage import LocalStorage, Storage, open_storage

logger = logging.getLogger(__name__)

EVENTS = "events"
_PIECE = 8 << 20
"""Bytes of an event file that are read at once."""
# Errors of a file system for a name that is too long, or that is both a folder and a file in the store.
_NO_FILE_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


class EventMirror:
    """A local copy of a stored run's events; each call of `update` fetches new bytes."""

    def __init__(self, run: Storage, folder: Path) -> None:
        """Copy the events of ``run`` below ``folder``."""
        self._events = run.child(EVENTS)
        self._folder = folder
        self._sizes: dict[str, int] = {}
        self._skipped: set[str] = set()

    def update(self) -> int:
        """Fetch new and grown event files; return their number. A key that cannot be a local file is skipped.

        Raises:
            UserError: The store does not answer.
        """
        fetched = 0
        for stored in self._events.list():
            here = self._sizes.get(stored.key, 0)
            if here == stored.size or stored.key in self._skipped:
                continue
            path = self._place(stored.key)
            if path is None:
                self._skipped.add(stored.key)
                continue
            # Event files only grow, and TensorBoard continues reading at its position in the open file. Each segment is
            # complete before the next one begins.
            with path.open("ab") as file:
                for start in range(here, stored.size, _PIECE):
                    file.write(self._events.read_range(stored.key, start, min(_PIECE, stored.size - start)))
            self._sizes[stored.key] = stored.size
            fetched += 1
        return fetched

    def _place(self, key: str) -> Path | None:
        """Return the path of a key's copy and create its folder; None, with a warning, if it cannot be a file."""
        try:
            # All segments of a process in one file: TensorBoard keeps every file open.
            path = path_below(self._folder, without_segment(key), self._events.uri)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except UserError as error:
            logger.warning("not copied: %s", error)
            return None
        except OSError as error:
            if error.errno not in _NO_FILE_NAME:
                raise
            logger.warning("not copied: %r of %s cannot be a file (%s)", key, self._events.uri, error.strerror)
            return None
        return path


@contextmanager
def event_folder(uris: Sequence[str], refresh_seconds: float) -> Iterator[Path]:
    """Yield a folder that TensorBoard can read: a link or an updated copy for each run.

    Args:
        uris: Run folders.
        refresh_seconds: Seconds between polls of stored runs.

    Raises:
        UserError: A URI holds no events, or a key that cannot be a file below the folder.
    """
    with scratch_folder("monitor") as root:
        mirrors: list[EventMirror] = []
        runs = [open_storage(uri) for uri in uris]
        for name, run in zip(_names(runs), runs, strict=True):
            folder = path_below(root, name, "the runs")
            stored = run.child(EVENTS).list()
            if not stored:
                raise UserError(f"{run.uri} holds no {EVENTS}/: name a run folder, as output.uri of a training has it")
            if isinstance(run, LocalStorage):
                folder.symlink_to((Path(run.uri) / EVENTS).resolve(), target_is_directory=True)
                continue
            for item in stored:
                path_below(folder, item.key, f"{run.uri}/{EVENTS}")
            mirrors.append(EventMirror(run, folder))
            mirrors[-1].update()
        stop = threading.Event()
        follower = threading.Thread(target=_follow, args=(mirrors, refresh_seconds, stop), daemon=True)
        follower.start()
        try:
            yield root
        finally:
            stop.set()
            follower.join()


def monitor(uris: Sequence[str], host: str, port: int, refresh_seconds: float) -> int:
    """Serve TensorBoard on ``uris`` until interrupted; return its exit status."""
    program = shutil.which("tensorboard", path=str(Path(sys.executable).parent)) or "tensorboard"
    with event_folder(uris, refresh_seconds) as folder:
        command = [program, "--logdir", str(folder), "--host", host, "--port", str(port)]
        # New events appear within seconds, also in files that a resumed run has left behind.
        command += ["--reload_interval", "5", "--reload_multifile", "true"]
        # A session of its own, so that Ctrl-C reaches it only through this process.
        # It ends with this process, however that ends; what it writes for itself goes where we remove it.
        server = subprocess.Popen(  # noqa: S603 - our own words, no shell
            command,
            start_new_session=True,
            preexec_fn=dies_with_parent(),
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait()


def _names(runs: Sequence[Storage]) -> list[str]:
    """Return a folder name for each run: its last part, numbered if two are equal."""
    names: list[str] = []
    for run in runs:
        place = str(Path(run.uri).resolve()) if isinstance(run, LocalStorage) else run.uri
        base = place.rstrip("/").rsplit("/", 1)[-1] or "run"
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _follow(mirrors: Sequence[EventMirror], refresh_seconds: float, stop: threading.Event) -> None:
    while mirrors and not stop.wait(refresh_seconds):
        for mirror in mirrors:
            try:
                mirror.update()
            except (UserError, OSError) as error:
                logger.warning("events not refreshed, will retry: %s", error)
