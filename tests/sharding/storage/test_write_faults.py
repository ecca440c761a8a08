"""Writes to S3 storage behind a proxy that refuses them, loses answers, or ends them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local.objectstore import ObjectStore
from sharding.errors import UserError
from sharding.storage import Storage, StorageUnavailableError, open_storage, retries
from sharding.storage.options import MIB, StorageOptions
from sharding.storage.s3 import store
from tests.conftest import S3
from tests.faults import FaultProxy, Faults, Request
from tests.sharding.storage.conftest import DATA
from tests.uploads import HeldUploads, begin_upload, unfinished


def test_large_objects_go_in_parts_through_a_busy_store(
    proxy: FaultProxy, storage: Storage, s3: S3, tmp_path: Path
) -> None:
    path = tmp_path / "big"
    path.write_bytes(DATA * 21)
    proxy.faults = Faults(busy=0.2, reset=0.1, lose=0.1)
    storage.upload("big", path)
    storage.write("also", path.read_bytes())
    proxy.faults = Faults()
    assert {hashlib.sha256(storage.read(key)).digest() for key in ("big", "also")} == {
        hashlib.sha256(path.read_bytes()).digest()
    }
    sent = [request for request in proxy.seen("PUT", "partNumber=") if not request.fault]
    assert len(sent) == 10
    assert {"x-amz-checksum-crc32"} <= set(sent[0].headers)


@pytest.mark.parametrize("size", [1, 6])
def test_a_creation_whose_answer_is_lost_is_our_own(
    direct: Storage, proxy: FaultProxy, storage: Storage, size: int
) -> None:
    def lose_last(request: Request) -> Faults:
        publishes = "if-none-match" in request.headers
        return Faults(lose=1.0, times=1) if publishes else Faults()

    proxy.faults = lose_last
    assert storage.create("x", DATA * size)
    assert proxy.done("lose") == 1
    assert direct.read("x") == DATA * size


@pytest.mark.parametrize("size", [1, 6])
def test_a_creation_that_another_overtakes_is_theirs(
    direct: Storage, proxy: FaultProxy, storage: Storage, s3: S3, size: int
) -> None:
    def overtake(request: Request) -> Faults:
        if "if-none-match" in request.headers:
            direct.create("x", b"theirs")
            return Faults(busy=1.0, times=1)
        return Faults()

    proxy.faults = overtake
    assert not storage.create("x", DATA * size)
    assert direct.read("x") == b"theirs"
    assert not unfinished(s3, storage)
    assert not proxy.seen("POST")  # whatever its size, it is one request


def test_an_upload_whose_last_answer_is_lost_is_complete(proxy: FaultProxy, storage: Storage) -> None:
    proxy.faults = lambda request: (
        Faults(lose=1.0, times=1) if request.method == "POST" and "uploadId" in request.path else Faults()
    )
    storage.write("x", DATA * 6)
    assert proxy.done("lose") == 1
    assert storage.read("x") == DATA * 6


def test_an_upload_that_fails_leaves_no_parts(
    proxy: FaultProxy, storage: Storage, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "KNOWN_S", 0.3)
    proxy.faults = lambda request: Faults(busy=1.0) if "partNumber=2" in request.path else Faults()
    with pytest.raises(StorageUnavailableError, match=r"cannot serve s3://.*/x now \(SlowDown\)"):
        storage.write("x", DATA * 21)
    assert [item.fault for item in proxy.seen("PUT", "partNumber=1")] == [None]
    assert unfinished(s3, storage) == []
    assert storage.list() == []


def test_the_parts_of_a_killed_upload_are_found_and_removed(
    direct: Storage,
    proxy: FaultProxy,
    storage: Storage,
    s3: S3,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uploads = HeldUploads()
    proxy.faults = uploads
    code = (
        "import sys; from sharding.storage import open_storage; open_storage(sys.argv[1]).write('a/x', bytes(20 << 20))"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, direct.uri])
    try:
        assert uploads.held.wait(400)
    finally:
        writer.kill()
        writer.wait()
        uploads.released.set()
    assert direct.list() == []
    assert unfinished(s3, direct) == ["a/x"]
    assert direct.abort_uploads(lambda key: True) == ()  # it may be a live writer's
    monkeypatch.setattr(store, "ABANDONED_S", -60.0)  # as after an hour
    begin_upload(s3, direct, "a/y z")
    begin_upload(s3, open_storage(f"{direct.uri}-other"), "a/x")
    proxy.faults = lambda request: Faults(unknown=1.0) if "uploads" in request.path else Faults()
    assert storage.abort_uploads(lambda key: True) == ()
    assert "parts of killed uploads may remain" in caplog.text
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(retries, "KNOWN_S", 0.3)
        proxy.faults = lambda request: Faults(busy=1.0) if "uploads" in request.path else Faults()
        assert storage.abort_uploads(lambda key: True) == ()
    assert "parts of killed uploads may remain" in caplog.text
    proxy.requests.clear()
    proxy.faults = Faults(lose=1.0, times=2)  # the listing's answer, and the first removal's
    assert storage.abort_uploads(lambda key: key == "a/x") == ("a/x",)
    assert proxy.done("lose") == 2
    assert unfinished(s3, direct) == ["a/y z"]
    assert direct.child("a").abort_uploads(lambda key: key == "y z") == ("y z",)
    assert unfinished(s3, direct) == []
    assert unfinished(s3, open_storage(f"{direct.uri}-other")) == ["a/x"]


def test_who_lost_an_upload_is_told(
    direct: Storage, proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ABANDONED_S", -60.0)  # as after an hour

    def remove(request: Request) -> Faults:
        if "partNumber=2" in request.path:
            direct.abort_uploads(lambda key: True)
        return Faults()

    proxy.faults = remove
    with pytest.raises(UserError, match=r"the unfinished upload of s3://.*/x was removed by another command"):
        storage.write("x", DATA * 12)
    assert direct.list() == []


def test_a_store_without_conditional_writes_is_asked_first(
    proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.faults = lambda request: Faults(unknown=1.0) if "if-none-match" in request.headers else Faults()
    assert storage.create("x", DATA)
    assert not storage.create("x", b"another")
    assert storage.create("y", DATA * 6)
    assert proxy.done("unknown") == 1  # it is not asked again
    assert storage.read("x") == DATA
    assert storage.read("y") == DATA * 6


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A server that can encrypt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEED_S3_SSE_KEY", "a key of the test's")
        with ObjectStore(tmp_path_factory.mktemp("own"), bucket="own") as store:
            yield store


@pytest.fixture
def own(own_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own_store.environment.items():
        monkeypatch.setenv(name, value)
    return own_store


@pytest.mark.parametrize("size", [1, 6])
def test_encryption_and_storage_class_are_asked_for(
    own: ObjectStore, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    with FaultProxy(own.environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        options = StorageOptions(part_size=5 * MIB, sse="AES256", storage_class="STANDARD_IA")
        storage = open_storage(f"s3://own/{size}", options).child("folder")
        storage.write("x", DATA * size)
        assert storage.create("y", DATA * size)
        first = proxy.seen("PUT", "/x")[:1] if size == 1 else proxy.seen("POST", "/x?uploads")
        first += proxy.seen("PUT", "/y")[:1]
        assert len(first) == 2
        for request in first:
            assert request.headers["x-amz-server-side-encryption"] == "AES256"
            assert request.headers["x-amz-storage-class"] == "STANDARD_IA"
        assert storage.read("x") == storage.read("y") == DATA * size


def test_a_key_of_the_key_service_is_named(proxy: FaultProxy, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    # SeaweedFS has no key service, so it refuses what was asked for.
    monkeypatch.setattr(retries, "KNOWN_S", 0.3)
    key = "arn:aws:kms:eu-central-1:1:key/2"
    with pytest.raises(StorageUnavailableError, match="InternalError"):
        open_storage(s3.prefix(), StorageOptions(sse=f"aws:kms:{key}")).write("x", b"1")
    headers = proxy.seen("PUT")[0].headers
    assert headers["x-amz-server-side-encryption"] == "aws:kms"
    assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == key
