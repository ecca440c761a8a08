"""Processes of this machine that make shards.

They are forked from one process that has loaded torch and GDAL and done nothing else, since threads do not survive a
fork: so each starts at once, and shares the libraries' memory with the others.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver
from typing import TYPE_CHECKING

from sharding.errors import UserError

if TYPE_CHECKING:
    from sharding.run.build import ShardResult, ShardTask


def processes(workers: int) -> Callable[[Sequence[ShardTask]], Iterator[ShardResult]]:
    """Return what does tasks in so many processes; one works here, without the cost of another.

    Several begin to load their libraries now, while their work is planned: call it early.

    Raises:
        UserError: for less than one.
    """
    if workers < 1:
        raise UserError(f"--workers {workers} is too small: the least is 1")
    if workers > 1:
        _start_loading()

    def run(tasks: Sequence[ShardTask]) -> Iterator[ShardResult]:
        # Not before: it loads torch, which the processes do at the same time.
        from sharding.run.build import build_shard

        return map(build_shard, tasks) if workers == 1 else _in_processes(build_shard, tasks, workers)

    return run


def _start_loading() -> None:
    """Start the process that the workers are forked from."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["sharding.run.preload"])
    # It would look for modules in the current folder first, as this command does not.
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _in_processes(
    build: Callable[[ShardTask], ShardResult], tasks: Sequence[ShardTask], workers: int
) -> Iterator[ShardResult]:
    context = multiprocessing.get_context("forkserver")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(dict(os.environ),))
    try:
        for future in as_completed([executor.submit(build, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most often for want of memory: shard again with fewer --workers; what is "
            "finished is kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(environment: Mapping[str, str]) -> None:
    """Prepare a worker: the environment of now, cores left to the other workers, and no life after the command's."""
    import torch  # imports torch, which other verbs need not wait for

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that gave it work is killed: its tasks would be waited for for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    connection.wait([parent.sentinel])
    os._exit(1)
