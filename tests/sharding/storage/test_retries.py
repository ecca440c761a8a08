from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from sharding.arguments import add_options, read_options
from sharding.errors import UserError
from sharding.storage import StorageUnavailableError, open_storage, retries
from sharding.storage.options import MIB, StorageOptions
from sharding.storage.retries import Attempts, RetryCounter
from sharding.storage.s3 import client as s3_requests
from tests.conftest import S3
from tests.faults import FaultProxy, Faults


class Clock:
    """Time that passes only in pauses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(threading.Event, "wait", lambda _, timeout: clock.pause(timeout))
    return clock


def fail(attempts: Attempts, patience_s: float, times: int | None = None) -> None:
    while times is None or attempts.failures < times:
        attempts.pause(ConnectionError("no"), "no", patience_s)


def test_pauses_grow_with_jitter_and_end_with_patience(clock: Clock) -> None:
    with pytest.raises(ConnectionError):
        fail(Attempts("x"), 120.0)
    assert clock.now == pytest.approx(120.0)
    assert max(clock.pauses[:3]) <= 0.4
    assert 4.0 < max(clock.pauses) <= retries.LONGEST_PAUSE_S
    assert len(set(clock.pauses)) == len(clock.pauses)
    assert 15 < len(clock.pauses) < 200


def test_progress_begins_the_patience_anew(clock: Clock) -> None:
    attempts = Attempts("x")
    fail(attempts, 1000.0, times=20)
    attempts.progressed()
    clock.pauses.clear()
    attempts.pause(ConnectionError("no"), "no", 1.0)
    assert clock.pauses[0] <= retries.FIRST_PAUSE_S
    assert attempts.failures == 21


def test_one_long_attempt_is_not_the_last(clock: Clock) -> None:
    attempts = Attempts("x")
    clock.now += 20.0
    attempts.pause(ConnectionError("no"), "no", 10.0)
    with pytest.raises(ConnectionError):
        attempts.pause(ConnectionError("no"), "no", 10.0)


def test_others_end_a_pause() -> None:
    stop = threading.Event()
    attempts = Attempts("x", stop)
    attempts.pause(ConnectionError("no"), "no", 10.0)
    stop.set()
    with pytest.raises(ConnectionError):
        attempts.pause(ConnectionError("no"), "no", 10.0)


def test_nobody_waits_once_the_process_is_to_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "GIVE_UP", threading.Event())
    for stop in (None, threading.Event()):  # also who has an event of their own
        attempts = Attempts("x", stop)
        retries.GIVE_UP.clear()
        attempts.pause(ConnectionError("no"), "no", 10.0)
        retries.GIVE_UP.set()
        with pytest.raises(ConnectionError):
            attempts.pause(ConnectionError("no"), "no", 10.0)


def test_a_dead_endpoint_is_reported_within_twenty_seconds() -> None:
    assert retries.FIRST_CONTACT_S + s3_requests.CONNECT_TIMEOUT_S <= 20
    assert retries.LEAST_ATTEMPTS * s3_requests.CONNECT_TIMEOUT_S <= 20


def test_a_store_that_was_waited_for_in_vain_is_not_waited_for_as_long_again(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(s3.prefix())
        storage.write("x", b"1")
        proxy.faults = Faults(reset=1.0)
        monkeypatch.setattr(retries, "FIRST_CONTACT_S", 0.0)
        for patience_s in (0.5, 5.0):
            monkeypatch.setattr(retries, "KNOWN_S", patience_s)
            proxy.requests.clear()
            with pytest.raises(StorageUnavailableError, match="does not answer"):
                storage.read("x")
        assert proxy.done("reset") == retries.LEAST_ATTEMPTS


@pytest.mark.parametrize("fault", [{"reset": 1.0}, {"busy": 1.0}, {"cut": 1.0, "at": 0}])
def test_all_threads_and_later_calls_wait_for_one_outage_once(
    fault: dict[str, float], s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "KNOWN_S", 2.0)
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 1.0)
    monkeypatch.setattr(retries, "LONGEST_PAUSE_S", 0.2)
    clock, later, ended = Clock(), list[float](), list[float]()
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy, ThreadPoolExecutor(4) as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(s3.prefix())
        storage.write("x", b"1" * 100)

        def fails() -> None:
            with pytest.raises(StorageUnavailableError):
                storage.read("x")
            ended.append(clock.now)

        def pause(seconds: float) -> None:
            """Start a call of another thread in the midst of this one's pauses."""
            clock.pause(seconds)
            if later and clock.now >= later[0]:
                later.pop(0)
                pool.submit(fails).result()

        monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: clock.now))
        event = SimpleNamespace(is_set=lambda: False, wait=pause)
        monkeypatch.setattr(retries, "GIVE_UP", event)
        for _ in range(2):  # the second outage is waited for as long as the first
            proxy.faults = Faults(**fault)  # type: ignore[arg-type]
            began = clock.now
            later[:] = [began + 0.3, began + 0.6, began + 0.9]
            ended.clear()
            fails()
            assert later == []
            fails()
            # Each of five; calls that each wait for 2 s end at 2.9 s and more.
            assert ended == pytest.approx([began + 2.0] * 5)
            proxy.faults = Faults()
            assert storage.read("x") == b"1" * 100


def test_retries_are_counted_by_reason() -> None:
    counter = RetryCounter()
    for reason in ("SlowDown", "ReadTimeoutError", "SlowDown"):
        counter.add(reason)
    assert counter.total == 3
    assert counter.by_reason() == {"SlowDown": 2, "ReadTimeoutError": 1}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StorageOptions(part_size=MIB), "--part-size 1 is out of range: it must be a number from 5 to 1,024"),
        (lambda: StorageOptions(concurrency=0), "--concurrency 0 is out of range"),
        (lambda: StorageOptions(sse="rot13"), "--sse 'rot13' is unknown: it may be AES256"),
        (lambda: StorageOptions(sse="aws:kms:"), "--sse 'aws:kms:' is unknown"),
        (lambda: StorageOptions(storage_class="a b"), "--storage-class 'a b' is no storage class"),
        (lambda: StorageOptions(storage_class="GLACIER"), "GLACIER cannot be read without restoring"),
        (lambda: open_storage("folder", StorageOptions(sse="AES256")), "--sse AES256 is for s3:// only, and folder"),
        (lambda: open_storage("folder", StorageOptions(storage_class="COLD")), "--storage-class COLD is for s3://"),
    ],
)
def test_options_that_cannot_be_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_options_come_from_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, StorageOptions)
    assert read_options(StorageOptions, vars(parser.parse_args([]))) == StorageOptions()
    words = ["--sse", "aws:kms:my/key", "--storage-class", "STANDARD_IA", "--part-size", "64", "--concurrency", "2"]
    options = read_options(StorageOptions, vars(parser.parse_args(words)))
    assert options == StorageOptions(64 * MIB, 2, "aws:kms:my/key", "STANDARD_IA")
    assert options.request() == {
        "ServerSideEncryption": "aws:kms",
        "SSEKMSKeyId": "my/key",
        "StorageClass": "STANDARD_IA",
    }
    assert StorageOptions(sse="AES256").request() == {"ServerSideEncryption": "AES256"}
    assert StorageOptions().request() == {}
