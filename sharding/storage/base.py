"""The protocol of a storage and its errors, which both back ends raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sharding.errors import UserError
from sharding.storage.retries import RetryCounter

PIECE = 120 << 10
"""Bytes of a piece of `Storage.stream`, and of any body that failed before. What came of a piece that stalls is lost;
from 128 KiB up the C library asks the kernel for memory for each piece again."""


Fill = Callable[[memoryview], int]
"""Reads the bytes that come next into a buffer, and returns how many came: fewer only where the object ends.

The one type by which bytes reach memory, from a storage to a scene. Its maker retries and continues what breaks off, so
an error is final. Its caller compares the bytes with the index; only a `Fill` of `pipeline.data.sample_reader` has done
so already, and fills the buffer or raises.
"""


class NotFoundError(UserError):
    """The object does not exist."""


class BucketNotFoundError(NotFoundError):
    """The bucket itself does not exist, so no key in it can."""


class StorageUnavailableError(UserError):
    """The store does not answer, breaks off, or says that it is overloaded or broken (HTTP 429 or 5xx).

    The call was retried already (`sharding.storage.retries`), but may succeed later, so a long run may start again.
    Every other UserError of this module stays until the user repairs its cause: a wrong key, a denied or missing
    bucket, a missing object, a full or protected disk.
    """


class CorruptedError(UserError):
    """The bytes that are read are not those that were written, each time they are read; the message says why.

    They do not fit the store's own checksum, or not the dataset's index (`sharding.format.sample`).
    """


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing."""

    key: str
    """Its key relative to the storage's URI, with ``/`` between parts."""

    size: int
    """Its length in bytes."""


class Storage(Protocol):
    """Objects by key under one URI. Safe in threads, and to pickle: the copy opens its own connection.

    Any call raises StorageUnavailableError where the store does not answer, UserError for what the user must repair.
    """

    @property
    def uri(self) -> str:
        """The absolute folder or ``s3://`` URI that keys are relative to."""
        ...

    @property
    def retries(self) -> RetryCounter:
        """Retries of this process, by this storage and those that came of it by `child`."""
        ...

    request_bytes: int
    """Bytes that are worth reading by one request, neighbours of what is needed too; 0 where requests cost nothing."""

    def read(self, key: str) -> bytes:
        """Return an object whole; NotFoundError where there is none."""
        ...

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the object ends before."""
        ...

    def read_into(self, key: str, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; return how many bytes came, fewer where the object ends before."""
        ...

    def open_range(self, key: str, offset: int, length: int) -> AbstractContextManager[Fill]:
        """Open ``length`` > 0 bytes for a `Fill` that reads them into one buffer after the other, by one request.

        The request is sent when the first buffer is given. A checksum is compared only where the store sends one of the
        range. From S3 nothing more comes once the object was replaced, or after an error.
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

    def create(self, key: str, content: bytes) -> bool:
        """Store a new small object, whole or not at all; return False where there is one already.

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
