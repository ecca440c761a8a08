"""Training inside a Ray job: the driver (``python -m cluster.jobs.train_job FILE``) and the function of each rank."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.jobs.failures import failures_of_ranks, understand
from cluster.jobs.notice import Stopped, Watch, listen, start_notice, stops_on
from cluster.jobs.placement import Placement, worlds
from cluster.jobs.room import Drain, Growth, Sizes, await_room, release_room
from cluster.logs import configure_logging
from pipeline.signals import STOPPED_STATUS
from sharding.errors import UserError
from sharding.files import read_text
from sharding.format.index import INDEX_NAME
from sharding.schema import JobFile
from sharding.scratch import scratch_folder
from sharding.storage import StorageUnavailableError, open_storage
from sharding.storage.lock import JOB_VARIABLE
from sharding.terminal import say

logger = logging.getLogger(__name__)

ConfigValues = Mapping[str, Any]
RankFunction = Callable[[ConfigValues, threading.Event], bool]
# Time for a store to recover, and for Ray to notice that a node is lost.
_RESTART_PAUSE_SECONDS = 5.0


@dataclass(frozen=True)
class Job(JobFile):
    """Complete description of a job, sent in a file beside the code."""

    config: ConfigValues
    """The resolved run configuration, `RunConfig.to_dict`."""
    placement: Placement
    """Ranks and their resources."""
    about: str = ""
    """Remark for a reader of the file; it has no effect."""


def train_rank(config: ConfigValues, stop: threading.Event) -> bool:
    """Train on one rank; Ray Train has joined the process group and calls this in each worker.

    Returns:
        Whether the run is complete; False if it stopped at a checkpoint because ``stop`` was set.
    """
    import ray.train  # Ray is slow to import

    from pipeline.config import RunConfig  # slow: imports torch
    from pipeline.training.loop import run_training

    run = RunConfig.from_dict(config)
    return not run_training(run, lambda metrics: ray.train.report(dict(metrics)), stop).stopped


@dataclass(frozen=True)
class _Announced:
    """A rank's function that prints the rank's node and logs a traceback of its errors."""

    function: RankFunction
    """Function called with the configuration, and an event that is set when it is to stop at a checkpoint."""
    name: str
    """Name of the job, which holds the lock of the run folder through all restarts of its ranks."""
    notice: Any = None
    """Handle of the actor that holds the request to stop, and learns the ranks' nodes."""

    def __call__(self, config: ConfigValues) -> bool:
        import ray.train  # Ray is slow to import
        import ray.util

        context = ray.train.get_context()
        rank, size = context.get_world_rank(), context.get_world_size()
        configure_logging(rank)
        os.environ[JOB_VARIABLE] = self.name
        say(f"rank {rank} of {size} runs on node {ray.util.get_node_ip_address()}")
        self.notice.place.remote(ray.get_runtime_context().get_node_id())
        try:
            # The request of one rank is enough.
            return self.function(config, listen(self.notice) if rank == 0 else threading.Event())
        except UserError:
            raise  # The driver reports it, once.
        except Exception:
            logger.exception("rank %d failed", rank)
            raise


def run_job(job: Job, rank_function: RankFunction = train_rank) -> None:
    """Run ``rank_function`` on every rank; after a failed or lost rank, run it again from the newest checkpoint.

    A user error ends the job at once, because a retry would fail too. A store that does not answer before the first
    attempt ends the job too; later it counts as a failure of the rank, because stores recover. An elastic job has at
    each attempt the largest number of ranks that fits. To grow it, and to leave a node that Ray drains, the ranks of a
    job stop at a checkpoint, which is no failure.

    Args:
        job: Configuration and placement.
        rank_function: Called with ``job.config`` in each worker; must be importable by name.

    Raises:
        UserError: A rank raised one, the cluster is too small, or a store does not answer.
        Stopped: SIGTERM arrived, and the ranks have written a checkpoint.
        ray.exceptions.RayError: Ray Train's controller was lost more often than the placement allows.
        ray.train.TrainingFailedError: More failures than the placement allows.
    """
    import ray  # Ray is slow to import
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError

    placement, train = job.placement, job.config["train"]
    sizes = Sizes(worlds(placement, train["global_batch"], train["micro_batch"]))
    ray.init(address="auto", logging_level=logging.WARNING)
    _ask_stores(job.config)
    notice = start_notice()
    name = os.environ.get(JOB_VARIABLE) or f"on Ray, {uuid.uuid4().hex[:12]}"
    failures = 0
    with stops_on(signal.SIGTERM) as stops:
        while True:
            release_room()
            world = await_room(placement, sizes.now(), stops)
            if stops.is_set():
                raise Stopped
            if placement.elastic:
                logger.info("%d ranks of %s", world, placement.workers)
            notice.begin.remote()
            try:
                with Watch(notice, stops, Drain(notice), Growth(placement, sizes, world)):
                    if _fit(job, _Announced(rank_function, name, notice), world):
                        return
                if stops.is_set():
                    raise Stopped
                sizes.started(world)
                logger.info("the ranks stopped at a checkpoint, to start again")
                continue
            except (TrainingFailedError, RayActorError) as error:
                failure = understand(error)
                if failure.kind == "mistake" and failure.mistake:
                    raise failure.mistake from None
                if failure.kind == "busy":
                    logger.info("%s; they are counted again", failure.reason)
                    sizes.failed(world)
                    continue
                sizes.started(world)
                failures += 1
                if failures > placement.max_failures:
                    if failure.mistake:
                        raise failure.mistake from None
                    logger.error("%s; restarts allowed: %d", failure.reason, placement.max_failures)
                    raise
                logger.warning(
                    "%s; restart %d of %d resumes from the newest checkpoint",
                    failure.reason,
                    failures,
                    placement.max_failures,
                )
            stops.wait(_RESTART_PAUSE_SECONDS)
            # New processes wait only a moment for a store; this one knows that it was there, and waits for its return.
            with suppress(StorageUnavailableError):  # The ranks meet it then, and it counts.
                _ask_stores(job.config)


def _ask_stores(config: ConfigValues) -> None:
    """Refuse a dataset or run folder whose store does not answer, before a rank is started."""
    from pipeline.config import RunConfig  # slow: imports torch

    run = RunConfig.from_dict(config)
    for uri in (*run.data.uris, run.output.uri):
        try:
            open_storage(uri, wait_seconds=run.data.store_wait_seconds).exists(INDEX_NAME)
        except StorageUnavailableError:
            raise
        except UserError:
            pass  # Keys and objects are checked by the ranks: their nodes may have other keys than this one.


def _fit(job: Job, announced: _Announced, world: int) -> bool:
    """Train with ``world`` ranks; return whether the run is complete."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig  # Ray is slow to import
    from ray.train.torch import TorchConfig, TorchTrainer

    placement = job.placement
    # Ray requires a folder for its own state. Our state is in the run folder, so this one may be lost.
    with scratch_folder("ray-train") as folder:
        result = TorchTrainer(
            announced,
            train_loop_config=dict(job.config),
            torch_config=TorchConfig(backend=placement.backend),
            scaling_config=ScalingConfig(
                num_workers=world,
                use_gpu=placement.gpus_per_worker > 0,
                resources_per_worker=placement.resources,
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name="train",
                storage_path=str(folder),
                # Restarts are counted by `run_job`, which can distinguish a user error from a lost node.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                # Ray would repeat every rank's traceback three times; ranks and driver log it once.
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        ).fit()
    return bool(result.return_value)


def _log_failure(error: Exception) -> None:
    failures = failures_of_ranks(error)
    if not failures:
        logger.error("the job failed", exc_info=error)
    for rank, text in failures.items():  # Their tracebacks are in the log already.
        logger.error("the job failed at rank %d: %s", rank, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job in a file and return its exit status: 0, 2 for a user error, 75 if it was stopped, else 1."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    configure_logging()
    try:
        run_job(Job.from_json(read_text("the job's file", path)))
    except UserError as error:
        say(f"satfusion: error: {error}", sys.stderr)
        return 2
    except Stopped:
        logger.warning("the job was stopped, at its newest checkpoint: submit the same run again to resume it")
        return STOPPED_STATUS
    except Exception as error:
        _log_failure(error)
        return 1
    return 0


if __name__ == "__main__":
    # Run under the module's own name, so that the workers import the function instead of getting a copy of this module.
    from cluster.jobs import train_job as worker

    sys.exit(worker.main())
