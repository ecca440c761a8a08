"""Run a function on several real ranks: forked processes, gloo, a file for rendezvous, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
SECONDS = 400.0
"""Limit of a group of ranks, which ends a hang: a busy machine takes many times what a test takes by itself."""


@dataclass(frozen=True)
class Rank:
    """What a rank's function is told of its place."""

    rank: int
    """0-based number of this process."""
    world_size: int
    """Number of processes."""


class RanksFailedError(AssertionError):
    """One or more ranks failed; the message holds the traceback of each."""


def run_ranks(
    function: Callable[..., T],
    world_size: int,
    folder: Path,
    *arguments: object,
    seconds: float = SECONDS,
    grace_seconds: float = 20.0,
    threads: int = 1,
) -> list[T]:
    """Call ``function(Rank, *arguments)`` on each rank of a gloo group and return the results in rank order.

    Args:
        function: A module's own function, which the processes import; its result must pickle.
        world_size: Number of processes.
        folder: An empty folder, such as `tmp_path`.
        arguments: Passed on; must pickle.
        seconds: Limit for all of it.
        grace_seconds: Once a rank has failed, the others may wait for it in a collective: what they get to fail too.
        threads: Threads of torch in each rank.

    Raises:
        RanksFailedError: A rank raised, died or ran past the limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    # Heeded by the first call alone, since the process that ranks are forked from then stands.
    context.set_forkserver_preload(["tests.preload"])
    environment = dict(os.environ)
    processes = [
        context.Process(
            target=_rank_main,
            args=(function, Rank(rank, world_size), folder, arguments, threads, environment),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        in_time = _wait(processes, seconds, grace_seconds)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process in processes:
            if process.pid is not None:
                process.join()
    problems = [_problem(rank, process, folder, in_time) for rank, process in enumerate(processes)]
    if any(problems):
        raise RanksFailedError("\n".join(filter(None, problems)))
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]  # noqa: S301


def _rank_main(
    function: Callable[..., object],
    place: Rank,
    folder: Path,
    arguments: tuple[object, ...],
    threads: int,
    environment: Mapping[str, str],
) -> None:
    torch.set_num_threads(threads)
    os.environ.clear()
    # What torchrun and Ray set; code under test may read it.
    os.environ |= {
        **environment,
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.world_size),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder.resolve() / 'rendezvous'}",
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=SECONDS),
        )
        _meet(place, folder)
        result = function(place, *arguments)
        (folder / f"result-{place.rank}").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{place.rank}").write_text(traceback.format_exc())
        # Not sys.exit: a thread of gloo's that waits for a lost rank would hold the process.
        os._exit(1)


def _meet(place: Rank, folder: Path) -> None:
    """Wait until every rank has joined: one that ends earlier cuts the others off while they still connect."""
    (folder / f"joined-{place.rank}").touch()
    while not all((folder / f"joined-{rank}").exists() for rank in range(place.world_size)):
        time.sleep(0.005)


def _wait(processes: list[ForkServerProcess], seconds: float, grace_seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    failed = False
    while any(process.is_alive() for process in processes):
        if not failed and any(process.exitcode for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + grace_seconds)
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.02)
    return True


def _problem(rank: int, process: ForkServerProcess, folder: Path, in_time: bool) -> str:
    error = folder / f"error-{rank}"
    if error.exists():
        return f"rank {rank} raised:\n{error.read_text()}"
    if process.exitcode == 0:
        return ""
    if not in_time:
        return f"rank {rank} ran past the time limit"
    return f"rank {rank} ended with status {process.exitcode} (negative: by that signal; -9 may be our own kill)"
