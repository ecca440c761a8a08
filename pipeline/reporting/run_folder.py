"""The run folder: files that grow are written to local disk and, for s3:// runs, uploaded during training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.reporting.growing import GrowingFile
from sharding.errors import UserError
from sharding.names import path_below
from sharding.scratch import ScratchFolder
from sharding.storage import LocalStorage, open_storage
from sharding.storage.lock import LockLostError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
"""File with the configuration and the environment of the run."""
TEMPORARY_SUFFIX = ".tmp"
"""Suffix of files before their rename; they are never uploaded."""


class RunFolder:
    """A run's files: ``storage`` for files published whole, ``local`` for files that grow.

    For a local run both are the same folder. For an s3:// run ``local`` is a scratch folder of this process, whose
    changed files are uploaded every ``sync_seconds`` by a thread, and once more on leaving the context. Files that were
    fetched are taken to grow and are stored in parts (`pipeline.reporting.growing`).
    """

    def __init__(self, uri: str, sync_seconds: float, wait_seconds: float | None = None) -> None:
        """Open the run folder; nothing is created yet.

        Args:
            uri: Local path or s3:// prefix.
            sync_seconds: Time between uploads, seconds.
            wait_seconds: Time that a store which is away is waited for (`open_storage`), seconds.

        Raises:
            UserError: The URI cannot be a run folder.
        """
        self.storage = open_storage(uri, wait_seconds=wait_seconds)
        self._sync_seconds = sync_seconds
        self._scratch: ScratchFolder | None = None
        if isinstance(self.storage, LocalStorage):
            self.local = Path(self.storage.uri)
        else:
            self._scratch = ScratchFolder("run")
            self.local = self._scratch.path
        self._sent: dict[str, tuple[int, int]] = {}
        self._growing: dict[str, GrowingFile] = {}
        self._before: list[Callable[[bool], None]] = []
        self._sending = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start uploading if the run is not local."""
        if self._scratch is not None:
            self._thread = threading.Thread(target=self._sync_forever, name="run-folder", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Upload the remaining changes and stop; an upload error does not hide an error of the block."""
        if self._scratch is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if isinstance(error, LockLostError):  # the folder is another job's now
            self._scratch.cleanup()
            return
        try:
            self.sync(final=True)
        except UserError as unsent:
            if error is None:
                raise
            logger.warning("the last events and metrics were not uploaded: %s", unsent)
        finally:
            self._scratch.cleanup()

    @property
    def uploads(self) -> bool:
        """Return True if files are uploaded from ``local``, False if they are in their place already."""
        return self._scratch is not None

    def fetch(self, key: str) -> Path:
        """Return the local path of a file that grows; download it first if only the store has it."""
        path = path_below(self.local, key, self.storage.uri)
        if self._scratch is not None and not path.exists():
            growing = GrowingFile(self.storage, key)
            growing.fetch(path)
            self._growing[key] = growing
        return path

    def before_upload(self, call: Callable[[bool], None]) -> None:
        """Call a function before each round of uploads; its argument says if all that was written is due."""
        self._before.append(call)

    def sync(self, *, everything: bool = True, final: bool = False) -> None:
        """Upload what changed since its last upload.

        Args:
            everything: True if all of it is due, before a checkpoint; else what `before_upload` and `GrowingFile` say.
            final: True if no more is written.

        Raises:
            UserError: The store refuses the upload.
        """
        if self._scratch is None:
            return
        with self._sending:
            for call in self._before:
                try:
                    call(everything)
                except OSError as error:  # A full disk delays events; it must not cost the checkpoint that follows.
                    logger.warning("events are not uploaded yet: %s", error)
            for path in sorted(self.local.rglob("*")):
                self._send(path, everything, final)

    def _send(self, path: Path, everything: bool, final: bool) -> None:
        try:
            stat = path.stat()
            data_of = (stat.st_size, stat.st_mtime_ns)
            key = path.relative_to(self.local).as_posix()
            if key in self._growing:
                self._growing[key].send(path, everything, final)
                return
            if path.suffix == TEMPORARY_SUFFIX or path.is_dir() or self._sent.get(key) == data_of:
                return
            # A copy, because an event file may grow during the upload.
            data = path.read_bytes()
        except FileNotFoundError:  # replaced by a rename since it was listed; the next round finds the new file
            return
        self.storage.write(key, data)
        self._sent[key] = data_of

    def _sync_forever(self) -> None:
        while not self._stop.wait(self._sync_seconds):
            try:
                self.sync(everything=False)
            except (UserError, OSError) as error:
                # Training must survive a store that is unavailable for a while; the next round uploads the rest.
                logger.warning("run folder not synchronised, will retry: %s", error)
