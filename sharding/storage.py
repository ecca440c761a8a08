"""Whole objects by key, on a local folder or an S3 bucket, behind one small protocol.

Nothing else in the project knows boto3 or decides what a key becomes on disk. An object appears whole or not
at all. Neither the endpoint nor a credential stands in a message of this module: both may be secrets.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from sharding.errors import UserError

if TYPE_CHECKING:
    from botocore.client import BaseClient
    from botocore.exceptions import ClientError

# A dead endpoint must be reported within seconds: three attempts of 5 s and their pauses stay under 20 s. One that
# takes the connection and then says nothing, within about a minute.
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
ATTEMPTS = 3
# Files that are being written; a killed writer may leave one, so no listing shows them.
TEMPORARY_PREFIX = ".tmp-"

_KEY_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_DENIED_CODES = {"AccessDenied", "AllAccessDisabled", "403"}
_BUSY_STATUSES = {429, 500, 502, 503, 504}
_NO_KEY_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}


class NotFoundError(UserError):
    """The object does not exist."""


class BucketNotFoundError(NotFoundError):
    """The bucket itself does not exist, so no key in it can."""


class StorageUnavailableError(UserError):
    """The store does not answer, breaks off, or says that it is overloaded or broken (HTTP 429 or 5xx).

    The same call may work later, so a long run may wait and start again. Every other UserError of this module stays
    until somebody mends it: a wrong key, a denied or missing bucket, a missing object, a full or protected disk.
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

    Any call raises StorageUnavailableError where the store does not answer, and UserError for what the user must mend.
    """

    @property
    def uri(self) -> str:
        """The absolute folder or ``s3://`` URI that keys are relative to."""
        ...

    def read(self, key: str) -> bytes:
        """Return an object whole; NotFoundError where there is none."""
        ...

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the object ends before."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Store an object, whole or not at all, in place of an older one."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Store a local file's content as an object, whole or not at all."""
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


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """Open a local folder (made at the first write) or ``s3://bucket[/prefix]``.

    The S3 endpoint comes from ``AWS_ENDPOINT_URL`` and the credentials from boto3's standard chain. Nothing
    is sent until the first call.

    Raises:
        UserError: for an empty URI, another scheme, or no bucket.
    """
    text = os.fspath(uri)
    scheme, separator, rest = text.partition("://")
    if separator and scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if "@" in bucket or ":" in bucket:
            raise UserError(
                "an s3:// URI names only bucket and prefix: credentials and endpoint go into the environment"
            )
        if not bucket:
            raise UserError(f"{text!r} names no bucket: write s3://BUCKET/PREFIX")
        return S3Storage(bucket, prefix.strip("/"))
    if separator:
        raise UserError(f"cannot open {text!r}: a URI is a local path or starts with s3://")
    if not text:
        raise UserError("an empty URI names no place: give a local path or s3://BUCKET/PREFIX")
    return LocalStorage(Path(text).absolute())


class LocalStorage:
    """Objects as files under a folder."""

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

    def write(self, key: str, data: bytes) -> None:
        """Write beside the target, then rename."""
        with self._explained(key), self._replacing(key) as temporary:
            temporary.write_bytes(data)

    def upload(self, key: str, path: Path) -> None:
        """Copy beside the target, then rename."""
        with self._explained(key), self._replacing(key) as temporary:
            shutil.copyfile(path, temporary)

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Walk the folder that ``prefix`` lies in."""
        start = self._root / prefix.rpartition("/")[0]
        found = []
        with self._explained(prefix):
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
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts:
            raise UserError(f"{key!r} is no key of {self.uri}: keys are relative and never climb with '..'")
        return self._root.joinpath(*parts)

    @contextlib.contextmanager
    def _replacing(self, key: str) -> Iterator[Path]:
        target = self._path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            yield temporary
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

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


def _unless_gone(error: OSError) -> None:
    """Let a folder that cannot be read be an error; `os.walk` would take it for an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


class S3Storage:
    """Objects under a prefix of an S3 bucket."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._lock = threading.Lock()
        self._client: BaseClient | None = None
        self._client_pid = 0

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix``."""
        return f"s3://{self._bucket}/{self._prefix}" if self._prefix else f"s3://{self._bucket}"

    def __repr__(self) -> str:
        return f"S3Storage({self.uri!r})"

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str, str]]:
        return S3Storage, (self._bucket, self._prefix)

    def read(self, key: str) -> bytes:
        """GET the object."""
        return self._get(key, None)

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """GET with a Range header."""
        if length <= 0:
            return b""
        return self._get(key, f"bytes={offset}-{offset + length - 1}")

    def write(self, key: str, data: bytes) -> None:
        """PUT the object; S3 publishes it at the end of the request."""
        with self._explained(key):
            self._connect().put_object(Bucket=self._bucket, Key=self._key(key), Body=data)

    def upload(self, key: str, path: Path) -> None:
        """PUT a file, in parallel parts where it is large; S3 publishes it when the last part is in."""
        with self._explained(key), path.open("rb") as file:
            self._connect().upload_fileobj(file, self._bucket, self._key(key))

    def list(self, prefix: str = "") -> list[StoredObject]:
        """List all pages under the prefix."""
        base = f"{self._prefix}/" if self._prefix else ""
        found = []
        with self._explained(prefix):
            pages = self._connect().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=base + prefix):
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # markers that consoles make for empty folders
                        found.append(StoredObject(item["Key"][len(base) :], item["Size"]))
        return sorted(found, key=lambda item: item.key)

    def exists(self, key: str) -> bool:
        """HEAD the object."""
        try:
            with self._explained(key):
                self._connect().head_object(Bucket=self._bucket, Key=self._key(key))
        except BucketNotFoundError:
            raise
        except NotFoundError:
            return False
        return True

    def delete(self, key: str) -> None:
        """DELETE the object; S3 answers the same where there is none."""
        with self._explained(key):
            self._connect().delete_object(Bucket=self._bucket, Key=self._key(key))

    def child(self, name: str) -> S3Storage:
        """Return the storage of a longer prefix."""
        return S3Storage(self._bucket, self._key(name).rstrip("/"))

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _connect(self) -> BaseClient:
        """Return this process's client: sockets must not be shared with a forked child."""
        with self._lock:
            if self._client is None or self._client_pid != os.getpid():
                self._client, self._client_pid = _new_client(), os.getpid()
            return self._client

    def _get(self, key: str, byte_range: str | None) -> bytes:
        from botocore.exceptions import ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError

        request = {"Bucket": self._bucket, "Key": self._key(key)}
        if byte_range is not None:
            request["Range"] = byte_range
        with self._explained(key):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    body = self._connect().get_object(**request)["Body"]
                except ClientError as error:
                    if error.response["Error"]["Code"] == "InvalidRange":  # begins past the end: as a file reads
                        return b""
                    raise
                try:
                    data: bytes = body.read()
                    return data
                except (FlexibleChecksumError, HTTPClientError, IncompleteReadError):
                    if attempt == ATTEMPTS:  # botocore repeats requests, but not a body that breaks off
                        raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn botocore's errors into sentences. ``from None``: their text holds the endpoint."""
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except ClientError as error:
            raise self._refusal(where, error) from None
        except (BotoCoreError, ValueError) as error:
            raise _no_answer(where, error) from None

    def _refusal(self, where: str, error: ClientError) -> UserError:
        code = error.response["Error"]["Code"]
        if code == "RequestTimeout" or error.response["ResponseMetadata"]["HTTPStatusCode"] in _BUSY_STATUSES:
            return StorageUnavailableError(
                f"the S3 server cannot serve {where} now ({code}): try again later, or ask who runs it"
            )
        if code == "NoSuchBucket":
            return BucketNotFoundError(f"bucket {self._bucket!r} does not exist: create it, or correct the URI {where}")
        if code in {"NoSuchKey", "404"}:
            return NotFoundError(f"{where} does not exist")
        if code in _KEY_CODES:
            return UserError(
                f"the S3 server refused the access key for {where} ({code}): check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or the profile"
            )
        if code in _DENIED_CODES:
            return UserError(
                f"access to {where} is denied ({code}): check the access key, the bucket's name and policy"
            )
        return UserError(f"the S3 server refused {where} ({code}): check the URI and AWS_ENDPOINT_URL")


def _no_answer(where: str, error: Exception) -> UserError:
    """Explain a request that got no answer from S3."""
    from botocore.exceptions import ConnectionError as NotConnectedError
    from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

    name = type(error).__name__
    if isinstance(error, NotConnectedError | HTTPClientError | IncompleteReadError | FlexibleChecksumError):
        return StorageUnavailableError(
            f"the S3 endpoint does not answer for {where} ({name}): check that it runs, and that "
            "AWS_ENDPOINT_URL names it"
        )
    if name in _NO_KEY_ERRORS:
        return UserError(
            f"no complete S3 credentials for {where} ({name}): set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if name == "ParamValidationError":
        return UserError(f"{where} is no valid S3 URI: a bucket has 3 to 63 small letters, digits, dots and hyphens")
    if isinstance(error, ValueError):
        return UserError(f"cannot open {where}: AWS_ENDPOINT_URL is no valid http:// or https:// URL")
    return UserError(f"cannot open {where} ({name}): check the AWS_ variables and the AWS configuration file")


def _new_client() -> BaseClient:
    """Make an S3 client with short patience for a dead endpoint and room for parallel reads."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=32,
    )
    # A session of its own: boto3's default session is not safe to build clients from in several threads.
    client: BaseClient = boto3.session.Session().client("s3", config=config)
    return client
