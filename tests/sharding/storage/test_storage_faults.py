"""S3 storage behind a proxy that answers 503, resets, cuts, stalls and damages what a real server says."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import pickle
import random
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
from botocore.httpchecksum import Crc32Checksum, StreamingChecksumBody
from urllib3 import HTTPResponse

from cluster.local.objectstore import ObjectStore
from cluster.local.processes import free_ports
from sharding.errors import UserError
from sharding.storage import CorruptedError, Storage, StorageUnavailableError, open_storage, retries
from sharding.storage.options import MIB, StorageOptions
from sharding.storage.retries import RetryCounter
from sharding.storage.s3 import client as s3_requests
from sharding.storage.s3 import store
from sharding.storage.s3.client import Bucket
from sharding.storage.s3.read import READS, read_range
from tests.conftest import S3
from tests.faults import FaultProxy, Faults, Request
from tests.uploads import HeldUploads, begin_upload, unfinished

DATA = random.Random(1).randbytes(1_000_000)
SMALL_PARTS = StorageOptions(part_size=5 * MIB)


@pytest.fixture
def direct(s3: S3) -> Storage:
    """The place of `storage`, past the proxy."""
    direct = open_storage(s3.prefix())
    direct.exists("x")  # it keeps the endpoint of its first request
    return direct


@pytest.fixture
def proxy(s3: S3, direct: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy without faults yet, which the environment names."""
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"], seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        # The patience is the real one, but in tests that see its end.
        monkeypatch.setattr(retries, "LONGEST_PAUSE_S", 0.2)
        yield proxy


@pytest.fixture
def storage(direct: Storage, proxy: FaultProxy) -> Storage:
    return open_storage(direct.uri, SMALL_PARTS)


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


@pytest.mark.parametrize("align", [1, 512])
@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_a_body_that_breaks_off_is_continued(
    proxy: FaultProxy, storage: Storage, kind: str, align: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "stall":
        monkeypatch.setattr(s3_requests, "READ_TIMEOUT_S", 0.3)
    storage.write("x", DATA)
    proxy.faults = Faults(**{kind: 1.0}, align=align, times=3)  # type: ignore[arg-type]
    for first, start, stop, read in (
        (None, 0, 1_000_000, lambda: storage.read("x")),
        (None, 0, 1_000_000, lambda: b"".join(storage.stream("x"))),
        ("bytes=100000-599999", 100_000, 600_000, lambda: storage.read_range("x", 100_000, 500_000)),
        ("bytes=100000-599999", 100_000, 600_000, lambda: read_in_turn(storage, 100_000, [7, 299_993, 200_000])),
    ):
        proxy.requests.clear()
        assert read() == DATA[start:stop]
        asked = [item.headers.get("range") for item in proxy.requests]
        assert proxy.done(kind) == 3
        assert len(asked) >= 4  # more where a slow machine lets a true answer time out too
        assert asked[0] == first
        begins = [start if item == first else begin(item, stop) for item in asked]
        assert begins == sorted(begins)
        assert begins[-1] > start


def read_in_turn(storage: Storage, offset: int, lengths: list[int]) -> bytes:
    """Return stretches of ``x``, one after the other, that one request asked for; each in a buffer of its own."""
    buffers = [memoryview(bytearray(length)) for length in lengths]
    with storage.open_range("x", offset, sum(lengths)) as read:
        counts = list(map(read, buffers))
    return b"".join(buffer[:count] for buffer, count in zip(buffers, counts, strict=True))


def begin(asked: str | None, stop: int) -> int:
    """Return the first byte of a range that must end at ``stop``."""
    assert asked
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
    assert match
    assert int(match[2]) == stop - 1
    return int(match[1])


def test_a_body_that_always_stalls_early_goes_on_in_short_pieces(
    proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a long piece is complete, of which nothing is then kept."""

    def stall(request: Request) -> Faults:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["range"])
        assert asked
        return Faults(stall=float(int(asked[2]) - int(asked[1]) >= 300_000), at=300_000)

    monkeypatch.setattr(s3_requests, "READ_TIMEOUT_S", 0.5)
    storage.write("x", DATA)
    proxy.faults = stall
    buffer = memoryview(bytearray(len(DATA)))
    assert storage.read_into("x", 0, buffer) == len(buffer)
    assert buffer == DATA
    assert proxy.done("stall") >= 3


def test_a_continuation_begins_at_the_byte_that_was_reached(proxy: FaultProxy, storage: Storage) -> None:
    storage.write("x", DATA)
    proxy.requests.clear()
    proxy.faults = Faults(cut=1.0, at=300_123, times=1)
    assert storage.read("x") == DATA
    assert [item.headers.get("range") for item in proxy.requests] == [None, "bytes=300123-999999"]
    assert proxy.requests[1].headers["if-match"] == f'"{hashlib.md5(DATA).hexdigest()}"'
    assert storage.retries.by_reason() == {"IncompleteReadError": 1}


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


def test_a_listing_that_is_cut_is_asked_for_again(proxy: FaultProxy, storage: Storage) -> None:
    storage.write("x", DATA)
    proxy.requests.clear()
    proxy.faults = Faults(cut=1.0, times=3)
    assert [item.size for item in storage.list()] == [len(DATA)]
    assert proxy.done("cut") == 3


def test_pieces_of_two_versions_are_not_put_together(direct: Storage, proxy: FaultProxy, storage: Storage) -> None:
    newer = DATA[::-1]

    def replaced(request: Request) -> Faults:
        """Replace the object between the answer that is cut and its continuation."""
        if "if-match" in request.headers:
            direct.write("x", newer)
            return Faults()
        return Faults(cut=1.0, at=500_000, times=1)

    for read in (storage.read, lambda key: b"".join(storage.stream(key))):
        direct.write("x", DATA)
        proxy.requests.clear()
        proxy.faults = replaced
        if read == storage.read:
            assert read("x") == newer
        else:
            with pytest.raises(StorageUnavailableError, match="/x was replaced while it was read: try again"):
                read("x")
    direct.write("x", DATA)
    proxy.requests.clear()
    assert read_in_turn(storage, 0, [400_000] * 2) == DATA[:400_000]


@pytest.mark.parametrize("read", [lambda s: s.read("x"), lambda s: b"".join(s.stream("x"))], ids=["read", "stream"])
def test_a_damaged_body_is_found_by_the_store_s_checksum(
    proxy: FaultProxy, storage: Storage, read: Callable[[Storage], bytes]
) -> None:
    storage.write("x", DATA)
    proxy.faults = Faults(flip=1.0)
    with pytest.raises(CorruptedError, match="/x does not match the store's checksum"):
        read(storage)


class Answers:
    """A bucket that answers a range with its checksum, as some stores do."""

    def __init__(self, *bodies: bytes) -> None:
        self.bodies = list(bodies)
        self.retries = RetryCounter()

    def send(self, operation: str, **request: str) -> dict[str, object]:
        raw = HTTPResponse(io.BytesIO(self.bodies.pop(0)), preload_content=False)
        checksum = base64.b64encode(zlib.crc32(DATA).to_bytes(4)).decode()
        body = StreamingChecksumBody(raw, str(len(DATA)), Crc32Checksum(), checksum)
        return {"Body": body, "ContentRange": request["Range"].replace("=", " ") + "/*", "ContentLength": len(DATA)}

    def works(self) -> None:
        """There is no outage to end."""


def test_a_range_that_arrives_with_its_checksum_is_compared() -> None:
    damaged = bytes([DATA[0] ^ 1]) + DATA[1:]
    buffer = memoryview(bytearray(len(DATA)))
    bucket = Answers(damaged, DATA)
    assert read_range(cast(Bucket, bucket), "x", "x", 0, buffer) == len(DATA)
    assert buffer == DATA
    assert bucket.bodies == []
    assert bucket.retries.by_reason() == {"CorruptedError": 1}
    with pytest.raises(CorruptedError, match="x does not match the store's checksum"):
        read_range(cast(Bucket, Answers(*[damaged] * READS)), "x", "x", 0, buffer)


def test_a_body_that_is_damaged_on_its_way_is_read_again(proxy: FaultProxy, storage: Storage) -> None:
    storage.write("x", DATA)
    proxy.requests.clear()
    proxy.faults = Faults(flip=1.0, times=READS - 1)
    assert storage.read("x") == DATA
    assert proxy.done("flip") == READS - 1


def test_damage_in_a_continuation_is_found_too(proxy: FaultProxy, storage: Storage) -> None:
    storage.write("x", DATA)
    proxy.requests.clear()
    proxy.faults = lambda request: Faults(flip=1.0) if "range" in request.headers else Faults(cut=1.0, at=300_000)
    with pytest.raises(CorruptedError, match="/x does not match the store's checksum"):
        storage.read("x")
    assert proxy.done("flip") == READS


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
