"""Storage of whole objects by key, in a local folder or an S3 bucket, behind one small protocol.

Any package may import it; of ours it imports only the ground that it shares with the rest of `sharding`: errors, names,
schema, arguments. `open_storage` turns a URI into a `Storage` (`base`), which is a folder (`local`) or a bucket (`s3`).
Nothing else in the project maps a key to a path or an S3 key. An object appears whole or not at all.
"""

from __future__ import annotations

import os

from sharding.errors import UserError
from sharding.names import check_uri, expanded, is_file_uri
from sharding.storage.base import (
    BucketNotFoundError,
    CorruptedError,
    Fill,
    NotFoundError,
    Storage,
    StorageUnavailableError,
    StoredObject,
)
from sharding.storage.local import LocalStorage
from sharding.storage.options import StorageOptions
from sharding.storage.s3.client import Bucket
from sharding.storage.s3.store import S3Storage

__all__ = [
    "BucketNotFoundError",
    "CorruptedError",
    "Fill",
    "LocalStorage",
    "NotFoundError",
    "Storage",
    "StorageOptions",
    "StorageUnavailableError",
    "StoredObject",
    "open_storage",
]


def open_storage(
    uri: str | os.PathLike[str], options: StorageOptions | None = None, wait_seconds: float | None = None
) -> Storage:
    """Open a local folder (created at the first write; ``~`` is the home folder) or ``s3://bucket[/prefix]``.

    ``file:///FOLDER`` is a local folder too. The S3 endpoint comes from ``AWS_ENDPOINT_URL`` and the credentials from
    boto3's standard chain; with ``AWS_NO_SIGN_REQUEST=YES`` requests carry none, and with
    ``AWS_REQUEST_PAYER=requester`` the requester pays. Nothing is sent until the first call.

    Args:
        uri: Folder or S3 URI.
        options: Options of objects written to S3; a folder ignores part size and concurrency.
        wait_seconds: Time that a request waits for an S3 store that is away and has answered this process before,
            seconds; None waits two minutes.

    Raises:
        UserError: For an empty URI, one with a secret, another scheme, no bucket, or encryption or a storage class on
            a local folder.
    """
    options = options or StorageOptions()
    text = os.fspath(uri)
    check_uri("the URI", text)
    scheme, separator, rest = text.partition("://")
    if separator and scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UserError(f"{text!r} names no bucket: write s3://BUCKET/PREFIX")
        return S3Storage(Bucket(bucket, options, wait_seconds), prefix.strip("/"))
    if separator and not is_file_uri(text):
        raise UserError(f"cannot open {text!r}: a URI is a local path or starts with s3:// or file:///")
    if not text:
        raise UserError("an empty URI names no place: give a local path or s3://BUCKET/PREFIX")
    for option, value in (("--sse", options.sse), ("--storage-class", options.storage_class)):
        if value is not None:
            raise UserError(f"{option} {value} is for s3:// only, and {text} is a folder: drop it")
    return LocalStorage(expanded(text).absolute())
