"""From a configuration to a Ray job: build the request (pure), send it, follow its log."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import shlex
import shutil
import sys
import time
import urllib.error
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

import msgspec

from cluster.jobs.train_job import Job, Placement
from cluster.logs import PACKAGES
from cluster.token import MODE_VARIABLE, PATH_VARIABLE, ask, authorization, token_file
from sharding.errors import UserError
from sharding.names import refuse_secret
from sharding.schema import decode
from sharding.scratch import scratch_folder
from sharding.terminal import say

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from cluster.sweep.plan import SweepJob
    from pipeline.config import RunConfig
    from sharding.run.job import ShardJob

logger = logging.getLogger(__name__)

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
}
JOB_FILE = "job.json"
"""Name of the file that describes a job to its driver."""
TRAIN_DRIVER = "python -m cluster.jobs.train_job"
"""Command of a training job's driver; the path of its job's file follows."""
_ANSWER_SECONDS = 20.0
_POLL_SECONDS = 0.5
_LOST_SECONDS = 60.0
_INTERRUPTED = 130
# HTTP statuses without a token, and with another one.
_REFUSED = {401, 403}
_REDIRECTS = {301, 302, 303, 307, 308}


class Described(Protocol):
    """Description of a job for its driver."""

    def to_json(self) -> str:
        """Return the text of the job's file."""
        ...


@dataclass(frozen=True)
class JobRequest:
    """Everything that is sent to the cluster, except the packages' code."""

    job: Described
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
        UserError: The global batch does not divide by the ranks, or an endpoint holds a password.
    """
    from pipeline.order import BatchPlan  # slow: imports torch

    BatchPlan.create(config.train.global_batch, config.train.micro_batch, placement.workers)
    # A rank works in a folder of Ray's, where a relative path would be wrong.
    config = config.with_absolute_uris(folder)
    # Ray leaves a node's GPUs visible to a rank without GPUs.
    no_gpus = {} if placement.gpus_per_worker else {"CUDA_VISIBLE_DEVICES": ""}
    return JobRequest(
        job=Job(config.to_dict(), placement),
        environment={**_travelling(environment), **no_gpus, **_RAY_HABITS},
        metadata={"run": config.output.uri, "workers": str(placement.workers)},
    )


def build_shard_request(job: ShardJob, environment: Mapping[str, str], folder: Path) -> JobRequest:
    """Build the request for sharding on a cluster.

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
        metadata={"shard": job.output},
        entrypoint=f"python -m cluster.jobs.shard_job {JOB_FILE}",
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
    client = _connect(address)
    with staged(request) as folder:
        try:
            job_id: str = client.submit_job(
                entrypoint=request.entrypoint,
                runtime_env={"working_dir": str(folder), "env_vars": dict(request.environment)},
                metadata=dict(request.metadata),
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"the Ray job server at {address} refused the job: {_first_line(error)}") from error
    return job_id


def follow(address: str, job_id: str, output: TextIO) -> int:
    """Copy a job's log to ``output``, each line once, until the job ends; return its exit status.

    A broken connection is opened again, and lines already copied are skipped.

    Raises:
        UserError: The job server has not answered for a minute; the job may still run.
    """
    from ray.exceptions import AuthenticationError  # Ray is slow to import
    from ray.job_submission import JobStatus

    client = _connect(address)
    log = _Log(client, job_id, output)
    answered = time.monotonic()
    while True:
        try:
            asyncio.run(log.copy())
            details = client.get_job_info(job_id)
            answered = time.monotonic()
        # The client raises RuntimeError for refusals and broken streams; errors of aiohttp and requests are OSErrors.
        except (RuntimeError, OSError, AuthenticationError) as error:
            if time.monotonic() - answered > _LOST_SECONDS:
                raise UserError(
                    f"the Ray job server at {address} stopped answering ({_first_line(error)}): job {job_id} may still "
                    f"run, {how_to_follow(address, job_id)}"
                ) from error
            details = None
        if details is not None and details.status.is_terminal():
            break
        time.sleep(_POLL_SECONDS)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        logger.error("job %s was stopped", job_id)
        return 1
    # A driver that never started has no status of its own; the reason is only in the message.
    if details.driver_exit_code is None:
        logger.error("job %s failed: %s", job_id, details.message)
    else:
        logger.error("job %s failed with status %d", job_id, details.driver_exit_code)
    return details.driver_exit_code or 1


def run(request: JobRequest, address: str, output: TextIO) -> int:
    """Send a job, follow it and return its exit status; 130 for Ctrl-C, after which the job continues to run.

    Raises:
        UserError: Like `send` and `follow`.
    """
    job_id = send(request, address)
    say(f"job {job_id} sent to {address}", output)
    try:
        return follow(address, job_id, output)
    except KeyboardInterrupt:
        say("", sys.stderr)
        say(f"satfusion: job {job_id} runs on: {how_to_follow(address, job_id)}", sys.stderr)
        return _INTERRUPTED


def how_to_follow(address: str, job_id: str) -> str:
    """Return the commands that follow and stop a job which continues to run."""
    path = token_file(address)
    token = f"{MODE_VARIABLE}=token {PATH_VARIABLE}={shlex.quote(str(path))} " if path else ""
    return (
        f"follow it with `{token}ray job logs --address {address} --follow {job_id}`, "
        f"stop it with `{token}ray job stop --address {address} {job_id}`"
    )


class _Log:
    """A job's log; each line is copied once, even if the stream breaks."""

    def __init__(self, client: JobSubmissionClient, job_id: str, output: TextIO) -> None:
        self._client = client
        self._job_id = job_id
        self._output = output
        self._copied = 0

    async def copy(self) -> None:
        """Copy the lines that were not copied before, until the stream ends."""
        position = 0  # Each stream begins at the log's first character.
        async for text in self._client.tail_job_logs(self._job_id):
            new = text[max(0, self._copied - position) :]
            position += len(text)
            self._copied = max(self._copied, position)
            self._output.write(new)
            self._output.flush()


def _connect(address: str) -> JobSubmissionClient:
    """Return a client of the job server, after a check within seconds that it answers."""
    refuse_secret("--address", address)
    if not _is_http(address):
        raise UserError(f"--address {address!r} is not a URL of a Ray job server: give http://HOST:8265")
    unanswered = f"no Ray job server answers at {address}: check the address and that the cluster is up"
    path = token_file(address)
    headers = authorization(path) if path else {}
    try:
        decode(ask(f"{address.rstrip('/')}/api/version", headers, _ANSWER_SECONDS), _Server)
    except urllib.error.HTTPError as error:
        if error.code in _REDIRECTS:
            raise UserError(
                f"{address} redirects to another address, which is not followed: give the job server's own address"
            ) from error
        # The client below sends the token of Ray's own variables, and so gets another answer.
        if error.code not in _REFUSED:
            raise UserError(unanswered) from error
    # Servers that speak no HTTP, for example Ray's own control service, break the protocol or send no text.
    except (OSError, ValueError) as error:
        raise UserError(unanswered) from error

    _bypass_proxies(address)
    # Ray prefers these variables to the address it is given.
    hidden = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        from ray.exceptions import AuthenticationError  # Ray is slow to import
        from ray.job_submission import JobSubmissionClient

        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # It logs each upload and each stream's end.
        return JobSubmissionClient(address, headers=headers or None)
    except AuthenticationError as error:
        raise UserError(
            f"the Ray job server at {address} refuses requests without its token: if it is yours, set "
            f"{MODE_VARIABLE}=token, and {PATH_VARIABLE} to the file with its token"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(f"{unanswered} ({_first_line(error)})") from error
    finally:
        os.environ.update(hidden)


class _Server(msgspec.Struct):
    """Schema of a job server's version."""

    ray_version: str


def _bypass_proxies(address: str) -> None:
    """Make Ray's client connect to the job server itself: a proxy could read the token and the code."""
    host = urllib.parse.urlsplit(address).hostname
    known = [os.environ.get(name) for name in ("no_proxy", "NO_PROXY")]
    os.environ["no_proxy"] = ",".join(dict.fromkeys(filter(None, [*known, host])))


def _is_http(address: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(address)
        # The port is parsed when it is read: a word or too large a number raises ValueError then.
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
