"""One remote file to one local file, continued where it broke off, and whole or not there at all.

Bytes go to ``<name>.part``; ``<name>.part.json`` beside it says what they are part of. Both stay behind a killed,
interrupted or failed fetch, and the next one goes on from them. The part gets its name when its SHA-256 is right.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from sharding.download.remote import Answer, BrokenError, Server, Version
from sharding.errors import UserError
from sharding.progress import Progress, progress
from sharding.storage import LocalStorage

log = logging.getLogger(__name__)

PROGRESS_BYTES = 1 << 20
"""An attempt that gets this much further than any before it has not failed: the count of failures begins anew."""
_BLOCK = 1 << 20
_MB = 10**6
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class Patience:
    """How long a server that fails is waited for."""

    tries: int = 12
    """Failures in a row, without progress, that end a fetch; their pauses add up to about five minutes."""

    first_tries: int = 3
    """The same for a server that has never answered: its name may be wrong."""

    pause_s: float = 1.0
    """First pause; each further one is twice as long. A random quarter is taken off, lest many clients come at once."""

    longest_pause_s: float = 60.0
    """Most seconds of a pause that we choose."""

    longest_asked_s: float = 600.0
    """Most seconds of a pause that the server asks for (Retry-After)."""

    def pause(self, failures: int, asked_s: float) -> float:
        """Return the seconds to wait after so many failures in a row."""
        own = min(self.longest_pause_s, self.pause_s * 2.0 ** (failures - 1)) * random.uniform(0.75, 1.0)
        return max(own, min(asked_s, self.longest_asked_s))


class Meter:
    """Progress through a file of which the size may become known late, and of which some may be here already."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._shown: Progress | None = None
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown is not None:
            self._shown.__exit__(kind, error, trace)

    def show(self, done: int, size: int) -> None:
        """Show that ``done`` bytes of ``size`` are here. The first call says what was here before."""
        megabytes = -(-done // _MB)
        if self._shown is None:
            self._shown = progress(-(-size // _MB), self._label, "MB", initial=megabytes).__enter__()
        elif megabytes != self._done:
            self._shown.update(megabytes - self._done)
        self._done = megabytes


class _Part:
    """The bytes that are here of a file, their running digest, and what they are part of."""

    def __init__(self, target: Path, file: BinaryIO) -> None:
        self.target, self.file = target, file
        self.path = part_path(target)
        self._note = f"{self.path.name}.json"
        self._folder = LocalStorage(target.parent)
        self.length, self.digest = 0, hashlib.sha256()
        self.version: Version | None = None
        self._recall()

    @property
    def whole(self) -> bool:
        return self.version is not None and self.length == self.version.size

    def _recall(self) -> None:
        """Take up what an earlier fetch left; bytes of which nothing is known are dropped."""
        try:
            self.version = Version(**json.loads(self._folder.read(self._note)))
        except (UserError, ValueError, TypeError):
            self.version = None
        size = os.fstat(self.file.fileno()).st_size
        if self.version is None or size > self.version.size:
            self.restart()
            return
        self.digest, self.length = hash_file(self.file, size, f"reading {self.path.name}"), size

    def restart(self) -> None:
        """Drop all bytes."""
        self.file.seek(0)
        self.file.truncate()
        self.length, self.digest = 0, hashlib.sha256()

    def take(self, version: Version) -> None:
        """Say what the bytes are part of, before any of them is written."""
        if version != self.version:
            self._folder.write(self._note, json.dumps(asdict(version)).encode())
            self.version = version

    def append(self, chunk: bytes) -> None:
        """Write the next bytes."""
        assert self.version is not None
        if self.length + len(chunk) > self.version.size:
            raise BrokenError("more came than the file holds")
        self.file.write(chunk)
        self.digest.update(chunk)
        self.length += len(chunk)

    def settle(self) -> None:
        """Bring all bytes to the disk, or fail while the part is still there."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Give the file its name."""
        self.path.replace(self.target)
        self._folder.delete(self._note)

    def discard(self) -> None:
        """Remove all that is here of it."""
        self.path.unlink()
        self._folder.delete(self._note)


def part_path(target: Path) -> Path:
    """Return where the bytes of an unfinished file lie."""
    return target.with_name(f"{target.name}.part")


def fetch(server: Server, target: Path, sha256: str, patience: Patience) -> None:
    """Fetch the file of ``target``'s name into it, from where an earlier fetch ended; its folder exists.

    Raises:
        UserError: for a server that refuses or stays away, a file that is not the expected one, a full disk, and
            where another process fetches the same file. What was fetched stays, except where the digest is wrong.
    """
    with _explained(target), _locked(target) as file:
        part = _Part(target, file)
        with Meter(f"fetching {target.name}") as meter:
            _complete(part, server, patience, meter)
        part.settle()
        digest = part.digest.hexdigest()
        if digest != sha256:
            part.discard()
            raise UserError(
                f"{target.name} from {server.name} has SHA-256 {digest} instead of {sha256}: it was removed; run the "
                "same command again, from another --mirror if it comes back"
            )
        part.publish()


def _complete(part: _Part, server: Server, patience: Patience, meter: Meter) -> None:
    """Request the rest of a file again and again until it is here, or nothing comes any more."""
    name = part.target.name
    failures, furthest = 0, part.length
    while not part.whole:
        try:
            with server.open(name, part.length, part.version) as answer:
                _accept(part, server, answer)
                meter.show(part.length, answer.version.size)
                for chunk in answer.chunks:
                    part.append(chunk)
                    meter.show(part.length, answer.version.size)
            if not part.whole:
                raise BrokenError("the answer ended early")
        except BrokenError as error:
            # A server that begins anew each time and breaks off makes no progress, whatever it sends.
            if part.length >= furthest + PROGRESS_BYTES:
                failures, furthest = 0, part.length
            failures += 1
            if failures >= (patience.tries if server.answered else patience.first_tries):
                raise UserError(
                    f"cannot fetch {name}: {error}, {failures} times in a row; check the network"
                    f"{' and --mirror' if not server.answered else ''}, then run the same command again: it goes on "
                    f"from byte {part.length}"
                ) from error
            pause = patience.pause(failures, error.retry_after_s)
            log.warning("%s: %s; again in %.0f s, from byte %d", name, error, pause, part.length)
            time.sleep(pause)


def _accept(part: _Part, server: Server, answer: Answer) -> None:
    """Decide whether an answer continues the part, begins it anew, or cannot be used; see that there is room."""
    name, known = part.target.name, part.version
    if answer.start not in (0, part.length):
        raise BrokenError(f"{server.name} sends another range than it was asked for")
    if part.length and known is not None:
        if answer.version.size != known.size:
            # Not dropped: the answer may be an error page, and the part hours of work.
            raise UserError(
                f"{name} at {server.name} has {answer.version.size} bytes now, and {part.path} is part of one of "
                f"{known.size}: try again later, or remove the part to begin anew"
            )
        changed = answer.version.origin == known.origin and answer.version.etag != known.etag
        if changed or answer.start == 0:
            reason = "has another version now" if changed else "cannot continue a file"
            log.warning("%s: %s %s; beginning anew", name, server.name, reason)
            part.restart()
            if answer.start:
                raise BrokenError(f"{server.name} has another version now")
    need, free = answer.version.size - part.length, shutil.disk_usage(part.target.parent).free
    if need > free:
        raise UserError(
            f"{part.target.parent} has {free / 1e9:.1f} GB free, and {name} needs {need / 1e9:.1f} GB more: make room, "
            "or give another --to"
        )
    part.take(answer.version)


def hash_file(file: BinaryIO, size: int, label: str) -> hashlib._Hash:
    """Return the digest of a file's next ``size`` bytes, all that it has; long reading shows its progress."""
    digest, done = hashlib.sha256(), 0
    with Meter(label) as meter:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            meter.show(done, size)
    return digest


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[BinaryIO]:
    """Open a file's part, made where there is none, for this process alone."""
    path = part_path(target)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=_BLOCK) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(target) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("the file system of %s has no locks: do not download into it twice at once", target.parent)
        # Whoever held the lock before may have given the part its name, or removed it, since it was opened here.
        if not _same_file(file, path):
            raise _busy(target)
        if target.exists():
            path.unlink()
            raise _busy(target)
        yield file


def _same_file(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _busy(target: Path) -> UserError:
    return UserError(f"another download is at work on {target}: let it end, then run the same command again")


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn what the local disk refuses into a sentence; a connection's errors never come this far."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise UserError(
                f"no room left for {part_path(target)} ({error.strerror}): make room and run the same command again; "
                "what was fetched is kept"
            ) from error
        reason = error.strerror or type(error).__name__
        raise UserError(f"cannot write {part_path(target)} ({reason}): check --to and its permissions") from error
