"""Runs of a sweep as tasks of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cluster.jobs.notice import Stopped, stops_on
from cluster.logs import configure_logging
from cluster.sweep.options import SweepOptions
from cluster.sweep.run import Outcome
from pipeline.config import RunConfig
from pipeline.training.device_memory import out_of_memory
from sharding.errors import UserError
from sharding.storage import StorageUnavailableError
from sharding.storage.lock import JOB_VARIABLE

logger = logging.getLogger(__name__)

RETRIES = 3
"""Restarts of a run whose node was lost or whose store did not answer; each resumes from its newest checkpoint."""
_POLL_SECONDS = 1.0


def cells_on_ray(options: SweepOptions) -> Callable[[Sequence[RunConfig]], Iterator[Outcome]]:
    """Return a runner of tasks on the cluster that this process has joined; Ray runs as many at once as fit.

    It raises `Stopped` after SIGTERM: runs that train have stopped at a checkpoint then, and no other one has begun.
    """

    def run(cells: Sequence[RunConfig]) -> Iterator[Outcome]:
        import ray  # Ray is slow to import

        _refuse_too_small(options, ray.nodes())
        remote = ray.remote(
            num_cpus=options.cpus_per_run,
            num_gpus=options.gpus_per_run,
            max_retries=RETRIES,
            retry_exceptions=[StorageUnavailableError],
            max_calls=1,  # DeepSpeed forms one process group in the life of a process
        )(_run_cell)
        job = os.environ.get(JOB_VARIABLE) or f"sweep on Ray, {uuid.uuid4().hex[:12]}"
        running = {remote.remote(cell.to_dict(), options.split, f"{job}, {cell.output.uri}"): cell for cell in cells}
        asked, all_done = False, True
        with stops_on(signal.SIGTERM) as stops:
            while running:
                if stops.is_set() and not asked:
                    asked = True
                    for reference in running:
                        ray.cancel(reference)
                for reference in ray.wait(list(running), timeout=_POLL_SECONDS)[0]:
                    cell, reason = running.pop(reference), _reason(reference)
                    if reason is None:
                        all_done = False
                    else:
                        yield Outcome(cell, reason)
        if not all_done:
            raise Stopped

    return run


def _run_cell(config: Mapping[str, Any], split: str, job: str) -> bool:
    """Train a run in a Ray worker; ``job`` holds the lock of its folder through all restarts."""
    from cluster.sweep.cell import run_cell  # slow: imports torch

    configure_logging()
    os.environ[JOB_VARIABLE] = job
    # Ray interrupts a task that is cancelled as Ctrl-C does. A question to an actor would not do: Ray lends the CPUs of
    # a task that waits for an answer to another one.
    return run_cell(config, split, lambda: stops_on(signal.SIGINT))


def _reason(reference: object) -> str | None:
    """Return why a task failed; empty if it is done, None if it was stopped."""
    import ray  # Ray is slow to import

    try:
        if not ray.get(reference):
            return None
    except ray.exceptions.TaskCancelledError:
        return None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            return str(error.cause)
        if words := out_of_memory(error.cause):
            return f"it {words}"
        logger.error("a run failed", exc_info=error)
        return f"{type(error.cause).__name__}, see the log"
    except ray.exceptions.RayError as error:
        return f"its process was lost {RETRIES + 1} times ({type(error).__name__}), most often for lack of memory"
    return ""


def _refuse_too_small(options: SweepOptions, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a cluster none of whose nodes (as in `ray.nodes`) can hold a run: its tasks would wait for ever."""
    for node in nodes:
        if node["Alive"] and all(node["Resources"].get(name, 0) >= each for name, each in options.resources.items()):
            return
    each = " and ".join(f"{amount:g} {name}" for name, amount in options.resources.items())
    raise UserError(
        f"no node of the cluster has {each} for a run: give less with --cpus-per-run and --gpus-per-run, or add nodes"
    )
