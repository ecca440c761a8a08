"""Bodies of S3 objects: one that ends early is resumed by a range request from the byte it reached."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar, cast

from zlib_ng.zlib_ng import crc32

from sharding.errors import UserError
from sharding.storage import retries
from sharding.storage.base import PIECE, CorruptedError
from sharding.storage.retries import Attempts
from sharding.storage.s3.client import Bucket
from sharding.storage.s3.errors import RestartReadError, code_of

T = TypeVar("T")

# Reads of an object that is replaced or damaged each time; a silent store is retried for longer.
READS = 3
# A body that is read into its final buffer comes in few large pieces, which cost less Python time. A stall loses the
# bytes of its piece so far, so pieces after a failure are of PIECE.
LONG_PIECE = 1 << 20
_CORRUPTED = "{} does not match the store's checksum: write it again"


def read_whole(bucket: Bucket, key: str, where: str) -> bytes:
    """Return an object; all bytes belong to one version.

    Raises:
        CorruptedError: If it does not match the store's checksum at any read.
        RestartReadError: If it is replaced during each read.
    """

    def read() -> bytes:
        body = Body(bucket, key, where, 0, None)
        data = b"".join(body.pieces())
        body.check(data)
        return data

    return _until_whole(bucket, where, read)


def read_range(bucket: Bucket, key: str, where: str, start: int, buffer: memoryview) -> int:
    """Fill ``buffer`` with an object's bytes from ``start``, all of one version; return their number.

    Raises:
        CorruptedError, RestartReadError: As `read_whole`.
    """

    def read() -> int:
        body = Body(bucket, key, where, start, start + len(buffer))
        with contextlib.closing(BodyFill(body)) as fill:
            count = fill(buffer)
        body.check(buffer[:count])
        return count

    return _until_whole(bucket, where, read)


class BodyFill:
    """`Fill` of one buffer after the other from a body; it receives only as many bytes as the buffers hold."""

    def __init__(self, body: Body) -> None:
        """Start before the body's first byte; nothing is sent yet."""
        self._body = body
        self._room = memoryview(b"")
        self._pieces = body.pieces(lambda: self._room)

    def __call__(self, buffer: memoryview) -> int:
        """Fill ``buffer``; return the number of bytes, fewer at the end of the body.

        Raises:
            CorruptedError, RestartReadError: As `Body.pieces`; no further bytes arrive then.
        """
        self._room = buffer
        while (self._room or self._body.arrived) and (piece := next(self._pieces, None)) is not None:
            self._room = self._room[len(piece) :]
        return len(buffer) - len(self._room)

    def close(self) -> None:
        """Drop the rest of the body."""
        self._pieces.close()


def _until_whole(bucket: Bucket, where: str, read: Callable[[], T]) -> T:
    """Call ``read`` up to READS times, while the object is damaged on the way or replaced meanwhile."""
    attempts = Attempts(where)
    while True:
        try:
            return read()
        except (CorruptedError, RestartReadError) as error:
            if attempts.failures + 1 == READS:
                raise
            reason = type(error).__name__
            attempts.pause(error, reason, retries.KNOWN_S)
            bucket.retries.add(reason)


class Body:
    """Body of one read of an object."""

    def __init__(self, bucket: Bucket, key: str, where: str, start: int, stop: int | None) -> None:
        """Set the byte range from ``start`` to before ``stop`` (None: the object's end); nothing is sent yet."""
        self._bucket, self._key, self._where = bucket, key, where
        self._start, self._stop = start, stop
        self._position = start
        # From the first response: end of the body, ETag of the version, the store's checksum.
        self._end = stop
        self._etag: str | None = None
        self._crc32: str | None = None
        self._continued = False

    @property
    def arrived(self) -> bool:
        """True once its last byte has arrived."""
        return self._position == self._end

    def pieces(self, room: Callable[[], memoryview] | None = None) -> Generator[bytes | memoryview]:
        """Yield the bytes in pieces, as views of the buffer that ``room`` returns for the next ones.

        An empty buffer means that no further bytes are wanted, and that the body should end.

        Raises:
            CorruptedError: After the last piece, if the store's checksum differs. A resumed body is not compared: see
                ``check``.
            RestartReadError: If the pieces so far cannot be completed, because the object was replaced.
        """
        from botocore.exceptions import FlexibleChecksumError  # slow to import, and folders need none

        attempts = Attempts(self._where)
        longest = PIECE if room is None else LONG_PIECE
        while not self._continued or self._position != self._end:
            body = None
            try:
                body = self._open()
                while body is not None and (data := self._take(body, room, longest)):
                    self._position += len(data)
                    self._bucket.works()
                    yield data
                    attempts.progressed()  # its consumer may have been slow
                return
            except FlexibleChecksumError:
                raise CorruptedError(_CORRUPTED.format(self._where)) from None
            except Exception as error:
                self._bucket.pause(attempts, error)
                longest = PIECE
            finally:
                if body is not None:
                    body.close()
            self._continued = self._position > self._start

    def _take(self, body: Any, room: Callable[[], memoryview] | None, longest: int) -> bytes | memoryview:
        """Read the next piece; it is empty at the end."""
        if room is None:
            return cast(bytes, body.read(longest))
        into = room()[:longest]
        # At the end botocore compares length and checksum, but only if another read is requested.
        return into[: body.readinto(into)] if into else cast(bytes, body.read(1))[:0]

    def check(self, data: bytes | memoryview) -> None:
        """Compare a resumed body with the store's checksum: botocore compares only a body of one response.

        Raises:
            CorruptedError: If it differs.
        """
        if self._continued and self._crc32 and self._crc32 != base64.b64encode(crc32(data).to_bytes(4)).decode():
            raise CorruptedError(_CORRUPTED.format(self._where))

    def _open(self) -> Any:
        """Request the body from the current position; return None if the object ends before it."""
        from botocore.exceptions import ClientError  # slow to import, and folders need none

        request = {}
        if self._position > 0 or self._stop is not None:
            request["Range"] = f"bytes={self._position}-{'' if self._end is None else self._end - 1}"
        if self._continued:
            if self._etag is None:
                raise RestartReadError("breaks off, and the server sends no ETag by which to resume")
            request["IfMatch"] = self._etag
        try:
            answer = self._bucket.send("get_object", Key=self._key, **request)
        except ClientError as error:
            if code_of(error) == "PreconditionFailed":
                raise RestartReadError("was replaced while it was read") from None
            if code_of(error) == "InvalidRange" and not self._continued:  # starts past the end: empty, as for a file
                return None
            raise
        if "Range" in request and not answer.get("ContentRange", "").startswith(f"bytes {self._position}-"):
            answer["Body"].close()
            raise UserError(
                f"the S3 server answers a range of {self._where} with other bytes: it must support byte ranges"
            )
        if not self._continued:
            self._remember(answer)
        return answer["Body"]

    def _remember(self, answer: Mapping[str, Any]) -> None:
        length = answer.get("ContentLength")
        self._end = self._stop if length is None else self._start + int(length)
        self._etag = answer.get("ETag")
        checksum = answer.get("ChecksumCRC32", "")
        # No checksum of parts ("<checksum>-<parts>") or of ranges can be computed from the bytes.
        self._crc32 = checksum if "-" not in checksum and "ContentRange" not in answer else None
