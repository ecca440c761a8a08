"""Requests to one bucket, retried after transient failures.

Nothing else in the project makes an S3 client. botocore sends each request once: its own retries are limited by number
and by a quota that all threads share, and do not cover a body that ends early.
"""

from __future__ import annotations

import logging
import os
import threading
import urllib.parse
from typing import TYPE_CHECKING, Any

from sharding.errors import UserError
from sharding.storage import retries
from sharding.storage.names import refuse_secret
from sharding.storage.options import StorageOptions
from sharding.storage.retries import Attempts, Outages, RetryCounter
from sharding.storage.s3.errors import passing_reason

if TYPE_CHECKING:
    from botocore.client import BaseClient
    from botocore.model import OperationModel

CONNECT_TIMEOUT_S = 5.0
# Longest silence on a connection, before a response or within a body.
READ_TIMEOUT_S = 20.0
POOL_SIZE = 32
_YES, _NO = {"YES", "TRUE", "ON", "1"}, {"", "NO", "FALSE", "OFF", "0"}

_answered: set[str] = set()
"""Endpoints that answered this process, even with an error, and have not timed out since."""
_outages = Outages()
_warned: set[str] = set()
"""Endpoints with a path that were logged."""
logger = logging.getLogger(__name__)


class Bucket:
    """Bucket with this process's client for it. Safe in threads, and to pickle: the copy makes its own client."""

    def __init__(self, name: str, options: StorageOptions) -> None:
        self.name = name
        self.options = options
        self.conditional = True
        """True until the store reports that it does not support conditional writes."""
        self.retries = RetryCounter()
        """Retries of this process's requests by this client."""
        self._lock = threading.Lock()
        self._client: BaseClient | None = None
        self._client_pid = 0

    def __reduce__(self) -> tuple[type[Bucket], tuple[str, StorageOptions]]:
        return Bucket, (self.name, self.options)

    @property
    def sends_checksums(self) -> bool:
        """True if requests carry checksums: unless ``AWS_REQUEST_CHECKSUM_CALCULATION`` says ``when_required``."""
        return bool(self._connect().meta.config.request_checksum_calculation == "when_supported")

    def send(self, operation: str, **request: Any) -> dict[str, Any]:
        """Send a request once; botocore's errors are not converted."""
        from botocore.exceptions import ClientError  # slow to import, and folders need none

        client = self._connect()
        try:
            answer: dict[str, Any] = getattr(client, operation)(Bucket=self.name, **request)
        except ClientError as error:
            _answered.add(client.meta.endpoint_url)
            if passing_reason(error) is None:
                self.works()
            raise
        _answered.add(client.meta.endpoint_url)
        if operation != "get_object":  # its body must arrive too
            self.works()
        return answer

    def works(self) -> None:
        """Note that the store serves requests."""
        _outages.ended(self._connect().meta.endpoint_url)

    def call(self, attempts: Attempts, operation: str, **request: Any) -> dict[str, Any]:
        """Send a request, with retries; raise botocore's error when they end."""
        while True:
            try:
                return self.send(operation, **request)
            except Exception as error:
                self.pause(attempts, error)

    def pause(self, attempts: Attempts, error: Exception) -> None:
        """Wait before another attempt, or raise ``error`` if it is not transient or the time limit has passed."""
        reason = passing_reason(error)
        if reason is None:
            raise error
        endpoint = self._connect().meta.endpoint_url
        patience_s = retries.KNOWN_S if endpoint in _answered else retries.FIRST_CONTACT_S
        try:
            # Threads that fail at different times, and calls that follow, wait for the same outage.
            attempts.pause(error, reason, patience_s, since=_outages.failed(endpoint))
        except Exception:
            # Later requests and other threads must not each wait as long again.
            _answered.discard(endpoint)
            raise
        self.retries.add(reason)

    @property
    def hint(self) -> str:
        """End of a message about a refusal: what is unusual in how this process asks; empty if nothing is."""
        if _switch("AWS_NO_SIGN_REQUEST"):
            return "; AWS_NO_SIGN_REQUEST is set, so requests carry no key, and only public buckets answer them"
        if os.environ.get("AWS_SESSION_TOKEN"):
            return (
                "; AWS_SESSION_TOKEN must be the key's own and not expired: get new keys, or unset it for a lasting key"
            )
        return "" if _pays() else "; a requester-pays bucket needs AWS_REQUEST_PAYER=requester"

    def _connect(self) -> BaseClient:
        """Return this process's client; make it in a forked child, which must not share sockets."""
        with self._lock:
            if self._client is None or self._client_pid != os.getpid():
                self._client, self._client_pid = _new_client(self.name, self.options.concurrency), os.getpid()
            return self._client


def _new_client(bucket: str, concurrency: int) -> BaseClient:
    """Make an S3 client with short timeouts and enough connections for parallel requests."""
    import boto3  # slow to import, and folders need none
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=max(POOL_SIZE, concurrency),
        signature_version=UNSIGNED if _switch("AWS_NO_SIGN_REQUEST") else None,
    )
    pays = _pays()
    # A session of its own: boto3's default session is not safe to build clients from in several threads.
    client: BaseClient = boto3.session.Session().client("s3", config=config)
    _check_endpoint(client.meta.endpoint_url, bucket)
    if pays:
        client.meta.events.register("provide-client-params.s3", _pay)
    return client


def _check_endpoint(url: str, bucket: str) -> None:
    """Refuse an endpoint with a secret or with the bucket in its path; log one with another path. It is not repeated.

    Raises:
        UserError: For such an endpoint.
    """
    where = "the S3 endpoint (AWS_ENDPOINT_URL, or endpoint_url of the profile)"
    refuse_secret(where, url)
    parts = urllib.parse.urlsplit(url).path.strip("/").split("/")
    if bucket in parts:
        raise UserError(
            f"{where} has a path that holds the bucket {bucket!r}, which the server would take for a key's beginning: "
            "give http(s)://HOST:PORT alone, and the bucket in the URI"
        )
    if parts != [""] and url not in _warned:
        _warned.add(url)
        logger.warning("%s has a path, which few servers expect; without it, it is http(s)://HOST:PORT", where)


def _pay(params: dict[str, Any], model: OperationModel, **context: object) -> dict[str, Any]:
    """Add to a request that the requester pays, where S3's model of the operation has that."""
    takes = "RequestPayer" in model.input_shape.members
    return {**params, "RequestPayer": "requester"} if takes else params


def _switch(name: str) -> bool:
    """Return whether a variable is YES, as GDAL and rasterio read it.

    Raises:
        UserError: For a value that is neither yes nor no.
    """
    value = os.environ.get(name, "").strip().upper()
    if value not in {*_YES, *_NO}:
        raise UserError(f"{name} is {value!r}, which is neither yes nor no: set it to YES or NO")
    return value in _YES


def _pays() -> bool:
    value = os.environ.get("AWS_REQUEST_PAYER", "").strip()
    if value.lower() not in {"", "requester"}:
        raise UserError(f"AWS_REQUEST_PAYER is {value!r}: set it to requester, or unset it")
    return bool(value)
