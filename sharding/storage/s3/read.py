"""Bodies of S3 objects, whole: one that breaks off is continued by a ranged request from the byte it reached."""

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

# An object that is replaced or damaged each time it is read is not waited for as a silent store is.
READS = 3
# Where a body is read to where it stays, fewer pieces cost less Python. A stall loses what came of its piece, so those
# after a failure are of PIECE.
LONG_PIECE = 1 << 20
_CORRUPTED = "{} does not match the checksum that the store has of it: write it again"


def read_whole(bucket: Bucket, key: str, where: str) -> bytes:
    """Return an object, all of one version.

    Raises:
        CorruptedError: it does not match the store's checksum, each time it is read.
        RestartReadError: it is replaced each time while it is read.
    """

    def read() -> bytes:
        body = Body(bucket, key, where, 0, None)
        data = b"".join(body.pieces())
        body.check(data)
        return data

    return _until_whole(bucket, where, read)


def read_range(bucket: Bucket, key: str, where: str, start: int, buffer: memoryview) -> int:
    """Fill ``buffer`` with an object's bytes from ``start`` on, all of one version; return how many there were.

    Raises:
        CorruptedError, RestartReadError: as `read_whole`.
    """

    def read() -> int:
        body = Body(bucket, key, where, start, start + len(buffer))
        with contextlib.closing(BodyFill(body)) as fill:
            count = fill(buffer)
        body.check(buffer[:count])
        return count

    return _until_whole(bucket, where, read)


class BodyFill:
    """A `Fill` of one buffer after the other with a body, of which no more arrives than has room."""

    def __init__(self, body: Body) -> None:
        """Begin before the body's first byte; nothing is sent yet."""
        self._body = body
        self._room = memoryview(b"")
        self._pieces = body.pieces(lambda: self._room)

    def __call__(self, buffer: memoryview) -> int:
        """Fill ``buffer``; return how many bytes came, fewer where the body ends before.

        Raises:
            CorruptedError, RestartReadError: as `Body.pieces`; nothing more comes then.
        """
        self._room = buffer
        while (self._room or self._body.arrived) and (piece := next(self._pieces, None)) is not None:
            self._room = self._room[len(piece) :]
        return len(buffer) - len(self._room)

    def close(self) -> None:
        """Drop what did not arrive yet."""
        self._pieces.close()


def _until_whole(bucket: Bucket, where: str, read: Callable[[], T]) -> T:
    """Read again what is damaged on the way or replaced meanwhile, a few times."""
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
    """One read of an object."""

    def __init__(self, bucket: Bucket, key: str, where: str, start: int, stop: int | None) -> None:
        """Name the bytes from ``start`` to before ``stop`` (None: the object's end); nothing is sent yet."""
        self._bucket, self._key, self._where = bucket, key, where
        self._start, self._stop = start, stop
        self._position = start
        # What the first answer says: where it ends, which version it is of, the store's checksum of it.
        self._end = stop
        self._etag: str | None = None
        self._crc32: str | None = None
        self._continued = False

    @property
    def arrived(self) -> bool:
        """Whether its last byte has."""
        return self._position == self._end

    def pieces(self, room: Callable[[], memoryview] | None = None) -> Generator[bytes | memoryview]:
        """Yield the bytes in pieces, views of where ``room`` says that the next ones go.

        No room means that nothing more is wanted, and that nothing more should come.

        Raises:
            CorruptedError: after the last piece, when the store's checksum is another. A body that was continued is
                not compared: see ``check``.
            RestartReadError: the pieces so far cannot be completed, because the object was replaced.
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
        """Return the next piece; an empty one at the end."""
        if room is None:
            return cast(bytes, body.read(longest))
        into = room()[:longest]
        # At the end botocore compares length and checksum, which it does only with who asks for more.
        return into[: body.readinto(into)] if into else cast(bytes, body.read(1))[:0]

    def check(self, data: bytes | memoryview) -> None:
        """Compare a continued body with the store's checksum: botocore does so only with one that came in one answer.

        Raises:
            CorruptedError: it is another.
        """
        if self._continued and self._crc32 and self._crc32 != base64.b64encode(crc32(data).to_bytes(4)).decode():
            raise CorruptedError(_CORRUPTED.format(self._where))

    def _open(self) -> Any:
        """Return the body from the present position; None where the object ends before it."""
        from botocore.exceptions import ClientError  # slow to import, and folders need none

        request = {}
        if self._position > 0 or self._stop is not None:
            request["Range"] = f"bytes={self._position}-{'' if self._end is None else self._end - 1}"
        if self._continued:
            if self._etag is None:
                raise RestartReadError("breaks off, and the server names no version by which to continue")
            request["IfMatch"] = self._etag
        try:
            answer = self._bucket.send("get_object", Key=self._key, **request)
        except ClientError as error:
            if code_of(error) == "PreconditionFailed":
                raise RestartReadError("was replaced while it was read") from None
            if code_of(error) == "InvalidRange" and not self._continued:  # begins past the end: as a file reads
                return None
            raise
        if "Range" in request and not answer.get("ContentRange", "").startswith(f"bytes {self._position}-"):
            answer["Body"].close()
            raise UserError(f"the S3 server answers a range of {self._where} with other bytes: it must know ranges")
        if not self._continued:
            self._remember(answer)
        return answer["Body"]

    def _remember(self, answer: Mapping[str, Any]) -> None:
        length = answer.get("ContentLength")
        self._end = self._stop if length is None else self._start + int(length)
        self._etag = answer.get("ETag")
        checksum = answer.get("ChecksumCRC32", "")
        # Of parts, "<checksum>-<parts>", and of ranges nothing can be computed from the bytes.
        self._crc32 = checksum if "-" not in checksum and "ContentRange" not in answer else None
