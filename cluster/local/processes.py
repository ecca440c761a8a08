"""Processes of this machine, by psutil: identities that detect a reused pid, descendants, ends; and free ports."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

# Below the kernel's range for outgoing connections (32768 and up), so that no connection takes a port between our check
# and the server's bind. Above 10000 no well-known service listens.
_PORTS = range(10240, 32700)
# Unit of field 22 of `/proc/<pid>/stat`.
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_ENDED = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


@dataclass(frozen=True)
class ProcessId:
    """Identity of a process, distinct from a later process with the same number."""

    pid: int
    """Process number."""
    started: int
    """Start time in clock ticks since the machine's boot, which setting the clock does not change."""


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
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # A port in TIME_WAIT is free.
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def identify(pid: int) -> ProcessId | None:
    """Return the identity of a running process, or None if there is none (a zombie counts as none)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() in _ENDED else _identity(process)
    except psutil.NoSuchProcess:
        return None


def _identity(process: psutil.Process) -> ProcessId:
    # psutil adds the boot time, which changes when the clock is set; its value is subtracted again.
    since_boot = process.create_time() - psutil.boot_time()
    return ProcessId(process.pid, round(since_boot * _TICKS_PER_SECOND))


def is_running(process: ProcessId) -> bool:
    """Return whether exactly this process still runs."""
    return identify(process.pid) == process


def running_with(variable: str, value: str) -> list[ProcessId]:
    """Return every process whose environment was started with ``variable=value``, and their descendants.

    Children inherit it even if they detach; descendants are added because a process that gives itself a long title
    overwrites what the kernel shows of its environment. Processes of other users, whose environment cannot be read, are
    skipped.
    """
    found: set[int] = set()
    for pid in set(psutil.pids()) - {os.getpid()}:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if pid not in found and process.environ().get(variable) == value:
                found |= {pid, *(child.pid for child in process.children(recursive=True))}
    return [process for process in map(identify, sorted(found - {os.getpid()})) if process]


def stop(processes: Iterable[ProcessId], patience: float = 3.0) -> None:
    """End exactly these processes: terminate, wait up to ``patience`` seconds, then kill the rest.

    Raises:
        OSError: A process could not be ended (it waits in the kernel, or is not ours to end).
    """
    left = list(processes)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            with contextlib.suppress(psutil.Error):  # It has ended, or is not ours to end.
                handle = psutil.Process(process.pid)
                if is_running(process):
                    handle.send_signal(number)
        deadline = time.monotonic() + patience
        # Not `psutil.wait_procs`: it waits for zombies, and reaps children whose status a `Popen` is to return.
        while (left := [process for process in left if is_running(process)]) and time.monotonic() < deadline:
            time.sleep(0.05)
    if left:
        raise OSError(f"processes {[process.pid for process in left]} did not end")
