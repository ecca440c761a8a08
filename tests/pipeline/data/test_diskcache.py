"""The cache on a node's disk: kept samples, the order of eviction, and the cost of a full disk."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import pickle
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.data.disk_cache import LOCK_SUFFIX, SUFFIX, TEMPORARY_SUFFIX, DiskCache
from sharding.errors import UserError

SIZE = 100
SPAWN = multiprocessing.get_context("spawn")


def content(name: str, size: int = SIZE) -> bytes:
    """Return bytes that no other name has, no two pieces alike."""
    return random.Random(name).randbytes(size)


def read(cache: DiskCache, name: str, size: int = SIZE) -> bytes | None:
    buffer = bytearray(size)
    return bytes(buffer) if cache.get(name, memoryview(buffer)) else None


def names(folder: Path, suffix: str = SUFFIX) -> set[str]:
    return {path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}")}


@contextmanager
def at_rest(folder: Path) -> Iterator[None]:
    """Prevent changes of files by other processes in the block."""
    with open(folder / f"bytes{LOCK_SUFFIX}", "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all files, including files being written."""
    with at_rest(folder):
        return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (SUFFIX, TEMPORARY_SUFFIX))


def counted(folder: Path) -> int:
    """Return the bytes of all files as counted in the ledger."""
    return int.from_bytes((folder / f"bytes{LOCK_SUFFIX}").read_bytes(), "little")


def test_get_gives_what_was_put(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "a" / "b", 10 * SIZE)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert read(cache, "0f-512") is None
    cache.put("0f-512", content("one"))
    assert read(cache, "0f-512") == content("one")
    cache.put("0f-512", memoryview(content("two")))
    assert read(cache, "0f-512") == content("two")
    assert counted(tmp_path / "a" / "b") == SIZE
    buffer = bytearray(3 * SIZE)
    assert cache.get("0f-512", memoryview(buffer)[SIZE : 2 * SIZE])
    assert buffer == bytes(SIZE) + content("two") + bytes(SIZE)


def test_a_file_of_another_length_is_none(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10 * SIZE)
    cache.put("a", content("a"))
    assert read(cache, "a", SIZE - 1) is None
    assert read(cache, "a", SIZE + 1) is None
    (tmp_path / f"b{SUFFIX}").mkdir()
    assert read(cache, "b", (tmp_path / f"b{SUFFIX}").stat().st_size) is None


def test_a_file_cut_while_it_is_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, 10 * SIZE)
    cache.put("a", content("a"))
    fstat = os.fstat

    def cut_behind(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        os.truncate(tmp_path / f"a{SUFFIX}", SIZE // 2)
        return status

    monkeypatch.setattr(os, "fstat", cut_behind)
    assert read(cache, "a") is None


def test_an_evicted_file_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, 3 * SIZE)
    cache.put("a", content("a"))
    preadv = os.preadv

    def evicted_before(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        for name in "bcd":
            cache.put(name, content(name))
        assert "a" not in names(tmp_path)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", evicted_before)
    assert read(cache, "a") == content("a")


def test_drop_removes_one(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10 * SIZE)
    for name in "ab":
        cache.put(name, content(name))
    cache.drop("a")
    cache.drop("a")
    assert read(cache, "a") is None
    assert read(cache, "b") == content("b")
    assert counted(tmp_path) == SIZE


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "a\0"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    cache = DiskCache(tmp_path / "cache", 10 * SIZE)
    with pytest.raises(UserError, match="is no key"):
        cache.put(name, b"1")
    with pytest.raises(UserError, match="is no key"):
        cache.get(name, memoryview(bytearray(1)))
    with pytest.raises(UserError, match="is no key"):
        cache.drop(name)


@pytest.mark.parametrize("name", ["..", "", "ä-1", "x" * 300])
def test_odd_names_do_no_harm(tmp_path: Path, name: str) -> None:
    (tmp_path / "kept").write_text("kept")
    cache = DiskCache(tmp_path / "cache", 10 * SIZE)
    with cache.lock(name):
        cache.put(name, content("a"))
    assert read(cache, name) == (content("a") if len(name) < 200 else None)
    cache.drop(name)
    assert read(cache, name) is None
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "cache"}


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10 * SIZE)
    for name in "abcdefghij":
        cache.put(name, content(name))
    assert names(tmp_path) == set("abcdefghij")
    for name in "ac":
        assert read(cache, name) == content(name)
    cache.put("k", content("k", 3 * SIZE))  # three are evicted for it
    assert names(tmp_path) == set("acfghijk")
    assert stored_bytes(tmp_path) == counted(tmp_path) == 10 * SIZE


def test_room_is_made_for_several_at_once(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 100 * SIZE)
    for number in range(101):
        cache.put(str(number), content("a"))
    assert names(tmp_path) == {str(number) for number in range(10, 101)}


def test_a_file_larger_than_the_bound_leaves_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path, 2 * SIZE)
    cache.put("a", content("a"))
    cache.put("b", content("b", 2 * SIZE + 1))
    assert names(tmp_path) == {"a"}
    cache.put("c", content("c", 2 * SIZE))
    assert names(tmp_path) == {"c"}
    assert not caplog.records


def test_what_is_not_the_caches_own_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".tmp-1").write_text("mine")
    (tmp_path / f"folder{SUFFIX}").mkdir()
    cache = DiskCache(tmp_path, SIZE)
    for name in "abc":
        cache.put(name, content(name))
    DiskCache(tmp_path, 0)
    assert not [path for path in tmp_path.glob(f"*{SUFFIX}") if path.is_file()]
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / ".tmp-1").read_text() == "mine"
    assert (tmp_path / f"folder{SUFFIX}").is_dir()


def test_files_of_an_earlier_run_are_kept_within_the_bound(tmp_path: Path) -> None:
    for name in "abcde":
        DiskCache(tmp_path, 5 * SIZE).put(name, content(name))
    (tmp_path / f"bytes{LOCK_SUFFIX}").unlink()  # by a user, or by a cleaner of temporary folders
    cache = DiskCache(tmp_path, 5 * SIZE)
    assert read(cache, "a") == content("a")
    assert counted(tmp_path) == 5 * SIZE
    DiskCache(tmp_path, 3 * SIZE)
    assert names(tmp_path) == {"a", "e"}
    (tmp_path / f"bytes{LOCK_SUFFIX}").unlink()
    cache.put("f", content("f"))
    assert counted(tmp_path) == stored_bytes(tmp_path) == 3 * SIZE


def test_a_copy_in_another_process_is_the_same_cache(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10 * SIZE)
    pickle.loads(pickle.dumps(cache)).put("a", content("a"))  # noqa: S301
    assert read(cache, "a") == content("a")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/self")):
        with pytest.raises(UserError, match=f"data.cache_dir = '{folder}' cannot be written"):
            DiskCache(folder, 10 * SIZE)


def fill_small(folder: Path) -> None:
    """Store small and large files while no file may have more than 1000 bytes; then allow no open file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    logging.basicConfig(stream=(folder.parent / "log").open("w"))
    cache = DiskCache(folder, 10_000)
    for number in range(5):
        cache.put(f"large-{number}", content("large", 2000))
        cache.put(f"small-{number}", content(f"small-{number}"))
        assert read(cache, f"large-{number}", 2000) is None
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 4096))
    cache.put("none", content("none"))
    cache.drop("none")
    with cache.lock("none"):
        assert read(cache, "small-0") is None


def test_a_full_disk_costs_only_what_does_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    process = SPAWN.Process(target=fill_small, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
    log = (tmp_path / "log").read_text()
    assert log.count("WARNING") == 1
    assert "cannot keep a file (File too large)" in log
    assert names(folder) == {f"small-{number}" for number in range(5)}
    assert not names(folder, TEMPORARY_SUFFIX)
    assert counted(folder) == stored_bytes(folder) == 5 * SIZE


@pytest.mark.parametrize("call", ["write", "touch", "rename"])
def test_no_space_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    cache = DiskCache(tmp_path, 10 * SIZE)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        calls = {"write": (Path, "write_bytes"), "touch": (os, "utime"), "rename": (Path, "replace")}
        patch.setattr(*calls[call], full)
        for name in "ab":
            cache.put(name, content(name))
    assert [record.getMessage() for record in caplog.records] == [
        f"data.cache_dir: {tmp_path} cannot keep a file (No space left on device); samples that are not "
        "cached are read from the store"
    ]
    assert counted(tmp_path) == stored_bytes(tmp_path) == 0
    cache.put("a", content("a"))
    assert read(cache, "a") == content("a")


def test_a_full_disk_at_the_start_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    DiskCache(tmp_path, 10 * SIZE).put("a", content("a"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert read(DiskCache(tmp_path, 10 * SIZE), "a") == content("a")
    assert len(caplog.records) == 1


def test_without_locks_it_works_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / f"old{TEMPORARY_SUFFIX}"
    young = tmp_path / f"young{TEMPORARY_SUFFIX}"
    for path in (old, young):
        path.write_bytes(bytes(SIZE))
    os.utime(old, (0, 0))

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = DiskCache(tmp_path, 3 * SIZE)
    assert names(tmp_path, TEMPORARY_SUFFIX) == {"young"}
    for name in "abc":
        with cache.lock(name):
            cache.put(name, content(name))
    assert names(tmp_path) == {"b", "c"}
    assert read(cache, "c") == content("c")
