"""The cache on a node's disk among processes and threads: the limit, complete files, one fetch, and kills."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data.disk_cache import LOCK_SUFFIX, TEMPORARY_SUFFIX, DiskCache
from tests.pipeline.data.test_diskcache import SIZE, content, counted, names, read, stored_bytes

SPAWN = multiprocessing.get_context("spawn")


def child(folder: Path, body: str, limit: int = 1 << 20) -> subprocess.Popen[str]:
    """Start a process that makes a cache and runs a script, and wait until the script reports."""
    script = f"""
import os, time
from pathlib import Path
from pipeline.data import disk_cache as diskcache
from tests.pipeline.data.test_diskcache import content
cache = diskcache.DiskCache(Path({str(folder)!r}), {limit})
def here():
    print("here", flush=True)
    time.sleep(600)
{body}
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def put_and_get(folder: Path, seed: int) -> None:
    """Read and write at random, and fail for any byte that does not belong to its name."""
    cache, draw = DiskCache(folder, 20_000), random.Random(seed)
    for _ in range(1500):
        name = f"{draw.randrange(40):x}-0"
        found = read(cache, name, 1000)
        assert found in (None, content(name, 1000)), name
        if found is None or draw.random() < 0.1:
            cache.put(name, content(name, 1000))
        if draw.random() < 0.05:
            cache.drop(name)


def test_processes_keep_the_bound_and_read_whole_files(tmp_path: Path) -> None:
    workers = [SPAWN.Process(target=put_and_get, args=(tmp_path, seed)) for seed in range(2)]
    DiskCache(tmp_path, 20_000)
    for worker in workers:
        worker.start()
    most = stored_bytes(tmp_path)
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.001)
        most = max(most, stored_bytes(tmp_path))
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert 10_000 < most <= 20_000
    assert counted(tmp_path) == stored_bytes(tmp_path)
    assert not names(tmp_path, TEMPORARY_SUFFIX)


def fetch_once(folder: Path, start: threading.Barrier) -> None:
    """Fetch absent samples, in four threads, and note each fetch."""
    cache = DiskCache(folder, 1 << 20)

    def work() -> None:
        start.wait()
        for number in range(5):
            name = f"{number}-0"
            with cache.lock(name):
                if read(cache, name) is None:
                    with open(folder / "fetches", "a") as file:
                        file.write(f"{name}\n")
                    time.sleep(0.02)
                    cache.put(name, content(name))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_one_of_all_processes_and_threads_fetches(tmp_path: Path) -> None:
    start = SPAWN.Barrier(8)
    workers = [SPAWN.Process(target=fetch_once, args=(tmp_path, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted((tmp_path / "fetches").read_text().split()) == [f"{number}-0" for number in range(5)]


def is_free(folder: Path) -> bool:
    """Return whether the lock of the only name that was ever locked is free."""
    [path] = set(folder.glob(f"*{LOCK_SUFFIX}")) - {folder / f"bytes{LOCK_SUFFIX}"}
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_lock_is_free_when_its_holder_dies(tmp_path: Path) -> None:
    process = child(tmp_path, 'with cache.lock("a-0"):\n    here()')
    try:
        assert not is_free(tmp_path)
    finally:
        kill(process)
    assert is_free(tmp_path)


@pytest.mark.filterwarnings("ignore:.*fork")  # of Python 3.12, beside threads
def test_a_lock_is_free_though_a_process_was_forked_meanwhile(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with DiskCache(tmp_path, 1 << 20).lock("a-0"):
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        assert not is_free(tmp_path)
    free = is_free(tmp_path)
    os.close(writer)
    os.waitpid(pid, 0)
    os.close(reader)
    assert free


def test_a_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), DiskCache(tmp_path, 1 << 20).lock("a-0"):
        raise OSError("mine")
    assert is_free(tmp_path)


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """Other writers wait for a living writer, and readers do not."""
    DiskCache(tmp_path, 2 * SIZE).put("z", content("z"))
    cache = DiskCache(tmp_path, 2 * SIZE)
    process = child(tmp_path, 'os.utime = lambda *_, **__: here()\ncache.put("a", content("a"))')
    with ThreadPoolExecutor(2) as pool:
        try:
            [temporary] = tmp_path.glob(f"*{TEMPORARY_SUFFIX}")
            waiting = [pool.submit(DiskCache, tmp_path, 2 * SIZE), pool.submit(cache.put, "b", content("b"))]
            assert read(cache, "a") is None
            assert read(cache, "z") == content("z")
            time.sleep(0.2)
            assert not any(writer.done() for writer in waiting)
            assert temporary.read_bytes() == content("a")
        finally:
            kill(process)
        for writer in waiting:
            writer.result(120)
    assert not temporary.exists()
    assert read(cache, "b") == content("b")
    assert counted(tmp_path) == stored_bytes(tmp_path) <= 2 * SIZE


def test_kills_in_the_midst_of_puts_break_no_file(tmp_path: Path) -> None:
    size, limit, draw, kills, left = 2_000_000, 20_000_000, random.Random(1), 0, 0
    body = f"""
data = {{str(number): content(str(number), {size}) for number in range(20)}}
print("here", flush=True)
while True:
    for name in data:
        cache.put(name, data[name])
"""
    while left < 3:
        kills += 1
        assert kills < 50, "hardly a kill came while a file was written"
        process = child(tmp_path, body, limit)
        time.sleep(draw.uniform(0, 0.1))
        kill(process)
        left += len(names(tmp_path, TEMPORARY_SUFFIX))
        assert stored_bytes(tmp_path) <= min(counted(tmp_path), limit)
        cache = DiskCache(tmp_path, limit)
        assert not names(tmp_path, TEMPORARY_SUFFIX)
        assert counted(tmp_path) == stored_bytes(tmp_path)
        for name in names(tmp_path):
            assert read(cache, name, size) == content(name, size)
