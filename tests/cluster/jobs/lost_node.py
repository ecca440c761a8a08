"""The loss of a Ray node while a job writes its output."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from pathlib import Path

from cluster.local.nodes import LocalCluster
from cluster.local.processes import running_with
from sharding.storage import open_storage


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each object in a folder."""
    storage = open_storage(folder)
    return {item.key: hashlib.sha256(storage.read(item.key)).hexdigest() for item in storage.list()}


def kill_node(cluster: LocalCluster, node: str, folder: Path, pattern: str, files: int, killed: list[str]) -> None:
    """SIGKILL Ray's processes on a node once so many files of a pattern exist; ``killed`` gets their names."""
    deadline = time.monotonic() + 400
    while len(list(folder.glob(pattern))) < files:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    option = re.compile(rf"--node[_-]ip[_-]address=?\0?{re.escape(node)}\0".encode())
    for process in running_with("SATFUSION_CLUSTER", cluster.mark):
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        if option.search(command):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(command.split(b"\0")[0].decode())
