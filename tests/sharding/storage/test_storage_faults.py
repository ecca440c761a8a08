"""S3 storage behind a proxy that answers 503, resets, cuts, stalls and damages what a real server says."""

from __future__ import annotations

import logging
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.local.processes import free_ports
from sharding.storage import Storage, StorageUnavailableError, open_storage, retries
from sharding.storage.s3 import client as s3_requests
from tests.conftest import S3
from tests.faults import FaultProxy, Faults
from tests.sharding.storage.conftest import DATA, SMALL_PARTS


@pytest.mark.parametrize("fault", [{"busy": 0.3}, {"reset": 0.3}, {"busy": 0.2, "reset": 0.1, "lose": 0.1}])
def test_calls_outlive_busy_and_broken_answers(
    proxy: FaultProxy, storage: Storage, tmp_path: Path, fault: dict[str, float]
) -> None:
    proxy.faults = Faults(**fault)  # type: ignore[arg-type]
    path = tmp_path / "file"
    path.write_bytes(DATA)

    def work(number: int) -> None:
        folder = storage.child(str(number))
        folder.write("written", DATA[number:])
        folder.upload("uploaded", path)
        assert folder.create("created", DATA)
        assert not folder.create("created", b"another")
        assert folder.read("written") == DATA[number:]
        assert folder.read("created") == folder.read("uploaded") == DATA
        assert folder.read_range("uploaded", 1000, 5000) == DATA[1000:6000]
        assert b"".join(folder.stream("uploaded")) == DATA
        assert [item.key for item in folder.list()] == ["created", "uploaded", "written"]
        folder.delete("written")
        assert not folder.exists("written")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(6)))
    faults = sum(map(proxy.done, fault))
    assert faults > len(proxy.requests) * 0.2
    assert storage.retries.total == faults


def test_each_storage_counts_its_own_retries(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    """A child counts with the storage that it came of; a pickled copy, as another process gets, by itself."""
    other, folder = open_storage(storage.uri), open_storage(tmp_path)
    proxy.faults = Faults(busy=1.0, times=2)
    storage.child("a").write("x", DATA)
    proxy.faults = Faults()
    for reader in (other, folder):
        reader.write("y", DATA)
        assert reader.read("y") == DATA
    assert [counted.retries.total for counted in (storage, storage.child("b"), other, folder)] == [2, 2, 0, 0]
    assert pickle.loads(pickle.dumps(storage)).retries.total == 0  # noqa: S301
    assert pickle.loads(pickle.dumps(folder)).read("y") == DATA  # noqa: S301


def test_a_store_without_checksums_serves_too(
    proxy: FaultProxy, s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.setenv(name, "when_required")
    storage = open_storage(s3.prefix(), SMALL_PARTS)
    (tmp_path / "big").write_bytes(DATA * 6)
    proxy.faults = Faults(cut=0.5)
    storage.upload("big", tmp_path / "big")
    storage.write("small", DATA)
    assert storage.read("big") == DATA * 6
    assert storage.read("small") == DATA
    assert proxy.done("cut")
    names = {name for request in proxy.requests for name in request.headers}
    assert not [name for name in names if "checksum" in name]


def test_neither_endpoint_nor_keys_are_logged_or_shown(
    proxy: FaultProxy, s3: S3, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = [*(s3.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")), proxy.url, "127.0.0"]
    monkeypatch.setattr(retries, "QUIET_S", 0.0)
    monkeypatch.setattr(s3_requests, "READ_TIMEOUT_S", 0.3)
    caplog.set_level(logging.DEBUG, "sharding")
    told = []
    storage = open_storage(s3.prefix(), SMALL_PARTS)
    storage.write("x", DATA)
    for patience in ("KNOWN_S", "FIRST_CONTACT_S"):
        monkeypatch.setattr(retries, patience, 0.3)
    for kind in ("busy", "reset", "lose", "cut", "stall"):
        proxy.faults = Faults(**{kind: 1.0}, at=0)  # type: ignore[arg-type]
        with pytest.raises(StorageUnavailableError) as caught:
            storage.read("x")
        told.append(str(caught.value))
        assert caught.value.__suppress_context__  # a traceback would print the endpoint
    proxy.faults = lambda request: Faults(busy=1.0) if "uploadId" in request.path else Faults()
    with pytest.raises(StorageUnavailableError):
        storage.write("big", DATA * 6)
    assert "parts of a failed upload may remain" in caplog.text
    assert "SlowDown; attempt 2 follows in" in caplog.text
    for text in (caplog.text, *told, repr(storage), storage.uri):
        assert not [secret for secret in secrets if secret in text]


def test_a_store_that_is_away_for_a_while_is_waited_for(
    s3: S3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusals() -> int:
        return storage.retries.by_reason().get("EndpointConnectionError", 0)

    caplog.set_level(logging.INFO, "sharding")
    endpoint = s3.environment["AWS_ENDPOINT_URL"]
    (port,) = free_ports(1)
    with FaultProxy(endpoint, port=port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(s3.prefix())
        storage.write("x", DATA)
    before = refusals()
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(storage.read, "x"),
            pool.submit(storage.write, "y", DATA),
            pool.submit(storage.create, "z", DATA),
        ]
        while refusals() < before + 6:
            time.sleep(0.01)
        with FaultProxy(endpoint, port=port):
            assert [call.result() for call in calls] == [DATA, None, True]
            assert storage.read("y") == storage.read("z") == DATA
    assert "/x: EndpointConnectionError; attempt 2 follows in" in caplog.text
