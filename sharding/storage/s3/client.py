"""Requests to one bucket, retried after transient failures.

Nothing else in the project makes an S3 client. botocore sends each request once: its own retries are limited by number
and by a quota that all threads share, and do not cover a body that ends early.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from sharding.storage import retries
from sharding.storage.options import StorageOptions
from sharding.storage.retries import Attempts, Outages, RetryCounter
from sharding.storage.s3 import access
from sharding.storage.s3.errors import passing_reason

if TYPE_CHECKING:
    from botocore.client import BaseClient

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
# Longest silence on a connection, before a response or within a body.
READ_TIMEOUT_S = 20.0
POOL_SIZE = 32

_answered: set[str] = set()
"""Endpoints that answered this process, even with an error, and have not timed out since."""
_outages = Outages()


class Bucket:
    """Bucket with this process's client for it. Safe in threads, and to pickle: the copy makes its own client."""

    def __init__(self, name: str, options: StorageOptions, wait_seconds: float | None = None) -> None:
        self.name = name
        self.options = options
        self.wait_seconds = wait_seconds
        """Seconds that a store which has answered is waited for; None waits `retries.KNOWN_S`."""
        self.conditional = True
        """True until the store reports that it does not support conditional writes."""
        self.retries = RetryCounter()
        """Retries of this process's requests by this client."""
        self._lock = threading.Lock()
        self._client: BaseClient | None = None
        self._client_pid = 0

    def __reduce__(self) -> tuple[type[Bucket], tuple[str, StorageOptions, float | None]]:
        return Bucket, (self.name, self.options, self.wait_seconds)

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
        seconds = _outages.ended(self._connect().meta.endpoint_url)
        if seconds and seconds >= retries.QUIET_S:
            logger.warning("the store of s3://%s answers again, after %.0f s", self.name, seconds)

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
        known_s = retries.KNOWN_S if self.wait_seconds is None else self.wait_seconds
        patience_s = known_s if endpoint in _answered else retries.FIRST_CONTACT_S
        try:
            # Threads that fail at different times, and calls that follow, wait for the same outage.
            attempts.pause(error, reason, patience_s, since=_outages.failed(endpoint))
        except Exception:
            # Later requests and other threads must not each wait as long again.
            _answered.discard(endpoint)
            raise
        self.retries.add(reason)

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

    charged = access.is_requester_charged()  # refuses other values before anything is sent
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=max(POOL_SIZE, concurrency),
        signature_version=UNSIGNED if access.is_unsigned() else None,
    )
    # A session of its own: boto3's default session is not safe to build clients from in several threads.
    client: BaseClient = boto3.session.Session().client("s3", config=config)
    access.check_endpoint(client.meta.endpoint_url, bucket)
    if charged:
        client.meta.events.register("provide-client-params.s3", access.charge_requester)
    return client
