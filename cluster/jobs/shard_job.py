"""Sharding as tasks of a Ray cluster: job, driver (``python -m cluster.jobs.shard_job FILE``) and tasks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence

from cluster.logs import configure_logging
from sharding.errors import UserError
from sharding.files import read_text
from sharding.format.sidecar import ShardResult
from sharding.run.build import ShardTask, build_shard
from sharding.run.job import ShardJob
from sharding.storage import StorageUnavailableError
from sharding.terminal import say

logger = logging.getLogger(__name__)

RETRIES = 3
"""Number of retries of a task whose node was lost or whose store did not answer."""


def tasks_on_ray(workers: int | None) -> Callable[[Sequence[ShardTask]], Iterator[ShardResult]]:
    """Return a runner of tasks on the cluster that this process has joined; by default as many at a time as fit.

    A lost node loses no work: Ray retries its tasks on other nodes, and shards already published are kept.
    """

    def run(tasks: Sequence[ShardTask]) -> Iterator[ShardResult]:
        import ray  # Ray is slow to import

        remote = ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=[StorageUnavailableError])(_build)
        waiting, running = list(reversed(tasks)), list[object]()
        while waiting or running:
            while waiting and (workers is None or len(running) < workers):
                running.append(remote.remote(waiting.pop()))
            done, running = ray.wait(running)
            for reference in done:
                yield _result(reference)

    return run


def _build(task: ShardTask) -> ShardResult:
    """Run a task in a Ray worker, on the worker's one core."""
    import torch  # slow to import, and the driver does not need it

    configure_logging(rank=1)
    torch.set_num_threads(1)
    return build_shard(task)


def _result(reference: object) -> ShardResult:
    import ray  # Ray is slow to import

    try:
        result: ShardResult = ray.get(reference)
        return result
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):  # the original error; ray's own text is a traceback
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a task was lost {RETRIES + 1} times ({type(error).__name__}), most often for lack of memory: shard again "
            "with fewer --workers; finished shards are kept"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job in a file and return its exit status: 0, 2 for a user's mistake."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    configure_logging()
    import ray  # Ray is slow to import

    from sharding.cli import run_shard  # after logging is set up

    try:
        job = ShardJob.from_json(read_text("the job's file", path))
        ray.init(address="auto", logging_level=logging.WARNING)
        return run_shard(job, tasks_on_ray(job.workers))
    except UserError as error:
        say(f"satfusion: error: {error}", sys.stderr)
        return 2


if __name__ == "__main__":
    # Run under the module's own name, so that the workers import the function instead of getting a copy of this module.
    from cluster.jobs import shard_job as shard

    sys.exit(shard.main())
