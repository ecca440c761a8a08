"""Whole objects by key, on a local folder or an S3 bucket, behind one small protocol.

Nothing else in the project decides what a key becomes on disk or in a bucket. An object appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from sharding.errors import UserError
from sharding.names import path_below, refuse_secret
from sharding.storage_options import StorageOptions

PIECE = 120 << 10
"""Bytes of a piece of `Storage.stream`, and of any body that failed before. What came of a piece that stalls is lost;
from 128 KiB up the C library asks the kernel for the memory of each piece anew."""
# Files that are being written; a killed writer may leave one, so no listing shows them.
TEMPORARY_PREFIX = ".tmp-"
# What a file system says that has no hard links: FAT, some network shares and FUSE mounts.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


Fill = Callable[[memoryview], int]
"""Fills a buffer with the bytes that come next, and returns how many there were."""


class NotFoundError(UserError):
    """The object does not exist."""


class BucketNotFoundError(NotFoundError):
    """The bucket itself does not exist, so no key in it can."""


class StorageUnavailableError(UserError):
    """The store does not answer, breaks off, or says that it is overloaded or broken (HTTP 429 or 5xx).

    It was waited for already (see `sharding.retries`), but the same call may work later, so a long run may start again.
    Every other UserError of this module stays until somebody mends it: a wrong key, a denied or missing bucket, a
    missing object, a full or protected disk.
    """


class CorruptedError(UserError):
    """The bytes that arrive, each time anew, are not those that the store's own checksum was made of."""


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing."""

    key: str
    """Its key relative to the storage's URI, with ``/`` between parts."""

    size: int
    """Its length in bytes."""


class Storage(Protocol):
    """Objects by key under one URI. Safe in threads, and to pickle: the copy opens its own connection.

    Any call raises StorageUnavailableError where the store does not answer, and UserError for what the user must mend.
    """

    @property
    def uri(self) -> str:
        """The absolute folder or ``s3://`` URI that keys are relative to."""
        ...

    request_bytes: int
    """How much is worth reading by one request, neighbours of what is needed too; 0 where requests cost nothing."""

    def read(self, key: str) -> bytes:
        """Return an object whole; NotFoundError where there is none."""
        ...

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the object ends before."""
        ...

    def read_into(self, key: str, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; return how many bytes came, fewer where the object ends before."""
        ...

    def reading(self, key: str, offset: int, length: int) -> AbstractContextManager[Fill]:
        """Give what fills one buffer after the other with the next of ``length`` > 0 bytes, by one request.

        It returns how many came, fewer where the object ends before. Nothing is asked for before the first buffer is
        there, and what breaks off is continued. From S3 nothing more comes once the object was replaced, or after an
        error.
        """
        ...

    def stream(self, key: str) -> Iterator[bytes]:
        """Yield an object whole, from its first byte to its last, in pieces of up to 120 KiB.

        All pieces are of one and the same object: one that is replaced meanwhile is a StorageUnavailableError. Only
        an S3 object that arrived without a break was compared with the store's checksum (CorruptedError, after the
        last piece), so compare a digest.
        """
        ...

    def write(self, key: str, data: bytes) -> None:
        """Store an object, whole or not at all, in place of an older one."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Store a local file's content as an object, whole or not at all."""
        ...

    def create(self, key: str, content: bytes | Path) -> bool:
        """Store bytes or a local file's content as a new object, whole or not at all; False where there is one already.

        Of several that create one key at once, one is told True. Only a place that cannot promise it (a file system
        without hard links, an S3 store without conditional writes) looks first and then stores, so that two at the
        same moment may both be told True; the object is then one of theirs, whole.
        """
        ...

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Return all objects whose key starts with ``prefix``, sorted by key."""
        ...

    def exists(self, key: str) -> bool:
        """Say whether there is an object of that key."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error where there is none."""
        ...

    def child(self, name: str) -> Storage:
        """Return the storage one prefix or folder below."""
        ...


def open_storage(uri: str | os.PathLike[str], options: StorageOptions | None = None) -> Storage:
    """Open a local folder (made at the first write; ``~`` is the home) or ``s3://bucket[/prefix]``.

    The S3 endpoint comes from ``AWS_ENDPOINT_URL`` and the credentials from boto3's standard chain. Nothing
    is sent until the first call.

    Args:
        uri: the place.
        options: how objects are stored in S3; a folder knows neither parts nor concurrency.

    Raises:
        UserError: for an empty URI, one with a secret, another scheme, no bucket, or encryption or a storage class on
            a local folder.
    """
    # Here, not above: they need this module's errors.
    from sharding.s3 import S3Storage
    from sharding.s3_requests import Bucket

    options = options or StorageOptions()
    text = os.fspath(uri)
    check_uri("the URI", text)
    scheme, separator, rest = text.partition("://")
    if separator and scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UserError(f"{text!r} names no bucket: write s3://BUCKET/PREFIX")
        return S3Storage(Bucket(bucket, options), prefix.strip("/"))
    if separator:
        raise UserError(f"cannot open {text!r}: a URI is a local path or starts with s3://")
    if not text:
        raise UserError("an empty URI names no place: give a local path or s3://BUCKET/PREFIX")
    for option, value in (("--sse", options.sse), ("--storage-class", options.storage_class)):
        if value is not None:
            raise UserError(f"{option} {value} is for s3:// only, and {text} is a folder: leave it out")
    return LocalStorage(expanded(text).absolute())


def check_uri(where: str, uri: str) -> None:
    """Refuse a URI with a secret, and one that looks like S3's and would be taken for a folder.

    Args:
        where: names the option in the error.
        uri: as the user gave it.

    Raises:
        UserError: naming ``where``.
    """
    refuse_secret(where, uri)
    if uri.lower().startswith("s3:") and not uri.lower().startswith("s3://"):
        raise UserError(f"{where} {uri!r} is no S3 URI: write s3://BUCKET/PREFIX, or ./{uri} for a folder of that name")


def expanded(path: str) -> Path:
    """Return a local path whose leading ``~`` is the home folder, as a shell leaves it in ``--output=~/x``.

    Raises:
        UserError: where there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path!r} names a home folder that is not known: write the whole path") from None


class LocalStorage:
    """Objects as files under a folder."""

    request_bytes = 0

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def uri(self) -> str:
        """The absolute folder."""
        return str(self._root)

    def __repr__(self) -> str:
        return f"LocalStorage({self.uri!r})"

    def read(self, key: str) -> bytes:
        """Return a file whole."""
        with self._explained(key):
            return self._path(key).read_bytes()

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset``."""
        with self._explained(key), self._path(key).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> int:
        """Read straight into ``buffer``."""
        with self._explained(key), self._path(key).open("rb", buffering=0) as file:
            file.seek(offset)
            count = 0
            while count < len(buffer) and (more := file.readinto(buffer[count:])):
                count += more
            return count

    @contextlib.contextmanager
    def reading(self, key: str, offset: int, length: int) -> Iterator[Fill]:
        """Read straight into each buffer."""
        stop = offset + length

        def read(buffer: memoryview) -> int:
            nonlocal offset
            buffer = buffer[: stop - offset]
            start, offset = offset, offset + len(buffer)
            return self.read_into(key, start, buffer)

        yield read

    def stream(self, key: str) -> Iterator[bytes]:
        """Read the file piece by piece; one that is replaced meanwhile stays readable."""
        with self._explained(key), self._path(key).open("rb") as file:
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

    def create(self, key: str, content: bytes | Path) -> bool:
        """Write beside the target, then link: of several links to one name the first succeeds."""
        target = self._path(key)
        with self._explained(key), self._beside(key) as temporary:
            if target.exists():
                return False
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                shutil.copyfile(content, temporary)
            return _publish_new(temporary, target)

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Walk the folder that ``prefix`` lies in."""
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
                        found.append(StoredObject(key, path.stat().st_size))
        return sorted(found, key=lambda item: item.key)

    def exists(self, key: str) -> bool:
        """Say whether the file is there."""
        with self._explained(key):
            return self._path(key).is_file()

    def delete(self, key: str) -> None:
        """Remove the file if it is there, and the folders that it leaves empty: an object store shows none either."""
        path = self._path(key)
        with self._explained(key):
            path.unlink(missing_ok=True)
        for folder in path.parents[: len(PurePosixPath(key).parts) - 1]:
            try:
                folder.rmdir()
            except OSError:  # not empty, or never there
                break

    def child(self, name: str) -> LocalStorage:
        """Return the folder below."""
        return LocalStorage(self._path(name))

    def _path(self, key: str) -> Path:
        return path_below(self._root, key, self.uri)

    @contextlib.contextmanager
    def _replacing(self, key: str) -> Iterator[Path]:
        with self._beside(key) as temporary:
            yield temporary
            temporary.replace(self._path(key))

    @contextlib.contextmanager
    def _beside(self, key: str) -> Iterator[Path]:
        """Give the path of a temporary file in the key's folder, and remove it if it is still there."""
        folder = self._path(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
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


def _publish_new(temporary: Path, target: Path) -> bool:
    """Give a finished file its name unless something has it; say whether it was given."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # Over NFS a link that was made may be answered so, when the first answer was lost.
        return target.samefile(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            return False
        temporary.replace(target)
    return True


def _unless_gone(error: OSError) -> None:
    """Let a folder that cannot be read be an error; `os.walk` would take it for an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
