"""Which addresses processes listen on, read from the kernel's tables."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable
from pathlib import Path

_LISTEN = "0A"


def listening(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Return ``(address, port)`` of every TCP socket on which one of these processes listens."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(descriptor))
    rows = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    return {_decode(row[1]) for row in rows if row[3] == _LISTEN and f"socket:[{row[9]}]" in inodes}


def is_loopback(address: str) -> bool:
    """Say whether an address is in 127.0.0.0/8, is ::1, or is one of the former mapped to IPv6."""
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def _decode(field: str) -> tuple[str, int]:
    address, port = field.split(":")
    # The kernel prints each 32-bit word of the address in the machine's byte order.
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, b"".join(words)), int(port, 16)
