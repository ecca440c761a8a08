"""Protocol of a storage, and the errors that both back ends raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sharding.errors import UserError
from sharding.storage.retries import RetryCounter

PIECE = 120 << 10
"""Bytes of a piece of `Storage.stream`, and of any body after a failure. If a piece stalls, its bytes so far are lost.
From 128 KiB up the C library requests memory from the kernel for each piece."""


Fill = Callable[[memoryview], int]
"""Function that reads the next bytes into a buffer and returns their number: fewer only at the end of the object.

It is the only type by which bytes reach memory, from a storage to a scene. Its implementation retries and resumes, so
an error is final. Its caller compares the bytes with the index; only a `Fill` of `pipeline.data.sample_reader` has done
so already: it fills the whole buffer or raises.
"""


class NotFoundError(UserError):
    """Error of an object that does not exist."""


class BucketNotFoundError(NotFoundError):
    """Error of a bucket that does not exist, and so of every key in it."""


class StorageUnavailableError(UserError):
    """Error of a store that does not answer, drops the connection, is overloaded or fails (HTTP 429 or 5xx).

    The call was retried already (`sharding.storage.retries`), but may succeed later, so a long run may be restarted.
    Every other UserError of this module persists until the user corrects its cause: a wrong key, a denied or missing
    bucket, a missing object, a full or protected disk.
    """


class CorruptedError(UserError):
    """Error of bytes that differ from the written ones at each read; the message states the cause.

    They do not match the store's own checksum, or not the dataset's index (`sharding.format.sample`).
    """


@dataclass(frozen=True)
class StoredObject:
    """Object of a listing."""

    key: str
    """Its key relative to the storage's URI, with ``/`` between parts."""

    size: int
    """Its size in bytes."""

    modified: float = field(default=0.0, compare=False)
    """Time at which it was stored, by the clock of the store: seconds since 1970."""


class Storage(Protocol):
    """Objects by key under one URI. Safe in threads, and to pickle: the copy opens its own connection.

    Any call raises StorageUnavailableError if the store does not answer, UserError if the user must correct the cause.
    """

    @property
    def uri(self) -> str:
        """Absolute folder or ``s3://`` URI to which keys are relative."""
        ...

    @property
    def retries(self) -> RetryCounter:
        """Retries in this process, by this storage and its `child` storages."""
        ...

    request_bytes: int
    """Bytes worth reading by one request, unneeded neighbours included; 0 if requests cost nothing."""

    def read(self, key: str) -> bytes:
        """Return a whole object; NotFoundError if it does not exist."""
        ...

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer at the end of the object."""
        ...

    def read_into(self, key: str, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; return the number of bytes, fewer at the end of the object."""
        ...

    def open_range(self, key: str, offset: int, length: int) -> AbstractContextManager[Fill]:
        """Open ``length`` > 0 bytes for a `Fill` that reads them into one buffer after the other, by one request.

        The request is sent with the first buffer. A checksum is compared only if the store sends one for the range.
        From S3 no further bytes arrive after the object was replaced, or after an error.
        """
        ...

    def stream(self, key: str) -> Iterator[bytes]:
        """Yield a whole object, from its first byte to its last, in pieces of up to 120 KiB.

        All pieces belong to one version of the object: if it is replaced meanwhile, StorageUnavailableError. Only an
        S3 object that arrived in one response was compared with the store's checksum (CorruptedError, after the last
        piece), so compare a digest.
        """
        ...

    def write(self, key: str, data: bytes) -> None:
        """Store an object, whole or not at all; overwrite an older one."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Store a local file's content as an object, whole or not at all."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Store a new small object, whole or not at all; return False if the key exists already.

        If several callers create one key at once, one of them gets True. A place that cannot guarantee this (a file
        system without hard links, an S3 store without conditional writes) checks first and then stores, so that two
        callers at the same moment may both get True; the object is then one of theirs, whole.
        """
        ...

    def check_writable(self) -> None:
        """Check that objects can be stored here; UserError if not. It leaves no object and makes no folder."""
        ...

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Return all objects whose key starts with ``prefix``, sorted by key."""
        ...

    def folders(self) -> tuple[str, ...]:
        """Return the names of the folders directly under the URI, sorted: the first parts of longer keys."""
        ...

    def exists(self, key: str) -> bool:
        """Return True if the object exists."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object; no error if it does not exist."""
        ...

    def abort_uploads(self, ours: Callable[[str], bool]) -> tuple[str, ...]:
        """Abort the unfinished uploads whose key ``ours`` accepts; return their keys, sorted. A folder has none.

        A killed writer leaves them: their parts cost money, and no listing of objects shows them. Call it with the lock
        of the place held and before anything is written. Uploads of the last hour stay: copying tools hold no lock. A
        store that does not allow it, or does not answer, costs a warning.
        """
        ...

    def child(self, name: str) -> Storage:
        """Return the storage of a prefix or folder below this one."""
        ...
