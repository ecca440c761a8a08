"""S3 storage: objects under a prefix of a bucket."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from sharding.errors import UserError
from sharding.storage.base import BucketNotFoundError, Fill, NotFoundError, StorageUnavailableError, StoredObject
from sharding.storage.retries import Attempts, RetryCounter
from sharding.storage.s3.client import Bucket
from sharding.storage.s3.errors import RestartReadError, explained
from sharding.storage.s3.read import Body, BodyFill, read_range, read_whole
from sharding.storage.s3.write import Upload, opened

logger = logging.getLogger(__name__)

ABANDONED_S = 3600.0
"""Age in seconds, by the store's clock, from which an unfinished upload counts as a killed writer's."""


class S3Storage:
    """Storage of objects under a prefix of an S3 bucket."""

    request_bytes = 16 << 20

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix

    @property
    def uri(self) -> str:
        """URI ``s3://bucket/prefix``."""
        return f"s3://{self._bucket.name}/{self._prefix}" if self._prefix else f"s3://{self._bucket.name}"

    @property
    def retries(self) -> RetryCounter:
        """Retries by the opened storage and all its children."""
        return self._bucket.retries

    def __repr__(self) -> str:
        return f"S3Storage({self.uri!r})"

    def read(self, key: str) -> bytes:
        """Send GET."""
        with self._explained(key):
            return read_whole(self._bucket, self._key(key), self._where(key))

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Send GET with a Range header."""
        data = bytearray(max(length, 0))
        return bytes(memoryview(data)[: self.read_into(key, offset, memoryview(data))])

    def read_into(self, key: str, offset: int, buffer: memoryview) -> int:
        """Send GET with a Range header; read piece by piece into ``buffer``."""
        if not buffer:
            return 0
        with self._explained(key):
            return read_range(self._bucket, self._key(key), self._where(key), offset, buffer)

    @contextlib.contextmanager
    def open_range(self, key: str, offset: int, length: int) -> Iterator[Fill]:
        """Send GET with a Range header; read piece by piece into one buffer after the other."""
        body = Body(self._bucket, self._key(key), self._where(key), offset, offset + length)
        with contextlib.closing(BodyFill(body)) as fill_from_body:

            def fill(buffer: memoryview) -> int:
                with self._explained(key):
                    try:
                        return fill_from_body(buffer)
                    except RestartReadError:  # it was replaced: further bytes would belong to another object
                        return 0

            yield fill

    def stream(self, key: str) -> Iterator[bytes]:
        """Send GET; resume a body that ends early by a range request."""
        with self._explained(key):
            for piece in Body(self._bucket, self._key(key), self._where(key), 0, None).pieces():
                yield bytes(piece)

    def write(self, key: str, data: bytes) -> None:
        """Send PUT, in parallel parts for a large object; S3 publishes it at the end of the last request."""
        self._put(key, data)

    def upload(self, key: str, path: Path) -> None:
        """Send a file's content in the same way."""
        self._put(key, path)

    def create(self, key: str, content: bytes) -> bool:
        """Send one PUT with ``If-None-Match: *``.

        A HEAD is sent first: it avoids useless uploads, and it is the only check with a store that ignores the
        condition or does not support it (HTTP 501).
        """
        if self.exists(key):
            return False
        with self._explained(key):
            return self._upload(key).create(content)

    def check_writable(self) -> None:
        """Begin an upload in parts and abort it: a store allows it to those who may send PUT."""
        with self._explained(""):
            self._upload(".writable").attempt()

    def list(self, prefix: str = "") -> list[StoredObject]:
        """List all pages under the prefix."""
        base = self._base
        found = []
        for page in self._pages(prefix):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # markers that consoles make for empty folders
                    modified = item["LastModified"].timestamp() if "LastModified" in item else 0.0
                    found.append(StoredObject(item["Key"][len(base) :], item["Size"], modified))
        return sorted(found, key=lambda item: item.key)

    def folders(self) -> tuple[str, ...]:
        """List all pages, grouped by the store: the number of objects below the folders costs nothing."""
        pages = self._pages("", Delimiter="/")
        names = (item["Prefix"][len(self._base) : -1] for page in pages for item in page.get("CommonPrefixes", []))
        return tuple(sorted(name for name in names if name))

    def _pages(self, prefix: str, **request: str) -> Iterator[dict[str, Any]]:
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            page = self._call(prefix, "list_objects_v2", Prefix=self._base + prefix, **request)
            yield page
            request["ContinuationToken"] = page.get("NextContinuationToken", "")

    def exists(self, key: str) -> bool:
        """Send HEAD; return True if the object exists."""
        try:
            self._call(key, "head_object", Key=self._key(key))
        except BucketNotFoundError:
            raise
        except NotFoundError:
            return False
        return True

    def delete(self, key: str) -> None:
        """Send DELETE; S3 answers the same if the object does not exist."""
        self._call(key, "delete_object", Key=self._key(key))

    def abort_uploads(self, ours: Callable[[str], bool]) -> tuple[str, ...]:
        """List the uploads in parts under the prefix, and abort those that are ours."""
        aborted = []
        try:
            for key, upload in self._uploads():
                if ours(key):
                    with contextlib.suppress(NotFoundError):  # a retry of a request whose answer was lost
                        self._call(key, "abort_multipart_upload", Key=self._key(key), UploadId=upload)
                    aborted.append(key)
        except BucketNotFoundError:
            raise
        except (UserError, StorageUnavailableError) as error:
            logger.warning(
                "parts of killed uploads may remain below %s, and cost money: allow s3:ListBucketMultipartUploads and "
                "s3:AbortMultipartUpload, or give the bucket a lifecycle rule that removes them (%s)",
                self.uri,
                error,
            )
        return tuple(sorted(aborted))

    def _uploads(self) -> Iterator[tuple[str, str]]:
        """Yield key and identity of each unfinished upload that is old enough, of all pages."""
        page: dict[str, Any] = {"IsTruncated": True}
        markers: dict[str, str] = {}
        while page.get("IsTruncated"):
            page = self._call("", "list_multipart_uploads", Prefix=self._base, **markers)
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            for item in page.get("Uploads", []):
                if (now - item["Initiated"]).total_seconds() >= ABANDONED_S:
                    yield item["Key"][len(self._base) :], item["UploadId"]
            following = {
                "KeyMarker": page.get("NextKeyMarker", ""),
                "UploadIdMarker": page.get("NextUploadIdMarker", ""),
            }
            if not following["KeyMarker"] or following == markers:  # some servers leave it out, or repeat it
                break
            markers = following

    def child(self, name: str) -> S3Storage:
        """Return the storage of a longer prefix."""
        return S3Storage(self._bucket, self._key(name).rstrip("/"))

    def _put(self, key: str, source: bytes | Path) -> None:
        with opened(source) as content, self._explained(key):
            self._upload(key).put(content)

    def _upload(self, key: str) -> Upload:
        return Upload(self._bucket, self._key(key), self._where(key))

    def _call(self, key: str, operation: str, **request: Any) -> dict[str, Any]:
        with self._explained(key):
            return self._bucket.call(Attempts(self._where(key)), operation, **request)

    def _explained(self, key: str) -> AbstractContextManager[None]:
        return explained(self._where(key), self._bucket.name)

    @property
    def _base(self) -> str:
        return f"{self._prefix}/" if self._prefix else ""

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key
