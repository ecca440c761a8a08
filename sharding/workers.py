"""Processes of this machine that make shards."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from sharding.build import ShardResult, ShardTask, build_shard
from sharding.errors import UserError


def processes(workers: int) -> Callable[[Sequence[ShardTask]], Iterator[ShardResult]]:
    """Return what does tasks in so many processes; one works here, without the cost of another."""

    def run(tasks: Sequence[ShardTask]) -> Iterator[ShardResult]:
        return map(build_shard, tasks) if workers == 1 else _in_processes(tasks, workers)

    return run


def _in_processes(tasks: Sequence[ShardTask], workers: int) -> Iterator[ShardResult]:
    # Spawned, not forked: torch's and GDAL's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)
    try:
        for future in as_completed([executor.submit(build_shard, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most often for want of memory: shard again with fewer --workers; what is "
            "finished is kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """Leave the cores to the other workers."""
    import torch

    torch.set_num_threads(1)
