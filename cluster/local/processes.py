"""Processes that run on this machine for us: free ports, identities that outlast a reused pid, sure ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# Below the kernel's range for outgoing connections (32768 and up), so that no connection takes a port
# between our look and the server's bind. Above 10000 nothing well known listens.
_PORTS = range(10240, 32700)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ProcessId:
    """A process, told apart from a later one that was given the same number."""

    pid: int
    """Process number."""
    started: int
    """Start time in clock ticks since the machine's boot (field 22 of ``/proc/<pid>/stat``)."""


def free_ports(count: int) -> list[int]:
    """Return ``count`` different ports on which nothing listens, on any address of this machine."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, k=len(_PORTS)):
        if len(found) == count:
            return found
        if _is_free(port):
            found.append(port)
    raise OSError(f"found {len(found)} of {count} free ports")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # A closed connection's wait is no matter.
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def dies_with_parent() -> Callable[[], None] | None:
    """Return a ``preexec_fn`` after which the kernel kills the child when its parent thread ends.

    It covers the parent that is killed and so never reaches its own clean-up. None where the system has no
    such call. Start the child from a thread that outlives it: the signal follows the thread, not the process.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # Loaded here, not between fork and exec, where another thread may hold a lock.

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return ask_kernel


def identify(pid: int) -> ProcessId | None:
    """Return the identity of a running process, or None when there is none (a zombie counts as none)."""
    try:
        fields = _stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in {"Z", "X"} else ProcessId(pid, int(fields[19]))


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of ``/proc/<pid>/stat`` from the third (state) on."""
    # The second is the name in parentheses and may itself hold spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def is_running(process: ProcessId) -> bool:
    """Say whether exactly this process still runs."""
    return identify(process.pid) == process


def running_with(variable: str, value: str) -> list[ProcessId]:
    """Return every process whose environment was started with ``variable=value``, and their descendants.

    Children inherit it however they detach; descendants are added because a process that gives itself a long
    title overwrites what the kernel shows of its environment. Processes of other users, whose environment
    cannot be read, are passed over.
    """
    entry = f"{variable}={value}".encode()
    found: set[int] = set()
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            parents[pid] = int(_stat_fields(pid)[1])
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.add(pid)
    while grown := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= grown
    return [process for process in map(identify, sorted(found)) if process]


def stop(processes: Iterable[ProcessId], patience: float = 3.0) -> None:
    """End exactly these processes: ask, wait up to ``patience`` seconds, then kill what is left.

    Raises:
        OSError: A process could not be ended (it waits in the kernel, or is not ours to end).
    """
    left = _signal_and_wait(list(processes), signal.SIGTERM, patience)
    left = _signal_and_wait(left, signal.SIGKILL, patience)
    if left:
        raise OSError(f"processes {[process.pid for process in left]} did not end")


def _signal_and_wait(processes: list[ProcessId], number: signal.Signals, patience: float) -> list[ProcessId]:
    for process in processes:
        if is_running(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
    deadline = time.monotonic() + patience
    left = [process for process in processes if is_running(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if is_running(process)]
    return left
