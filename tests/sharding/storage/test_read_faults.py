"""Reads of S3 storage behind a proxy that cuts, stalls and damages what a real server says."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zlib
from collections.abc import Callable
from typing import cast

import pytest
from botocore.httpchecksum import Crc32Checksum, StreamingChecksumBody
from urllib3 import HTTPResponse

from sharding.storage import CorruptedError, Storage, StorageUnavailableError
from sharding.storage.retries import RetryCounter
from sharding.storage.s3 import client as s3_requests
from sharding.storage.s3.client import Bucket
from sharding.storage.s3.read import READS, read_range
from tests.faults import FaultProxy, Faults, Request
from tests.sharding.storage.conftest import DATA


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
