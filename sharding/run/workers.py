"""Worker processes of this machine that build shards.

They are forked from one process that has loaded torch and GDAL and done nothing else, since threads do not survive a
fork. So each starts at once and shares the libraries' memory with the others.
"""

from __future__ import annotations

import contextlib
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
from sharding.schema import check_range
from sharding.scratch import mark_python_folder

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from sharding.format.sidecar import ShardResult
    from sharding.run.build import ShardTask

MOST_WORKERS = 10_000
"""Largest number of shards that are built in parallel, on a cluster too."""


def processes(workers: int) -> Callable[[Sequence[ShardTask]], Iterator[ShardResult]]:
    """Return a runner that builds shards in ``workers`` processes; with 1, in this process.

    With several, the libraries begin to load at once, while the caller plans: call it early.

    Raises:
        UserError: For ``workers`` out of range.
    """
    check_range("--workers", workers, 1, MOST_WORKERS)
    if workers > 1:
        _start_loading()

    def run(tasks: Sequence[ShardTask]) -> Iterator[ShardResult]:
        # Not earlier: it loads torch, and the processes load it at the same time.
        from sharding.run.build import build_shard

        return map(build_shard, tasks) if workers == 1 else _in_processes(build_shard, tasks, workers)

    return run


def _start_loading() -> None:
    """Start the process that the workers are forked from.

    Raises:
        UserError: The temporary folder, which holds its socket, cannot be written to.
    """
    mark_python_folder()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["sharding.run.preload"])
    # It would search the current folder for modules first; this command does not.
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    # It inherits the mask, and so do the workers until `_begin`: Ctrl-C in a terminal reaches them all.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _in_processes(
    build: Callable[[ShardTask], ShardResult], tasks: Sequence[ShardTask], workers: int
) -> Iterator[ShardResult]:
    context = multiprocessing.get_context("forkserver")
    stop = context.Event()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(dict(os.environ), stop))
    try:
        # A process that is interrupted in the middle of starting another one leaves it alone, which fails with a trace.
        with _interrupts_deferred():
            # No name for the futures: it would keep each result until the last, megabytes of histograms a shard.
            done = as_completed([executor.submit(_build, build, task) for task in tasks])
        for future in done:
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most often because memory ran out: shard again with fewer --workers; "
            "finished shards are kept"
        ) from None
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the block; in another thread than the main one, which gets none, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _: caught.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


_interrupted = threading.Event()
"""Set in a worker that got SIGINT."""
_stops: list[Event] = []
"""In a worker, the event that its parent sets when no more shard is wanted."""


def _note_interrupt(*_: object) -> None:
    _interrupted.set()


def _build(build: Callable[[ShardTask], ShardResult], task: ShardTask) -> ShardResult:
    """Build a shard in a worker; SIGINT raises in the build only, since elsewhere Python would print a trace."""
    if _interrupted.is_set() or any(stop.is_set() for stop in _stops):
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return build(task)
    except KeyboardInterrupt:
        _interrupted.set()
        raise
    finally:
        signal.signal(signal.SIGINT, _note_interrupt)


def _begin(environment: Mapping[str, str], stop: Event) -> None:
    """Prepare a worker: the current environment, one torch thread, and an end with the command."""
    import torch  # imports torch, which other verbs need not wait for

    _stops.append(stop)
    signal.signal(signal.SIGINT, _note_interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed: otherwise it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    connection.wait([parent.sentinel])
    os._exit(1)
