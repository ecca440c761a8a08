"""Uploads to S3, whole or not at all: in one request, or in parallel parts that the last request publishes."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from sharding.errors import UserError
from sharding.storage.retries import Attempts
from sharding.storage.s3.client import Bucket
from sharding.storage.s3.errors import code_of, status_of

MOST_PARTS = 10_000
"""Largest number of parts that S3 accepts."""
WRITER = "satfusion-writer"
"""User metadata of every object: a random number of its writer, by which the writer recognises its own object."""

_NOT_FOUND, _NOT_IMPLEMENTED = 404, 501

logger = logging.getLogger(__name__)


class Content(Protocol):
    """Content of an object to be stored."""

    size: int

    def part(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``. Called in several threads."""
        ...


class _Memory:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def part(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class _File:
    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self.size = os.fstat(descriptor).st_size

    def part(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if len(data) != length:
            raise UserError(f"{self._path} became shorter while it was stored: store it again when it is complete")
        return data


@contextlib.contextmanager
def opened(source: bytes | Path) -> Iterator[Content]:
    """Open bytes or a file for `Upload`.

    Raises:
        UserError: If the file cannot be read.
    """
    if isinstance(source, bytes):
        yield _Memory(source)
        return
    try:
        file = source.open("rb")
    except OSError as error:
        raise _unreadable(source, error) from error
    with file:
        yield _File(source, file.fileno())


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions")


class Upload:
    """Upload of one object."""

    def __init__(self, bucket: Bucket, key: str, where: str) -> None:
        """Prepare the upload; nothing is sent yet.

        Args:
            bucket: Bucket, with the options of its objects.
            key: Key in the bucket.
            where: URI of the object, for the log.
        """
        self._bucket, self._key, self._where = bucket, key, where
        self._writer = uuid.uuid4().hex
        self._wanted = {"Metadata": {WRITER: self._writer}, **bucket.options.request()}

    def put(self, content: Content) -> None:
        """Store the content; overwrite an older object."""
        if content.size <= self._bucket.options.part_size:
            body = content.part(0, content.size)
            self._bucket.call(Attempts(self._where), "put_object", Key=self._key, Body=body, **self._wanted)
            return
        upload = self._begin()
        try:
            self._complete(upload, self._send_parts(upload, content))
        except BaseException:
            self._abort(upload)
            raise

    def attempt(self) -> None:
        """Begin an upload in parts and abort it; no object appears."""
        self._abort(self._begin())

    def _begin(self) -> str:
        """Begin an upload in parts; return its identity."""
        checksum = {"ChecksumAlgorithm": "CRC32"} if self._bucket.sends_checksums else {}
        answer = self._bucket.call(
            Attempts(self._where), "create_multipart_upload", Key=self._key, **self._wanted, **checksum
        )
        return str(answer["UploadId"])

    def create(self, content: bytes) -> bool:
        """Store the content if the key does not exist; return True if this upload created the object."""
        from botocore.exceptions import ClientError  # slow to import, and folders need none

        condition = {"IfNoneMatch": "*"} if self._bucket.conditional else {}
        attempts = Attempts(self._where)
        try:
            self._bucket.call(attempts, "put_object", Key=self._key, Body=content, **self._wanted, **condition)
        except ClientError as error:
            if condition and status_of(error) == _NOT_IMPLEMENTED:
                self._bucket.conditional = False
                return self._writer_there() is None and self.create(content)
            if code_of(error) != "PreconditionFailed":
                raise
            # If the response of a successful earlier attempt was lost, the object is our own.
            return attempts.failures > 0 and self._writer_there() == self._writer
        return True

    def _send_parts(self, upload: str, content: Content) -> Sequence[dict[str, Any]]:
        size = max(self._bucket.options.part_size, -(-content.size // MOST_PARTS))
        stop = threading.Event()

        def send(offset: int) -> dict[str, Any]:
            number = offset // size + 1
            data = content.part(offset, min(size, content.size - offset))
            attempts = Attempts(f"{self._where}, part {number}", stop)
            try:
                answer = self._bucket.call(
                    attempts, "upload_part", Key=self._key, UploadId=upload, PartNumber=number, Body=data
                )
            except BaseException:
                stop.set()
                raise
            checksum = {name: answer[name] for name in ("ChecksumCRC32",) if name in answer}
            return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

        with ThreadPoolExecutor(self._bucket.options.concurrency, thread_name_prefix="s3-part") as pool:
            try:
                return list(pool.map(send, range(0, content.size, size)))
            finally:
                stop.set()  # also on Ctrl-C: ends the pauses of parts that wait for a retry

    def _complete(self, upload: str, parts: Sequence[dict[str, Any]]) -> None:
        """Send the request that joins the parts to one visible object."""
        from botocore.exceptions import ClientError  # slow to import, and folders need none

        attempts = Attempts(self._where)
        request = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        try:
            self._bucket.call(attempts, "complete_multipart_upload", Key=self._key, **request)
        except ClientError as error:
            # The response of a successful earlier attempt may have been lost.
            lost = attempts.failures > 0 and code_of(error) == "NoSuchUpload"
            if not lost or self._writer_there() != self._writer:
                raise

    def _writer_there(self) -> str | None:
        """Return the writer's number of the existing object, empty without one; None if the object does not exist."""
        from botocore.exceptions import ClientError  # slow to import, and folders need none

        try:
            head = self._bucket.call(Attempts(self._where), "head_object", Key=self._key)
        except ClientError as error:
            if status_of(error) == _NOT_FOUND:
                return None
            raise
        return str(head.get("Metadata", {}).get(WRITER, ""))

    def _abort(self, upload: str) -> None:
        """Delete the parts: their storage costs money, and no listing shows them."""
        from botocore.exceptions import BotoCoreError, ClientError  # slow to import, and folders need none

        try:
            self._bucket.send("abort_multipart_upload", Key=self._key, UploadId=upload)
        except (BotoCoreError, ClientError) as error:
            # The error that ended the upload is the one to report.
            logger.warning(
                "parts of a failed upload may remain at %s (%s): a lifecycle rule of the bucket can remove them",
                self._where,
                type(error).__name__,
            )
