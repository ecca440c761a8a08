"""Scratch folders of this user's processes, below the temporary folder; those of killed processes are removed.

A process that is killed cannot remove its folders. So each folder holds a file that its process keeps locked; the
kernel releases the lock however the process ends, and the next start removes every folder whose lock is free. Several
machines may share the temporary folder on a file system whose locks hold on one machine only, so the file's name holds
the machine's name, and a start looks at the folders of its own machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import multiprocessing.util
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sharding.errors import UserError

_PREFIX, _PYTHONS_PREFIX = "satfusion-", "pymp-"
_FILES = "files"


class ScratchFolder:
    """An empty folder for this process, removed by ``cleanup``, at the end of a ``with`` block, or at a later start."""

    def __init__(self, purpose: str) -> None:
        """Remove the folders that killed processes left, and make a new one.

        Args:
            purpose: Word in the folder's name.

        Raises:
            UserError: The temporary folder cannot be written to.
        """
        try:
            _remove_abandoned(Path(tempfile.gettempdir()))
            self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-"))
            self._lock = _lock_new(self._folder)
            self.path = self._folder / _FILES
            """The folder."""
            self.path.mkdir()
        except OSError as error:
            raise _unusable(error) from None

    def cleanup(self) -> None:
        """Remove the folder; it may be removed already."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Yield the path of a new `ScratchFolder`, which is removed after the block."""
    with ScratchFolder(purpose) as folder:
        yield folder.path


def mark_python_folder() -> None:
    """Make the folder of sockets that Python's `multiprocessing` has in this process a scratch folder.

    Python removes it at the end, and the next start if this process is killed.

    Raises:
        UserError: The temporary folder cannot be written to.
    """
    try:
        _remove_abandoned(Path(tempfile.gettempdir()))
        folder = Path(multiprocessing.util.get_temp_dir())
        if not (folder / _lock_name()).exists():
            _lock_new(folder)  # open, and so locked, until this process ends
    except OSError as error:
        raise _unusable(error) from None


def _unusable(error: OSError) -> UserError:
    return UserError(
        f"no temporary folder can be made ({error.strerror or error}): set TMPDIR to a folder with free space that you "
        "may write to"
    )


def _lock_name() -> str:
    """Return the name of this machine's locked files."""
    return f"{_PREFIX}{socket.gethostname().replace('/', '_')}.lock"


def _lock_new(folder: Path) -> int:
    # Locked before it has its name, so that no other start finds it unlocked.
    unnamed = folder / "unlocked"
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # A file system without locks: then nobody else can lock it, or remove it.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / _lock_name())
    return descriptor


def _remove_abandoned(parent: Path) -> None:
    """Remove every scratch folder of this user on this machine whose process has ended."""
    name = glob.escape(_lock_name())
    for lock in (found for prefix in (_PREFIX, _PYTHONS_PREFIX) for found in parent.glob(f"{prefix}*/{name}")):
        with contextlib.suppress(OSError):  # removed meanwhile, or another user's
            if lock.parent.is_symlink() or lock.parent.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError if its process runs
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
