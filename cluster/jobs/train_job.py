"""Training inside a Ray job: the driver (``python -m cluster.jobs.train_job FILE``) and the function of each rank."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from cluster.logs import configure_logging
from sharding.arguments import check_values
from sharding.errors import UserError
from sharding.files import read_text
from sharding.format.index import INDEX_NAME
from sharding.schema import decode_strictly
from sharding.scratch import scratch_folder
from sharding.storage import StorageUnavailableError, open_storage
from sharding.storage.lock import JOB_VARIABLE
from sharding.terminal import say

logger = logging.getLogger(__name__)

ConfigValues = Mapping[str, Any]
# Time for a store to recover, and for Ray to notice that a node is lost.
_RESTART_PAUSE_SECONDS = 5.0
_ROOM_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Placement:
    """Number of ranks of a job, and the resources of each."""

    workers: Annotated[int, Meta(ge=1, le=100_000)]
    """Ranks, at least 1; spread over the nodes."""
    cpus_per_worker: Annotated[float, Meta(gt=0, le=10_000)] = field(default=1.0, metadata={"metavar": "C"})
    """CPUs that Ray reserves for each rank, above 0. `train.threads_per_rank` sets the threads."""
    gpus_per_worker: Annotated[float, Meta(ge=0, le=1000)] = field(default=0.0, metadata={"metavar": "G"})
    """GPUs of each rank, a whole number: 0 trains on CPU with gloo, more on CUDA with NCCL."""
    max_failures: Annotated[int, Meta(ge=0, le=10**6)] = 2
    """Restarts after a lost or failed rank or an unavailable store, 0 or more; each resumes from the newest
    checkpoint."""
    wait_for_resources: Annotated[float, Meta(ge=0, le=10**7)] = field(default=0.0, metadata={"metavar": "SECONDS"})
    """Seconds that a cluster which is too small gets to grow, before the first attempt and each restart; 0 refuses at
    once."""

    def __post_init__(self) -> None:
        check_values(self)
        if not float(self.gpus_per_worker).is_integer():
            # NCCL refuses two ranks on one GPU.
            raise UserError(f"--gpus-per-worker {self.gpus_per_worker:g} is no whole number: give 0 or more GPUs")

    @property
    def resources(self) -> dict[str, float]:
        """Return the resources that Ray reserves for each rank."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}

    @property
    def backend(self) -> str:
        """Return the communication backend of torch's process group."""
        return "nccl" if self.gpus_per_worker else "gloo"


@dataclass(frozen=True)
class Job:
    """Complete description of a job, sent in a file beside the code."""

    config: ConfigValues
    """The resolved run configuration, `RunConfig.to_dict`."""
    placement: Placement
    """Ranks and their resources."""
    about: str = ""
    """Remark for a reader of the file; it has no effect."""

    def to_json(self) -> str:
        """Return the JSON that `from_json` reads back unchanged."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read the JSON of `to_json`.

        Raises:
            UserError: For an unknown key, a wrong type or a value out of range.
        """
        return decode_strictly(text, cls, "the job's file")


def train_rank(config: ConfigValues) -> None:
    """Train on one rank; Ray Train has joined the process group and calls this in each worker."""
    import ray.train  # Ray is slow to import

    from pipeline.config import RunConfig  # slow: imports torch
    from pipeline.training.loop import run_training

    run_training(RunConfig.from_dict(config), report=lambda metrics: ray.train.report(dict(metrics)))


@dataclass(frozen=True)
class _Announced:
    """A rank's function that prints the rank's node and logs a traceback of its errors."""

    function: Callable[[ConfigValues], None]
    """Function called with the configuration."""
    name: str
    """Name of the job, which holds the lock of the run folder through all restarts of its ranks."""

    def __call__(self, config: ConfigValues) -> None:
        import ray.train  # Ray is slow to import
        import ray.util

        context = ray.train.get_context()
        rank, size = context.get_world_rank(), context.get_world_size()
        configure_logging(rank)
        os.environ[JOB_VARIABLE] = self.name
        say(f"rank {rank} of {size} runs on node {ray.util.get_node_ip_address()}")
        try:
            self.function(config)
        except UserError:
            raise  # The driver reports it, once.
        except Exception:
            logger.exception("rank %d failed", rank)
            raise


def run_job(job: Job, rank_function: Callable[[ConfigValues], None] = train_rank) -> None:
    """Run ``rank_function`` on every rank; after a failed or lost rank, run it again from the newest checkpoint.

    A user error ends the job at once, because a retry would fail too. A store that does not answer before the first
    attempt ends the job too; later it counts as a failure of the rank, because stores recover.

    Args:
        job: Configuration and placement.
        rank_function: Called with ``job.config`` in each worker; must be importable by name.

    Raises:
        UserError: A rank raised one, the cluster is too small, or a store does not answer.
        ray.train.TrainingFailedError: More failures than the placement allows.
    """
    import ray  # Ray is slow to import
    from ray.train import TrainingFailedError

    ray.init(address="auto", logging_level=logging.WARNING)
    _ask_stores(job.config)
    announced = _Announced(rank_function, os.environ.get(JOB_VARIABLE) or f"on Ray, {uuid.uuid4().hex[:12]}")
    for failures in range(job.placement.max_failures + 1):
        _await_room(job.placement)
        try:
            _fit(job, announced)
            return
        except TrainingFailedError as error:
            mistake = _user_error(error)
            last = failures == job.placement.max_failures
            if mistake and (last or not isinstance(mistake, StorageUnavailableError)):
                raise mistake from None
            if last:
                raise
            logger.warning(
                "%s; restart %d of %d resumes from the newest checkpoint",
                mistake or "a rank failed or was lost",
                failures + 1,
                job.placement.max_failures,
            )
            time.sleep(_RESTART_PAUSE_SECONDS)


def _ask_stores(config: ConfigValues) -> None:
    """Refuse a dataset or run folder whose store does not answer, before a rank is started."""
    from pipeline.config import RunConfig  # slow: imports torch

    run = RunConfig.from_dict(config)
    for uri in (*run.data.uris, run.output.uri):
        try:
            open_storage(uri).exists(INDEX_NAME)
        except StorageUnavailableError:
            raise
        except UserError:
            pass  # Keys and objects are checked by the ranks: their nodes may have other keys than this one.


def _await_room(placement: Placement) -> None:
    """Refuse a cluster whose nodes are too few or too small after its time to grow; wait for busy nodes."""
    import ray  # Ray is slow to import
    from ray.util import placement_group, remove_placement_group

    if _room(placement, ray.nodes()) >= placement.workers:
        return
    # An autoscaler grows a cluster by the resources that are requested.
    demand = placement_group([placement.resources] * placement.workers, strategy="SPREAD")
    try:
        deadline = time.monotonic() + placement.wait_for_resources
        while (room := _room(placement, ray.nodes())) < placement.workers:
            if time.monotonic() >= deadline:
                raise UserError(_too_small(placement, room))
            time.sleep(_ROOM_POLL_SECONDS)
    finally:
        remove_placement_group(demand)


def _room(placement: Placement, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of ranks that fit on the cluster's nodes (as in `ray.nodes`) if nothing else runs there."""

    def parts(amount: float) -> int:
        return round(amount * 10_000)  # Like Ray's count, without binary rounding.

    return sum(
        min(parts(node["Resources"].get(name, 0.0)) // parts(each) for name, each in placement.resources.items())
        for node in nodes
        if node["Alive"]
    )


def _too_small(placement: Placement, room: int) -> str:
    each = " and ".join(f"{amount:g} {name}" for name, amount in placement.resources.items())
    waited = f" after {placement.wait_for_resources:g} s" if placement.wait_for_resources else ""
    return (
        f"--workers is {placement.workers} with {each} each, and the cluster has room for {room}{waited}: ask for less,"
        " or give a cluster that grows time with --wait-for-resources SECONDS"
    )


def _fit(job: Job, announced: _Announced) -> None:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig  # Ray is slow to import
    from ray.train.torch import TorchConfig, TorchTrainer

    placement = job.placement
    # Ray requires a folder for its own state. Our state is in the run folder, so this one may be lost.
    with scratch_folder("ray-train") as folder:
        TorchTrainer(
            announced,
            train_loop_config=dict(job.config),
            torch_config=TorchConfig(backend=placement.backend),
            scaling_config=ScalingConfig(
                num_workers=placement.workers,
                use_gpu=placement.gpus_per_worker > 0,
                resources_per_worker=placement.resources,
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name="train",
                storage_path=str(folder),
                # Restarts are counted by `run_job`, which can distinguish a user error from a lost node.
                failure_config=FailureConfig(max_failures=0),
                # Ray would repeat every rank's traceback three times; ranks and driver log it once.
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        ).fit()


def _user_error(error: Exception) -> UserError | None:
    """Return the `UserError` that a rank raised, if any; prefer a permanent one to one that may pass."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    # One rank's error often breaks the connections of the others, so check all of them.
    mistakes = [failure for _, failure in sorted(failures.items()) if isinstance(failure, UserError)]
    return min(mistakes, key=lambda mistake: isinstance(mistake, StorageUnavailableError), default=None)


def _log_failure(error: Exception) -> None:
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        logger.error("the job failed", exc_info=error)
    for rank, failure in sorted(failures.items()):  # Their tracebacks are in the log already.
        logger.error("the job failed at rank %d: %s: %s", rank, type(failure).__name__, failure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job in a file and return its exit status: 0, 2 for a user error, 1 for any other failure."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    configure_logging()
    try:
        run_job(Job.from_json(read_text("the job's file", path)))
    except UserError as error:
        say(f"satfusion: error: {error}", sys.stderr)
        return 2
    except Exception as error:
        _log_failure(error)
        return 1
    return 0


if __name__ == "__main__":
    # Run under the module's own name, so that the workers import the function instead of getting a copy of this module.
    from cluster.jobs import train_job as worker

    sys.exit(worker.main())
