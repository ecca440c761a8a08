"""A small generated dataset for the loop's tests, and the real command line around it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config import RunConfig, load_config
from pipeline.world import World, join_world, leave_world
from sharding.shard import ShardOptions, shard_folder
from sharding.storage import open_storage
from sharding.synthetic import write_worldstrat

TINY = (
    "model.hidden=8",
    "data.random_windows=true",
    "train.global_batch=4",
    "train.schedule=warmup_cosine",
    "train.learning_rate=1e-3",
    "train.threads_per_rank=1",
    "train.log_batches=true",
    "output.panels=1",
)
"""A network of minimal width, the same in every test of the loop."""


@pytest.fixture(scope="session")
def dataset_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four training AOIs, one to validate, one to test."""
    source, output = tmp_path_factory.mktemp("worldstrat"), tmp_path_factory.mktemp("dataset")
    write_worldstrat(source, 6, seed=3, hr_side=264)
    shard_folder(source, open_storage(output), ShardOptions(shard_size=2), workers=1)
    return str(output)


@pytest.fixture(scope="session")
def make_config(dataset_uri: str) -> Callable[..., RunConfig]:
    """Return a function from (run folder, overrides) to the tiny run's configuration."""

    def make(output: Path | str, *overrides: str) -> RunConfig:
        return load_config("srcnn_pnn", [f"data.uri={dataset_uri}", f"output.uri={output}", *TINY, *overrides])

    return make


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Return the process group of one that this process forms; DeepSpeed cannot join a second one."""
    yield join_world()
    leave_world()


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


def start_ranks(size: int, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Ranks:
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


def run_ranks(size: int, arguments: Sequence[str]) -> Finished:
    """Run ``satfusion ARGUMENTS`` in each rank to its end; fail with every rank's output if one fails."""
    ranks = start_ranks(size, arguments)
    try:
        finished = ranks.wait()
    finally:
        ranks.kill()
    assert finished.statuses == [0] * size, finished.output
    return finished
