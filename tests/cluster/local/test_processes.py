from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.local.processes import ProcessId, identify, is_running, running_with, stop

MARK = "SATFUSION_TEST_PROCESSES"
# A process that ignores SIGTERM, with a child whose environment is empty.
STUBBORN = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"], env={}, start_new_session=True)
print(child.pid, flush=True)
child.wait()
signal.pause()
"""


@pytest.fixture
def stubborn() -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Yield the process, its child's number, and the mark in its environment."""
    value = secrets.token_hex(8)
    environment = {**os.environ, MARK: value}
    with subprocess.Popen([sys.executable, "-c", STUBBORN], env=environment, stdout=subprocess.PIPE, text=True) as own:
        assert own.stdout is not None
        child = psutil.Process(int(own.stdout.readline()))
        yield own, child.pid, value
        own.kill()
        if child.is_running():
            child.kill()


def test_an_identity_is_as_state_files_of_earlier_versions_hold_it() -> None:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert identify(os.getpid()) == ProcessId(os.getpid(), int(fields[19]))


def test_setting_the_clock_changes_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    own = identify(os.getpid())
    boot_time = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot_time + 7200)
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot_time + 7200)
    assert identify(os.getpid()) == own


def test_a_zombie_does_not_run() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        identity = identify(process.pid)
        assert identity is not None
        process.kill()
        began = time.monotonic()
        stop([identity], patience=300)
        assert time.monotonic() - began < 150
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert not is_running(identity)
    assert process.returncode == -signal.SIGKILL


def test_descendants_are_found_whatever_their_environment(stubborn: tuple[subprocess.Popen[str], int, str]) -> None:
    process, child, value = stubborn
    assert {found.pid for found in running_with(MARK, value)} == {process.pid, child}
    assert running_with(MARK, value[1:]) == []


def test_what_ignores_sigterm_is_killed_and_nothing_else(stubborn: tuple[subprocess.Popen[str], int, str]) -> None:
    process, child, _ = stubborn
    identity, other = identify(process.pid), identify(child)
    assert identity is not None
    assert other is not None
    stop([ProcessId(other.pid, other.started - 1)])  # an earlier process with its number
    assert is_running(other)
    began = time.monotonic()
    stop([identity], patience=0.5)
    assert time.monotonic() - began >= 0.5
    assert process.wait() == -signal.SIGKILL
    assert is_running(other)


def test_what_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    own = identify(os.getpid())
    assert own is not None
    monkeypatch.setattr(psutil.Process, "send_signal", lambda *_: (_ for _ in ()).throw(psutil.AccessDenied()))
    with pytest.raises(OSError, match=f"processes \\[{own.pid}\\] did not end"):
        stop([own], patience=0.1)
