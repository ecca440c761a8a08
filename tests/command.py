"""The real command in several processes, one a rank, and what it leaves in a run folder."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.local.processes import free_ports
from pipeline.training.checkpoint import Checkpoint, complete_checkpoints, read_checkpoint
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
    logs: list[IO[str]]

    def wait(self, timeout: float = 500) -> Finished:
        """Wait until all have ended, or one has failed or taken too long; end the others then."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and None in (statuses := [process.poll() for process in self.processes]):
            if any(statuses):
                time.sleep(2)  # the others may say something too
                break
            time.sleep(0.05)
        self.kill()
        return Finished([process.returncode for process in self.processes], self.output())

    def output(self) -> str:
        """Return what all of them wrote so far."""
        for log in self.logs:
            log.seek(0)
        return "\n".join(log.read() for log in self.logs)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def start_command(
    size: int, arguments: Sequence[str], environment: Mapping[str, str] | None = None, held_at: int | None = None
) -> Ranks:
    """Start ``satfusion ARGUMENTS`` in each rank of a gloo group, as torchrun would.

    Args:
        size: Number of ranks.
        arguments: Verb and options.
        environment: Further variables.
        held_at: Step at which a training waits for ever (`tests.held`), so that a kill comes before the next one.
    """
    program = ["cluster.cli"] if held_at is None else ["tests.held", str(held_at)]
    (port,) = free_ports(1)
    ranks = Ranks([], [])
    for rank in range(size):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {key: str(value) for key, value in {**group, **address}.items()}
        ranks.logs.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - lives as long as the ranks
        ranks.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", *program, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables, **(environment or {})},
                stdout=ranks.logs[-1],
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return ranks


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
