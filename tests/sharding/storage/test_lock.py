"""The lock of a place: one job at a time, in a folder and on a real S3 server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from sharding.errors import UserError
from sharding.storage import LocalStorage, Storage, open_storage
from sharding.storage.lock import JOB_VARIABLE, STALE_S, Holder, Lock, LockedError, LockLostError
from tests.conftest import S3


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        return open_storage(s3.prefix())
    return open_storage(tmp_path / "place")


def other(**changes: object) -> Holder:
    """Return a holder on another machine."""
    return replace(Holder.here("train"), job="another", host="elsewhere", born="", **changes)  # type: ignore[arg-type]


def test_it_is_released_and_leaves_nothing(place: Storage) -> None:
    with Lock(place, "shard") as lock:
        assert [item.key for item in place.list()] == [".lock/000001.json"]
        lock.check()
    assert place.list() == []


def test_another_job_is_refused_and_named(place: Storage) -> None:
    place.write(".lock/000004.json", other(user="ada", pid=77).to_bytes())
    with pytest.raises(LockedError, match=r"by `satfusion train` of ada on elsewhere, pid 77 \(another\), since 20"):
        Lock(place, "shard").__enter__()
    assert [item.key for item in place.list()] == [".lock/000004.json"]


def test_a_restart_of_the_same_job_takes_it_at_once(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "night run")
    said: list[str] = []
    place.write(".lock/000001.json", replace(other(), job="job night run").to_bytes())
    with Lock(place, "train", said.append):
        assert [item.key for item in place.list()] == [".lock/000002.json"]
    assert said == []


def age(place: Storage, monkeypatch: pytest.MonkeyPatch, term: int, seconds: float) -> None:
    """Make the last heartbeat of a term so old; only a folder lets its times be set."""
    key = f".lock/{term:06d}.json"
    if isinstance(place, LocalStorage):
        now = time.time() - seconds
        os.utime(Path(place.uri, key), (now, now))
        return
    real = Lock._age_of_beat

    def aged(lock: Lock, number: int) -> float | None:
        found = real(lock, number)
        return seconds if found is not None and number == term else found

    monkeypatch.setattr(Lock, "_age_of_beat", aged)


@pytest.mark.parametrize("ahead", [-7200, 0, 7200])
def test_a_stale_lock_is_taken_over_and_said_whatever_the_holders_clock_shows(
    place: Storage, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    monkeypatch.setattr("sharding.storage.lock.BEAT_S", -1)  # the wait for one more heartbeat
    said: list[str] = []
    place.write(".lock/000001.json", other(beat=time.time() + ahead).to_bytes())
    age(place, monkeypatch, 1, STALE_S + 5)
    with Lock(place, "shard", said.append):
        pass
    assert len(said) == 1
    words = re.search(r"its last heartbeat is (\d+) s old, so its lock was taken over", said[0])
    assert words
    assert int(words[1]) >= STALE_S + 5
    assert place.list() == []


@pytest.mark.parametrize("ahead", [-7200, 7200])
def test_a_fresh_heartbeat_counts_whatever_the_holders_clock_shows(place: Storage, ahead: float) -> None:
    place.write(".lock/000001.json", other(beat=time.time() + ahead).to_bytes())
    with pytest.raises(LockedError, match=r"this command takes over in (\d+) s") as caught:
        Lock(place, "shard").__enter__()
    words = re.search(r"takes over in (\d+) s", str(caught.value))
    assert words is not None
    assert int(words[1]) <= STALE_S
    assert [item.key for item in place.list()] == [".lock/000001.json"]


def watched(lock: Lock, event: Callable[[], object]) -> Lock:
    """Return the lock; the event happens while it waits for a heartbeat, once."""
    real = lock._stop.wait

    def wait(timeout: float | None = None) -> bool:
        lock._stop.wait = real  # type: ignore[method-assign]
        event()
        return False

    lock._stop.wait = wait  # type: ignore[method-assign]
    return lock


def test_a_lock_that_is_released_while_it_is_watched_is_taken(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    place.write(".lock/000001.json", other().to_bytes())
    age(place, monkeypatch, 1, STALE_S + 5)
    with watched(Lock(place, "shard", said.append), lambda: place.delete(".lock/000001.json")) as lock:
        lock.check()
    assert said == []
    assert place.list() == []


def test_a_heartbeat_that_arrives_while_it_is_watched_counts(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = other()
    place.write(".lock/000001.json", holder.to_bytes())
    age(place, monkeypatch, 1, STALE_S + 5)
    beat = replace(holder, beat=holder.beat + 15).to_bytes()
    lock = watched(Lock(place, "shard"), lambda: place.write(".lock/000001.json", beat))
    with pytest.raises(LockedError, match=r"this command takes over in 60 s"):
        lock.__enter__()


def test_the_clock_of_a_killed_process_is_removed(place: Storage) -> None:
    place.write(".lock/clock-0123", b"now")
    with Lock(place, "shard"):
        assert [item.key for item in place.list()] == [".lock/000001.json"]


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_at_once(place: Storage) -> None:
    code = (
        "import os, sys; from sharding.storage import open_storage; from sharding.storage.lock import Lock\n"
        "Lock(open_storage(sys.argv[1]), 'shard').__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, place.uri], check=False, env=os.environ)
    assert [item.key for item in place.list()] == [".lock/000001.json"]
    said: list[str] = []
    with Lock(place, "shard", said.append):
        pass
    assert "its process has ended, so its lock was taken over" in said[0]


def test_of_many_at_once_exactly_one_takes_it(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharding.storage.lock.BEAT_S", -1)
    place.write(".lock/000007.json", other().to_bytes())
    age(place, monkeypatch, 7, STALE_S + 5)

    def attempt(number: int) -> Lock | None:
        lock = Lock(place, "shard", lambda line: None)
        lock._holder = replace(lock._holder, job=f"job {number}")
        try:
            return lock.__enter__()
        except LockedError:
            return None

    with ThreadPoolExecutor(8) as threads:
        held = [lock for lock in threads.map(attempt, range(8)) if lock]
    assert len(held) == 1
    held[0].check()
    held[0].__exit__(None, None, None)
    assert place.list() == []


def test_a_lost_lock_is_noticed(place: Storage) -> None:
    with Lock(place, "shard") as lock:
        place.write(".lock/000002.json", other().to_bytes())
        with pytest.raises(LockLostError, match="was taken over by `satfusion train`"):
            lock.check()
    assert [item.key for item in place.list()] == [".lock/000001.json", ".lock/000002.json"]


@pytest.mark.parametrize(
    "text",
    [
        b'{"job": 5}',
        b"[" * 4096,
        other().to_bytes().replace(b'"elsewhere"', b'"\\u001b[2J"'),
        other(pid=2**40).to_bytes(),
        other(beat=-1.0).to_bytes(),
        other(since=1e300).to_bytes(),
    ],
)
def test_what_is_no_lock_is_named(place: Storage, text: bytes) -> None:
    place.write(".lock/000001.json", text)
    with pytest.raises(UserError, match=r"\.lock/000001\.json is no lock that this program wrote: remove it"):
        Lock(place, "shard").__enter__()
