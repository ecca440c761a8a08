"""Processes as owners of files: an owner that has ended is recognised by its boot, process namespace and start time."""

from __future__ import annotations

import os
from pathlib import Path


def born(pid: int) -> str:
    """Return boot, process namespace and start time of a living process; empty if it has ended or is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else f"{boot} {namespace} {fields[18]}"
    except (OSError, IndexError):
        return ""


def has_ended(pid: int, since: str) -> bool:
    """Return True if a process of this machine has ended; False if it runs, or if that is not known.

    Args:
        pid: Its number.
        since: What `born` said of it.
    """
    boot, _, start = since.rpartition(" ")
    if not start or boot != born(os.getpid()).rpartition(" ")[0]:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user, whose processes the system may hide
        return False
    return born(pid) != since  # it is dead but not collected, or another one got its number
