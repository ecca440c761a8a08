"""Spans of shards as files on a node's own disk: shared by its processes, bounded, the least recently used out first.

Three kinds of files, all with suffixes of their own, so that nothing else in the folder is ever touched: the spans,
those that are being written, and empty ones to lock. One of the latter, the ledger, holds the sum of all lengths.
Whatever changes files does so under the ledger's lock, which the kernel frees when a process dies, and counts before it
writes, so the bound holds among all processes, temporary files included, and a crash leaves the sum too high at most;
the next look into the folder corrects that. Only on a file system without locks may the sum miss what others write at
the same moment, until that next look, which comes each time the sum reaches the bound.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

from sharding.errors import UserError
from sharding.storage.names import path_below

logger = logging.getLogger(__name__)

SUFFIX = ".span"
TEMPORARY_SUFFIX = ".span-part"
LOCK_SUFFIX = ".span-lock"
_LEDGER = f"bytes{LOCK_SUFFIX}"
_STRIPES = 1024
"""Locks that names share: enough that those fetched at one moment seldom wait for one another."""
_ABANDONED_S = 3600.0
"""Where there are no locks: seconds since its last byte after which a temporary file has no writer any more."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class DiskCache:
    """Files by name in one folder; safe among processes and threads, to fork and to pickle.

    Nothing is synchronised to the disk, and disks fail: compare the checksum of what `get` reads.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Make the folder, remove what dead writers left in it, and bring it within the bound.

        Args:
            folder: where the files lie.
            limit_bytes: the most bytes of all files together, the same for all that share the folder.

        Raises:
            UserError: The folder cannot be made or written. A full disk only costs what does not fit on it.
        """
        self._folder, self._limit = folder, limit_bytes
        self._warned = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder), self._ledger() as ledger:
                ledger.total = self._evict(0)
        except OSError as error:
            if error.errno not in _NO_ROOM or not folder.is_dir():
                raise UserError(
                    f"data.cache_dir = {str(folder)!r} cannot be written ({_reason(error)}): give a folder of this "
                    'machine that can be, or "" for none'
                ) from error
            self._warn(error)

    def get(self, name: str, into: memoryview) -> bool:
        """Read a file of exactly the buffer's length into it, and note that it was used.

        Returns:
            False where there is none, where it has another length or cannot be read; the buffer may be half filled.
        """
        path = self._path(name)
        try:
            with open(path, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != into.nbytes or not _fill(file.fileno(), into):
                    return False
                with contextlib.suppress(OSError):
                    _touch(file.fileno())
        except OSError:
            return False
        return True

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Keep bytes under a name, in place of older ones; others leave where there is no room within the bound.

        What cannot be kept, for its size, a full disk or one that fails, is not; the first failure is logged.
        """
        path, view = self._path(name), memoryview(data).cast("B")
        if view.nbytes > self._limit:
            return
        temporary = self._folder / f"{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        try:
            self._write(path, temporary, view)
        except OSError as error:
            self._warn(error)

    def drop(self, name: str) -> None:
        """Remove a file, if there is one, such as one whose checksum is wrong."""
        path = self._path(name)
        try:
            with self._ledger() as ledger:
                ledger.add(-_remove(path))
        except OSError as error:
            self._warn(error)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Keep all other processes and threads from the lock of a name, so that only one of them fetches it.

        A few names share a lock: hold one at a time. The kernel frees it when its holder dies. It does nothing where
        the file system has no locks.
        """
        stripe = zlib.crc32(name.encode()) % _STRIPES
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_locked(self._folder / f"{stripe:04d}{LOCK_SUFFIX}"))
            except OSError as error:
                self._warn(error)
            yield

    def _path(self, name: str) -> Path:
        return path_below(self._folder, f"{name}{SUFFIX}", str(self._folder))

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[_Ledger]:
        with _locked(self._folder / _LEDGER) as descriptor:
            yield _Ledger(descriptor)

    def _write(self, path: Path, temporary: Path, view: memoryview) -> None:
        """Write a temporary file, locked while its writer lives, and give it its name."""
        size = view.nbytes
        with contextlib.ExitStack() as stack:
            try:
                with self._ledger() as ledger:
                    total = ledger.total
                    if total is None or total + size > self._limit:
                        total = ledger.total = self._evict(size)
                    if total + size > self._limit:  # others are writing that much
                        return
                    ledger.total = total + size
                    file = stack.enter_context(open(temporary, "xb", buffering=0))
                    _try_lock(file.fileno(), fcntl.LOCK_EX)
                    file.truncate(size)  # a look into the folder counts what is to come
                _reserve(file.fileno(), size)
                while view:
                    view = view[file.write(view) :]
                _touch(file.fileno())
                with self._ledger() as ledger:
                    replaced = _size(path)
                    temporary.replace(path)
                    ledger.add(-replaced)
            except BaseException:
                with contextlib.suppress(OSError), self._ledger() as ledger:
                    temporary.unlink()
                    ledger.add(-size)
                raise

    def _evict(self, size: int) -> int:
        """Make room for ``size`` more bytes, and some to spare, under the ledger's lock.

        Returns:
            The bytes of all files that are left.
        """
        files, total = [], 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # without locks, others remove files meanwhile
                    if entry.name.endswith(TEMPORARY_SUFFIX):
                        status = entry.stat(follow_symlinks=False)
                        if _abandoned(Path(entry.path), status.st_mtime):
                            os.unlink(entry.path)
                        else:
                            total += status.st_size
                    elif entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        files.append((status.st_mtime_ns, entry.name, status.st_size))
                        total += status.st_size
        if total + size > self._limit:
            room = min(self._limit * 9 // 10, self._limit - size)
            for _, name, length in sorted(files):
                if total <= room:
                    break
                _remove(self._folder / name)
                total -= length
        return total

    def _warn(self, error: OSError) -> None:
        """Log the first failure; there may be as many as there are files."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "data.cache_dir: %s cannot keep a file (%s); the run reads from the store what is not kept",
                self._folder,
                _reason(error),
            )


class _Ledger:
    """The bytes of all files of a cache, in a file that this process has locked."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def total(self) -> int | None:
        """The sum, never too low; None where nobody has counted yet."""
        data = os.pread(self._descriptor, 9, 0)
        return int.from_bytes(data, "little") if len(data) == 8 else None

    @total.setter
    def total(self, value: int) -> None:
        os.pwrite(self._descriptor, max(value, 0).to_bytes(8, "little"), 0)

    def add(self, change: int) -> None:
        """Add to the sum, if there is one."""
        total = self.total
        if change and total is not None:
            self.total = total + change


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open a file, made where there is none, and wait for its lock; yield its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _try_lock(descriptor, fcntl.LOCK_EX)
        try:
            yield descriptor
        finally:
            # Closing is not enough: a process forked meanwhile has the descriptor too, and would keep the lock.
            _try_lock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, operation: int) -> None:
    """Lock or unlock an open file; on a file system without locks do nothing."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _abandoned(path: Path, written_s: float) -> bool:
    """Say whether no process is writing a temporary file any more, which was last written at that time."""
    with open(path, "rb", buffering=0) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return time.time() - written_s > _ABANDONED_S
    return True


def _fill(descriptor: int, into: memoryview) -> bool:
    """Read a file from its beginning straight into a buffer; False where it ends before."""
    view, done = into.cast("B"), 0
    while done < view.nbytes:
        count = os.preadv(descriptor, [view[done:]], done)
        if count == 0:
            return False
        done += count
    return True


def _reserve(descriptor: int, size: int) -> None:
    """Take room on the disk, which makes writing a quarter faster; where a file system cannot, do nothing."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise


def _touch(descriptor: int) -> None:
    """Set a file's time of last use to now, finer than the kernel's own ticks."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))


def _size(path: Path) -> int:
    """Return a file's length; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _remove(path: Path) -> int:
    """Remove a file if there is one; return its length. Who has it open reads on."""
    size = _size(path)
    path.unlink(missing_ok=True)
    return size


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
