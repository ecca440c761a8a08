"""Unfinished uploads in parts, as killed writers leave them on a real S3 server."""

from __future__ import annotations

import threading
from typing import Any

from sharding.storage import Storage
from tests.conftest import S3
from tests.faults import Faults, Request


def _client(s3: S3, storage: Storage) -> tuple[Any, str, str]:
    """Return a client of the server itself, the bucket of a storage, and the beginning of its keys."""
    import boto3  # slow to import

    bucket, _, prefix = storage.uri.removeprefix("s3://").partition("/")
    client = boto3.session.Session().client("s3", endpoint_url=s3.environment["AWS_ENDPOINT_URL"])
    return client, bucket, f"{prefix}/" if prefix else ""


def begin_upload(s3: S3, storage: Storage, key: str) -> None:
    """Begin an upload below a storage, and send one part of it."""
    client, bucket, prefix = _client(s3, storage)
    upload = client.create_multipart_upload(Bucket=bucket, Key=prefix + key)["UploadId"]
    client.upload_part(Bucket=bucket, Key=prefix + key, UploadId=upload, PartNumber=1, Body=b"part")


def unfinished(s3: S3, storage: Storage) -> list[str]:
    """Return the keys of uploads below a storage that are neither complete nor aborted."""
    client, bucket, prefix = _client(s3, storage)
    found = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
    return [item["Key"].removeprefix(prefix) for item in found]


class HeldUploads:
    """Faults of a proxy that let no upload in parts end before its writer is killed."""

    def __init__(self) -> None:
        self.held, self.released = threading.Event(), threading.Event()

    def __call__(self, request: Request) -> Faults:
        """Hold the request that would complete an upload, and drop it in the end: the server never sees it."""
        if request.method == "POST" and "uploadId" in request.path:
            self.held.set()
            self.released.wait()
            return Faults(reset=1.0)
        return Faults()
