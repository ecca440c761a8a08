"""The real command in several processes, one a rank, and what it leaves in a run folder."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import Checkpoint, complete_checkpoints, read_checkpoint
from sharding.storage import open_storage


@dataclass(frozen=True)
class Finished:
    """How a group of processes ended."""

    statuses: list[int]
    output: str


@dataclass
class Ranks:
    """Processes of the real command, one a rank."""

    processes: list[subprocess.Popen[str]]

    def wait(self, timeout: float = 240) -> Finished:
        outputs = [process.communicate(timeout=timeout)[0] for process in self.processes]
        return Finished([process.returncode for process in self.processes], "\n".join(outputs))

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def start_command(size: int, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Ranks:
    """Start ``satfusion ARGUMENTS`` in each rank of a gloo group, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {key: str(value) for key, value in {**group, **address}.items()}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables, **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return Ranks(processes)


def run_command(size: int, arguments: Sequence[str]) -> Finished:
    """Run ``satfusion ARGUMENTS`` in each rank to its end; fail with every rank's output if one fails."""
    ranks = start_command(size, arguments)
    try:
        finished = ranks.wait()
    finally:
        ranks.kill()
    assert finished.statuses == [0] * size, finished.output
    return finished


def column(run: Path, name: str, file: str = "metrics.csv") -> list[str]:
    """Return a column of one of the run's tables."""
    with (run / file).open(newline="") as rows:
        return [row[name] for row in csv.DictReader(rows)]


def last_checkpoint(run: Path) -> Checkpoint:
    """Return the run's newest full checkpoint."""
    storage = open_storage(run)
    return read_checkpoint(storage, f"step-{complete_checkpoints(storage, 'step')[-1]}")
