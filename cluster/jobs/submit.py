"""From a configuration to a Ray job: build the request (pure), send it once, follow its log."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cluster.jobs.placement import Placement, worlds
from cluster.jobs.server import GRACE_SECONDS, connect, first_line, follow, how_to_follow, jobs_of
from cluster.jobs.train_job import Job
from cluster.logs import PACKAGES
from cluster.output import OutputError, ReaderGoneError
from sharding.errors import UserError
from sharding.names import refuse_secret
from sharding.schema import JobFile, decode
from sharding.scratch import scratch_folder
from sharding.terminal import say

if TYPE_CHECKING:
    from cluster.sweep.plan import SweepJob
    from pipeline.config import RunConfig
    from pipeline.jobs import EvaluateJob, PredictJob
    from sharding.run.job import ShardJob

# Variables with which a worker finds the storage. Keys are not among them: each node has its own credential chain.
_TRAVELLING = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_NO_SIGN_REQUEST",
    "AWS_REQUEST_PAYER",
)
_RAY_HABITS = {
    # Otherwise lines are held back to merge equal ones, and coloured.
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    # It only warns that a node will be lost; the job resumes from the newest checkpoint either way.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Where nodes are busy or slow, ranks get three minutes to start before the room for them is counted again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    # Time for a checkpoint between the request to stop and the driver's end by force.
    "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_SECONDS),
}
JOB_FILE = "job.json"
"""Name of the file that describes a job to its driver."""
TRAIN_DRIVER = "python -m cluster.jobs.train_job"
"""Command of a training job's driver; the path of its job's file follows."""
_RUN, _DESCRIPTION = "run", "job"
"""Keys of a job's metadata: the URI of its run folder, and its description."""
_INTERRUPTED = 130


@dataclass(frozen=True)
class JobRequest:
    """Everything that is sent to the cluster, except the packages' code."""

    job: JobFile
    """Description of the job; sent in a file beside the code."""
    environment: Mapping[str, str]
    """Environment variables of the driver and of each rank."""
    metadata: Mapping[str, str]
    """Metadata shown by Ray's dashboard."""
    entrypoint: str = f"{TRAIN_DRIVER} {JOB_FILE}"
    """Command of the job's driver, run in the folder that `staged` makes."""


def build_request(config: RunConfig, placement: Placement, environment: Mapping[str, str], folder: Path) -> JobRequest:
    """Build the request for a training job.

    Args:
        config: The run; relative local paths in it are taken from ``folder``.
        placement: Ranks and their resources.
        environment: The submitter's variables; endpoint and region are sent with the job.
        folder: The submitter's working directory.

    Raises:
        UserError: The global batch does not divide by any allowed number of ranks, or an endpoint holds a password.
    """
    worlds(placement, config.train.global_batch, config.train.micro_batch)
    # A rank works in a folder of Ray's, where a relative path would be wrong.
    config = config.with_absolute_uris(folder)
    # Ray leaves a node's GPUs visible to a rank without GPUs.
    no_gpus = {} if placement.gpus_per_worker else {"CUDA_VISIBLE_DEVICES": ""}
    return JobRequest(
        job=Job(config.to_dict(), placement),
        environment={**_travelling(environment), **no_gpus, **_RAY_HABITS},
        metadata={_RUN: config.output.uri, "workers": str(placement.workers)},
    )


def build_verb_request(
    job: ShardJob | PredictJob | EvaluateJob, environment: Mapping[str, str], folder: Path
) -> JobRequest:
    """Build the request for sharding, predicting or evaluating on a cluster.

    Args:
        job: The command's options; relative local paths in it are taken from ``folder``.
        environment: The submitter's variables; endpoint and region are sent with the job.
        folder: The submitter's working directory.

    Raises:
        UserError: An endpoint holds a password.
    """
    job = job.with_absolute_paths(folder)
    return JobRequest(
        job=job,
        environment={**_travelling(environment), "CUDA_VISIBLE_DEVICES": "", **_RAY_HABITS},
        metadata={job.verb: job.output or ""},
        entrypoint=f"python -m cluster.jobs.verb_job {job.verb} {JOB_FILE}",
    )


def build_sweep_request(job: SweepJob, environment: Mapping[str, str]) -> JobRequest:
    """Build the request for a sweep on a cluster.

    Args:
        job: The sweep, without relative local paths.
        environment: The submitter's variables; endpoint and region are sent with the job.

    Raises:
        UserError: An endpoint holds a password.
    """
    no_gpus = {} if job.options.gpus_per_run else {"CUDA_VISIBLE_DEVICES": ""}
    return JobRequest(
        job=job,
        environment={**_travelling(environment), **no_gpus, **_RAY_HABITS},
        metadata={"sweep": str(job.config["output"]["uri"])},
        entrypoint=f"python -m cluster.sweep.job {JOB_FILE}",
    )


def _travelling(environment: Mapping[str, str]) -> dict[str, str]:
    travelling = {name: environment[name] for name in _TRAVELLING if environment.get(name)}
    for name, value in travelling.items():
        refuse_secret(name, value)
    return travelling


@contextlib.contextmanager
def staged(request: JobRequest) -> Iterator[Path]:
    """Make a folder with exactly the files of a job: the four packages and the job's file."""
    with scratch_folder("job") as folder:
        for package in PACKAGES:
            source = importlib.import_module(package).__path__[0]
            shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        (folder / JOB_FILE).write_text(request.job.to_json())
        yield folder


def send(request: JobRequest, address: str) -> str:
    """Send a job to the job server at ``address``, for example ``http://head:8265``, and return the job's id.

    Raises:
        UserError: No Ray job server answers there, or it refuses the job.
    """
    client = connect(address)
    # Ray passes the metadata in one environment variable, which a list of many AOIs would not fit into.
    described = {_DESCRIPTION: json.dumps(json.loads(request.job.to_json()))} if _RUN in request.metadata else {}
    with staged(request) as folder:
        try:
            job_id: str = client.submit_job(
                entrypoint=request.entrypoint,
                runtime_env={"working_dir": str(folder), "env_vars": dict(request.environment)},
                metadata={**request.metadata, **described},
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"the Ray job server at {address} refused the job: {first_line(error)}") from error
    return job_id


def run(request: JobRequest, address: str, output: TextIO) -> int:
    """Send a job, follow it and return its exit status; 130 for Ctrl-C, after which the job continues to run.

    A training that runs already with the same configuration is followed instead.

    Raises:
        UserError: Like `send`, `already_sent` and `follow`.
    """
    job_id = already_sent(request, address)
    if job_id:
        return follow_or_leave(address, job_id, output, f"job {job_id} at {address} trains this run already")
    job_id = send(request, address)
    return follow_or_leave(address, job_id, output, f"job {job_id} sent to {address}")


def follow_or_leave(address: str, job_id: str, output: TextIO, news: str = "") -> int:
    """Say ``news`` of a job, if any, follow it and return its exit status; Ctrl-C leaves it running and returns 130.

    Raises:
        UserError: Like `follow`, and if the output cannot be written: the job runs on then, too.
        ReaderGoneError: Nobody reads the output; the job runs on.
    """
    left = f"satfusion: job {job_id} runs on: {how_to_follow(address, job_id)}"
    try:
        if news:
            say(news, output)
        return follow(address, job_id, output)
    except KeyboardInterrupt:
        say("", sys.stderr)
        say(left, sys.stderr)
        return _INTERRUPTED
    except (OutputError, ReaderGoneError):
        if news:  # else the user has named the job
            say(left, sys.stderr)
        raise


def already_sent(request: JobRequest, address: str) -> str | None:
    """Return the id of the job that trains the same run at ``address``; None if there is none.

    Raises:
        UserError: A job trains into the same run folder with other settings; the message has their names.
    """
    uri = request.metadata.get(_RUN)
    if uri is None:
        return None
    for job in jobs_of(address):
        metadata = job.metadata or {}
        if job.status.is_terminal() or metadata.get(_RUN) != uri:
            continue
        found = differences(metadata.get(_DESCRIPTION, ""), request.job.to_json())
        if found:
            raise UserError(
                f"job {job.submission_id} at {address} trains into {uri} with another {'; '.join(found)}: name another"
                f" output.uri, or end it with `satfusion stop --address {address} {job.submission_id}`"
            )
        return str(job.submission_id)
    return None


def differences(before: str, now: str) -> list[str]:
    """Return the settings in which two descriptions of jobs (JSON) differ, as ``key (value before, now value)``."""
    try:
        old = _flat(decode(before, dict[str, Any]))
    except ValueError:
        return ["description, which this program did not write"]
    new = _flat(decode(now, dict[str, Any]))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name.removeprefix('config.')} ({old.get(name)}, now {new.get(name)})" for name in names]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
