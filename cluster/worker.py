"""What runs inside a Ray job: its driver (``python -m cluster.worker FILE``) and the function of each rank."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.logs import configure_logging
from sharding.errors import UserError

logger = logging.getLogger(__name__)

ConfigValues = Mapping[str, object]


@dataclass(frozen=True)
class Placement:
    """How many ranks a job has and what each takes from the cluster."""

    workers: int
    """Ranks, at least 1; spread over the nodes."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray sets aside for each rank, above 0. Threads are `train.threads_per_rank`'s matter."""
    gpus_per_worker: float = 0.0
    """GPUs of each rank: 0 trains on CPU over gloo, more on CUDA over NCCL."""
    max_failures: int = 2
    """Restarts after a lost or failed rank, 0 or more. Each goes on from the run folder's newest checkpoint."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"--workers is {self.workers}: give at least 1")
        if self.cpus_per_worker <= 0:
            raise UserError(f"--cpus-per-worker is {self.cpus_per_worker:g}: give a number above 0")
        if self.gpus_per_worker < 0:
            raise UserError(f"--gpus-per-worker is {self.gpus_per_worker:g}: give 0 or more")
        if self.max_failures < 0:
            raise UserError(f"--max-failures is {self.max_failures}: give 0 or more")

    @property
    def backend(self) -> str:
        """Communication of torch's process group."""
        return "nccl" if self.gpus_per_worker else "gloo"


@dataclass(frozen=True)
class Job:
    """The whole of a job, as it travels in a file beside the code."""

    config: ConfigValues
    """The resolved run configuration, `RunConfig.to_dict`."""
    placement: Placement
    """Ranks and their resources."""

    def to_json(self) -> str:
        """Return it as JSON that `from_json` reads back unchanged."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(config=values["config"], placement=Placement(**values["placement"]))


def train_rank(config: ConfigValues) -> None:
    """Train on one rank; Ray Train has joined the process group and calls this in each worker."""
    import ray.train

    from pipeline.config import RunConfig
    from pipeline.train import run_training

    run_training(RunConfig.from_dict(config), report=lambda metrics: ray.train.report(dict(metrics)))


@dataclass(frozen=True)
class _Announced:
    """A rank's function, with a line for where it runs and a traceback for what it meets."""

    function: Callable[[ConfigValues], None]
    """Called with the configuration."""

    def __call__(self, config: ConfigValues) -> None:
        import ray.train
        import ray.util

        context = ray.train.get_context()
        rank, size = context.get_world_rank(), context.get_world_size()
        configure_logging(rank)
        print(f"rank {rank} of {size} runs on node {ray.util.get_node_ip_address()}", flush=True)
        try:
            self.function(config)
        except UserError:
            raise  # The driver says it, once.
        except Exception:
            logger.exception("rank %d failed", rank)
            raise


def run_job(job: Job, rank_function: Callable[[ConfigValues], None] = train_rank) -> None:
    """Run ``rank_function`` on every rank, and again from the newest checkpoint when a rank fails or is lost.

    Args:
        job: Configuration and placement.
        rank_function: Called with ``job.config`` in each worker; must be importable by name.

    Raises:
        UserError: The ranks met one; it is not tried again, since the next try would meet it too.
        ray.train.TrainingFailedError: More failures than the placement allows.
    """
    import ray
    from ray.train import TrainingFailedError

    ray.init(address="auto", logging_level=logging.WARNING)
    _warn_if_too_small(job.placement, ray.cluster_resources())
    for failures in range(job.placement.max_failures + 1):
        try:
            _fit(job, rank_function)
            return
        except TrainingFailedError as error:
            _raise_user_error(error)
            if failures == job.placement.max_failures:
                raise
            logger.warning(
                "a rank failed or was lost; restart %d of %d goes on from the newest checkpoint",
                failures + 1,
                job.placement.max_failures,
            )


def _fit(job: Job, rank_function: Callable[[ConfigValues], None]) -> None:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    placement = job.placement
    resources = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        resources["GPU"] = placement.gpus_per_worker
    # Ray wants a folder for its own state. Ours goes to the run folder, so this one may be lost.
    with tempfile.TemporaryDirectory(prefix="satfusion-ray-train-") as folder:
        TorchTrainer(
            _Announced(rank_function),
            train_loop_config=dict(job.config),
            torch_config=TorchConfig(backend=placement.backend),
            scaling_config=ScalingConfig(
                num_workers=placement.workers,
                use_gpu=placement.gpus_per_worker > 0,
                resources_per_worker=resources,
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name="train",
                storage_path=folder,
                # Restarts are counted by `run_job`, which can tell a user's mistake from a lost node.
                failure_config=FailureConfig(max_failures=0),
                # It would repeat every rank's traceback three times; ranks and driver log them once themselves.
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        ).fit()


def _raise_user_error(error: Exception) -> None:
    """Raise the `UserError` that a rank met, if one did."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for rank in sorted(failures):
        # One rank's mistake often ends the others in a broken connection, so look at all.
        if isinstance(failures[rank], UserError):
            raise failures[rank] from None


def _warn_if_too_small(placement: Placement, available: Mapping[str, float]) -> None:
    for name, each in (("CPU", placement.cpus_per_worker), ("GPU", placement.gpus_per_worker)):
        wanted, there = each * placement.workers, available.get(name, 0.0)
        if wanted > there:
            logger.warning(
                "%d workers want %g %s, the cluster has %g: waiting for it to grow",
                placement.workers,
                wanted,
                name,
                there,
            )


def _log_failure(error: Exception) -> None:
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        logger.error("the job failed", exc_info=error)
    for rank, failure in sorted(failures.items()):  # Their tracebacks stand in the log already.
        logger.error("the job failed at rank %d: %s: %s", rank, type(failure).__name__, failure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job in a file and return its exit status: 0, 2 for a user's mistake, 1 for any other failure."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    configure_logging()
    try:
        run_job(Job.from_json(Path(path).read_text()))
    except UserError as error:
        print(f"satfusion: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        _log_failure(error)
        return 1
    return 0


if __name__ == "__main__":
    # Under its own name, so that the workers import the function instead of being sent a copy of this module.
    from cluster import worker

    sys.exit(worker.main())
