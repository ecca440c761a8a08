"""Local storage: objects as files under a folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from sharding.errors import UserError
from sharding.names import path_below
from sharding.storage.base import PIECE, Fill, NotFoundError, StoredObject
from sharding.storage.owner import born, has_ended
from sharding.storage.retries import RetryCounter

# Files that are being written; a killed writer may leave one, so no listing shows them.
TEMPORARY_PREFIX = ".tmp-"
# Their names: what `born` says of the writer, its number, and a random number.
_TEMPORARY = re.compile(
    rf"{re.escape(TEMPORARY_PREFIX)}(?P<boot>[0-9a-f-]{{36}})-(?P<space>\d+)-(?P<start>\d+)-(?P<pid>\d+)-[0-9a-f]{{32}}"
)
_ATTEMPTS = 100
# Errors of a file system without hard links: FAT, some network shares and FUSE mounts.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalStorage:
    """Storage of objects as files under a folder."""

    request_bytes = 0
    retries = RetryCounter()
    """Always 0: errors of a file system are not retried."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def uri(self) -> str:
        """Absolute path of the folder."""
        return str(self._root)

    def __repr__(self) -> str:
        return f"LocalStorage({self.uri!r})"

    def _file(self, key: str) -> Path:
        """Return the path of an object, unless opening it could block or never end.

        Raises:
            UserError: If it is a pipe, a device or a socket.
        """
        path = self._path(key)
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise UserError(f"{path} is a pipe, a device or a socket, which is not read: replace it by a regular file")
        return path

    def read(self, key: str) -> bytes:
        """Return a whole file."""
        with self._explained(key):
            return self._file(key).read_bytes()

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset``."""
        with self._explained(key), self._file(key).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> int:
        """Read directly into ``buffer``."""
        with self._explained(key), self._file(key).open("rb", buffering=0) as file:
            file.seek(offset)
            count = 0
            while count < len(buffer) and (more := file.readinto(buffer[count:])):
                count += more
            return count

    @contextlib.contextmanager
    def open_range(self, key: str, offset: int, length: int) -> Iterator[Fill]:
        """Read directly into each buffer."""
        stop = offset + length

        def fill(buffer: memoryview) -> int:
            nonlocal offset
            buffer = buffer[: stop - offset]
            start, offset = offset, offset + len(buffer)
            return self.read_into(key, start, buffer)

        yield fill

    def stream(self, key: str) -> Iterator[bytes]:
        """Read the file piece by piece; if it is replaced meanwhile, the old one stays readable."""
        with self._explained(key), self._file(key).open("rb") as file:
            while data := file.read(PIECE):
                yield data

    def write(self, key: str, data: bytes) -> None:
        """Write beside the target, then rename."""
        with self._explained(key), self._replacing(key) as temporary:
            temporary.write_bytes(data)

    def upload(self, key: str, path: Path) -> None:
        """Copy beside the target, then rename."""
        with self._explained(key), self._replacing(key) as temporary:
            shutil.copyfile(path, temporary)

    def create(self, key: str, content: bytes) -> bool:
        """Write beside the target, then link: only the first of several links to one name succeeds."""
        target = self._path(key)
        with self._explained(key), self._beside(key) as temporary:
            if target.exists():
                return False
            temporary.write_bytes(content)
            return _publish_new(temporary, target)

    def check_writable(self) -> None:
        """Make a temporary file in the folder, or in the nearest one above it that exists, and remove it."""
        folder = next(place for place in (self._root, *self._root.parents) if os.path.lexists(place))
        temporary = folder / _temporary_name()
        with self._explained(""):
            temporary.touch(exist_ok=False)
            temporary.unlink()

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Walk the folder that contains ``prefix``."""
        start = self._root / prefix.rpartition("/")[0]
        found = []
        with self._explained(prefix.rstrip("/")):
            for folder, _, names in os.walk(start, onerror=_unless_gone):
                for name in names:
                    path = Path(folder, name)
                    key = path.relative_to(self._root).as_posix()
                    if name.startswith(TEMPORARY_PREFIX) or not key.startswith(prefix):
                        continue
                    with contextlib.suppress(FileNotFoundError):  # removed since the folder was read
                        status = path.stat()
                        found.append(StoredObject(key, status.st_size, status.st_mtime))
        return sorted(found, key=lambda item: item.key)

    def folders(self) -> tuple[str, ...]:
        """Read the folder, not what is below."""
        with self._explained(""), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return tuple(sorted(entry.name for entry in os.scandir(self._root) if entry.is_dir()))
        return ()

    def exists(self, key: str) -> bool:
        """Return True if the file exists."""
        with self._explained(key):
            return self._path(key).is_file()

    def delete(self, key: str) -> None:
        """Delete the file if it exists, and folders that become empty, as an object store shows no empty folders."""
        path = self._path(key)
        with self._explained(key):
            path.unlink(missing_ok=True)
        for folder in path.parents[: len(PurePosixPath(key).parts) - 1]:
            try:
                folder.rmdir()
            except OSError:  # not empty, or never there
                break

    def abort_uploads(self, ours: Callable[[str], bool]) -> tuple[str, ...]:
        """Return nothing: `remove_abandoned` removes what killed writers left."""
        return ()

    def child(self, name: str) -> LocalStorage:
        """Return the storage of a folder below."""
        return LocalStorage(self._path(name))

    def remove_abandoned(self) -> None:
        """Remove the temporary files of killed processes of this machine, and folders that become empty."""
        for folder, _, names in os.walk(self._root):
            for name in names:
                if _is_abandoned(name):
                    with contextlib.suppress(UserError):  # another user's, or on a read-only file system
                        self.delete(Path(folder, name).relative_to(self._root).as_posix())

    def _path(self, key: str) -> Path:
        return path_below(self._root, key, self.uri)

    @contextlib.contextmanager
    def _replacing(self, key: str) -> Iterator[Path]:
        with self._beside(key) as temporary:
            yield temporary
            temporary.replace(self._path(key))

    @contextlib.contextmanager
    def _beside(self, key: str) -> Iterator[Path]:
        """Yield the path of a temporary file in the key's folder; delete the file at the end if it still exists."""
        temporary = self._path(key).with_name(_temporary_name())
        _make(temporary)
        _clean(temporary.parent)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        place = self._path(key) if key else self._root
        try:
            yield
        except (FileNotFoundError, IsADirectoryError):
            raise NotFoundError(f"{place} does not exist") from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserError(f"cannot use {place}: {reason}; check the path and its permissions") from error


def _temporary_name() -> str:
    pid = os.getpid()
    since = born(pid).replace(" ", "-")
    return f"{TEMPORARY_PREFIX}{since}-{pid}-{uuid.uuid4().hex}"


def _make(path: Path) -> None:
    """Make an empty file and its folder, also while others remove the folder because it is empty."""
    for attempt in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
            return
        except (FileNotFoundError, FileExistsError):
            if attempt == _ATTEMPTS - 1:
                raise


@functools.lru_cache(maxsize=1024)
def _clean(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder, once for each process that writes there."""
    with contextlib.suppress(OSError):  # others remove some of them, or own them
        for name in os.listdir(folder):
            if _is_abandoned(name):
                (folder / name).unlink()


def _is_abandoned(name: str) -> bool:
    """Return True for the name of a temporary file whose process ran on this machine and has ended."""
    found = _TEMPORARY.fullmatch(name)
    return found is not None and has_ended(int(found["pid"]), " ".join(found.group("boot", "space", "start")))


def _publish_new(temporary: Path, target: Path) -> bool:
    """Link a finished file to its name if the name is free; return True on success."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # NFS may report this for a link that succeeded, when the first answer was lost.
        return target.samefile(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            return False
        temporary.replace(target)
    return True


def _unless_gone(error: OSError) -> None:
    """Raise the error of an unreadable folder; `os.walk` would take the folder for an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
