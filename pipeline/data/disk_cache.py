"""Disk cache of samples on a node: a bounded LRU folder that the node's processes share.

The folder holds samples, lock files, and samples being written, each kind with its own suffix; other files are never
touched. Files change only under the lock of one file, the ledger, which holds the sum of their bytes. The kernel
releases the lock when a process dies, so an unfinished sample seen under the lock belongs to a dead writer. Bytes are
added to the sum before they are written: after a crash the sum can only be too high, until the next scan of the folder.
Each cache scans the folder when it starts and when the sum reaches the limit. On file systems without locks (some
network disks) the limit is approximate.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

from sharding.errors import UserError
from sharding.names import path_below

logger = logging.getLogger(__name__)

SUFFIX = ".span"
TEMPORARY_SUFFIX = ".span-part"
LOCK_SUFFIX = ".span-lock"
_LEDGER = "bytes"
_STRIPES = 1024
"""Number of locks that names share: enough that samples fetched at the same time rarely share one."""
_ABANDONED_S = 3600.0
"""Age after which an unfinished sample counts as left by a dead writer, on file systems without locks."""
_warning = threading.Lock()
"""Held while a cache decides whether its warning is the first. Of the module, so that a cache can be pickled."""


class DiskCache:
    """Samples by name in one folder; safe among processes and threads, after fork and pickle.

    Writes are not synchronised to the disk, and disks fail: compare the checksum of the bytes that `get` reads.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Make the folder and evict samples above the limit, which all its processes must share.

        Raises:
            UserError: The folder cannot be made or written. A full disk raises nothing: samples that do not fit are not
                cached.
        """
        self._folder, self._limit, self._warned = folder, limit_bytes, False
        with self._logging_first():
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder), self._locked(_LEDGER) as ledger:
                    self._scan(ledger, 0)
            except OSError as error:
                if error.errno in {errno.ENOSPC, errno.EDQUOT} and folder.is_dir():
                    raise
                raise UserError(
                    f"data.cache_dir = {str(folder)!r} cannot be written ({error.strerror}): give a writable "
                    'folder of this machine, or "" for no disk cache'
                ) from error

    def get(self, name: str, into: memoryview) -> bool:
        """Read a sample of exactly the buffer's length into the buffer, and set its time of last use.

        Returns:
            False if the sample is absent, of another length or unreadable; the buffer may then be partly filled.
        """
        path, view = self._path(name), into.cast("B")
        try:
            with open(path, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != into.nbytes:
                    return False
                while view and (count := os.preadv(file.fileno(), [view], into.nbytes - len(view))):
                    view = view[count:]
                with contextlib.suppress(OSError):
                    _touch(file.fileno())
        except OSError:
            return False
        return not view

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Store a sample, overwrite an older one of that name, and evict others if the limit requires it.

        A sample that is larger than the limit, or that a full or failing disk does not take, is not stored.
        """
        path, size = self._path(name), memoryview(data).nbytes
        temporary = self._folder / f"{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        if size > self._limit:
            return
        with self._logging_first(), self._locked(_LEDGER) as ledger:
            if ledger.total + size > self._limit:
                self._scan(ledger, size)
            ledger.total += size
            try:
                temporary.write_bytes(data)
                _touch(temporary)
                ledger.total -= _remove(path)
                temporary.replace(path)
            except BaseException:
                _remove(temporary)
                ledger.total -= size
                raise

    def drop(self, name: str) -> None:
        """Remove a sample, for example one with a wrong checksum; do nothing if it is absent."""
        path = self._path(name)
        with self._logging_first(), self._locked(_LEDGER) as ledger:
            ledger.total -= _remove(path)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of a name, so that only one of all processes and threads fetches it.

        A few names share a lock: hold one at a time. It does nothing on a file system without locks.
        """
        with contextlib.ExitStack() as stack:
            with self._logging_first():
                stack.enter_context(self._locked(f"{zlib.crc32(name.encode()) % _STRIPES:04d}"))
            yield

    def _path(self, name: str) -> Path:
        return path_below(self._folder, f"{name}{SUFFIX}", str(self._folder))

    def _scan(self, ledger: _LockFile, size: int) -> None:
        """Set the sum to the bytes in the folder; first evict for ``size`` more bytes and, if any, for a reserve."""
        files, total = [], 0
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # without locks, others may remove files during the scan
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False):
                    files.append((status.st_mtime_ns, entry.path, status.st_size))
                elif not entry.name.endswith(TEMPORARY_SUFFIX):
                    continue
                elif ledger.exclusive or time.time() - status.st_mtime > _ABANDONED_S:
                    os.unlink(entry.path)
                    continue
                total += status.st_size
        room = self._limit - size
        for _, path, length in sorted(files) if total > room else ():
            if total > min(room, self._limit * 9 // 10):
                total -= length
                Path(path).unlink(missing_ok=True)
        ledger.total = total

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[_LockFile]:
        """Wait for the lock of a file, created if absent; the kernel releases it when its holder dies."""
        descriptor = os.open(self._folder / f"{name}{LOCK_SUFFIX}", os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            exclusive = _flocked(descriptor)
            if exclusive:
                # Closing is not enough: a process forked meanwhile shares the descriptor and would keep the lock.
                stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
            yield _LockFile(descriptor, exclusive)

    @contextlib.contextmanager
    def _logging_first(self) -> Iterator[None]:
        """Continue after an OSError, and log only the first one: there may be as many as samples."""
        try:
            yield
        except OSError as error:
            text = "data.cache_dir: %s cannot keep a file (%s); samples that are not cached are read from the store"
            with _warning:
                first, self._warned = not self._warned, True
            if first:
                logger.warning(text, self._folder, error.strerror)


class _LockFile:
    """An open lock file; the ledger's holds a number."""

    def __init__(self, descriptor: int, exclusive: bool) -> None:
        self._descriptor, self.exclusive = descriptor, exclusive

    @property
    def total(self) -> int:
        data = os.pread(self._descriptor, 8, 0)
        return int.from_bytes(data, "little") if data else 1 << 62  # unknown sum: larger than any limit

    @total.setter
    def total(self, value: int) -> None:
        os.pwrite(self._descriptor, max(value, 0).to_bytes(8, "little"), 0)


def _flocked(descriptor: int) -> bool:
    """Wait for the lock of an open file; return False on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}:
            raise
        return False
    return True


def _touch(file: Path | int) -> None:
    """Set a file's time of last use to now, with a finer resolution than the kernel's ticks."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _remove(path: Path) -> int:
    """Remove a file and return its length, 0 if absent. A process that has it open reads to its end."""
    size = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    return size
