"""Fixtures that every package's tests share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import pytest

from cluster.objectstore import ObjectStore


class S3:
    """A running S3 server whose endpoint and keys stand in the environment."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._numbers = itertools.count()

    @property
    def environment(self) -> Mapping[str, str]:
        """Endpoint, keys and region, for a process that is given an environment of its own."""
        return self.store.environment

    def bucket(self) -> str:
        """Make an empty bucket and return its URI, ``s3://test-<n>``."""
        name = f"test-{next(self._numbers)}"
        self.store.create_bucket(name)
        return f"s3://{name}"

    def prefix(self) -> str:
        """Return the URI of a fresh prefix in a shared bucket, ``s3://shared/<n>`` (cheaper)."""
        return f"s3://shared/{next(self._numbers)}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with (
        ObjectStore(tmp_path_factory.mktemp("s3"), bucket="shared") as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        # A profile or token of the developer's own would win over, or be sent along with, the server's keys.
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield S3(store)
