"""A place of a real S3 server, past a proxy that makes faults and through it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from sharding.storage import Storage, open_storage
from sharding.storage.options import MIB, StorageOptions
from tests.conftest import S3
from tests.faults import FaultProxy, proxy_before

DATA = random.Random(1).randbytes(1_000_000)
"""Content of an object."""
SMALL_PARTS = StorageOptions(part_size=5 * MIB)
"""Options with the smallest parts that S3 takes."""


@pytest.fixture
def direct(s3: S3) -> Storage:
    """The place of `storage`, past the proxy."""
    direct = open_storage(s3.prefix())
    direct.exists("x")  # it keeps the endpoint of its first request
    return direct


@pytest.fixture
def proxy(s3: S3, direct: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy without faults yet, which the environment names."""
    with proxy_before(s3.environment, monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def storage(direct: Storage, proxy: FaultProxy) -> Storage:
    return open_storage(direct.uri, SMALL_PARTS)
