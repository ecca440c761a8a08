"""Ray's job server: connect to it, follow, list and stop jobs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO, TypeVar

import msgspec

from cluster.token import MODE_VARIABLE, PATH_VARIABLE, ask, authorization, token_file
from pipeline.signals import STOPPED_STATUS
from sharding.errors import UserError
from sharding.names import refuse_secret
from sharding.schema import decode

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_SECONDS = 120
"""Time that a job gets to write a checkpoint when it is stopped, seconds; then Ray kills its driver."""
_ANSWER_SECONDS = 20.0
_POLL_SECONDS = 0.5
# With the time to notice that a connection is broken, `follow` ends within a minute.
_LOST_SECONDS = 45.0
# HTTP statuses without a token, and with another one.
_REFUSED = {401, 403}
_REDIRECTS = {301, 302, 303, 307, 308}


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the job server, after a check within seconds that it answers.

    Raises:
        UserError: No job server answers at ``address``, or it refuses this user.
    """
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

    from ray.exceptions import AuthenticationError  # Ray is slow to import
    from ray.job_submission import JobSubmissionClient

    _bypass_proxies(address)
    # Ray prefers these variables to the address it is given.
    hidden = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # It logs each upload and each stream's end.
        return JobSubmissionClient(address, headers=headers or None)
    except AuthenticationError as error:
        raise UserError(
            f"the Ray job server at {address} refuses requests without its token: if it is yours, set "
            f"{MODE_VARIABLE}=token, and {PATH_VARIABLE} to the file with its token"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(f"{unanswered} ({first_line(error)})") from error
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


def jobs_of(address: str) -> Sequence[JobDetails]:
    """Return the jobs that the job server at ``address`` knows, in the order in which they were sent.

    Raises:
        UserError: Like `connect`.
    """
    client = connect(address)
    found: list[JobDetails] = _answer(address, client.list_jobs)
    return sorted((job for job in found if job.submission_id), key=lambda job: job.start_time or 0)


def stop(address: str, job_id: str) -> JobDetails:
    """Stop a job, wait until it has ended, and return its details; one that has ended is left as it is.

    A training writes a checkpoint first. Ray kills what has not ended `GRACE_SECONDS` later.

    Raises:
        UserError: Like `connect`; there is no such job, or it does not end.
    """
    client = connect(address)
    details = _details(client, address, job_id)
    if details.status.is_terminal():
        return details
    _answer(address, lambda: client.stop_job(job_id))
    deadline = time.monotonic() + GRACE_SECONDS + _LOST_SECONDS
    while not (details := _details(client, address, job_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"job {job_id} at {address} has not ended: {how_to_follow(address, job_id)}")
        time.sleep(_POLL_SECONDS)
    return details


def log_of(address: str, job_id: str) -> str:
    """Return what a job has logged so far.

    Raises:
        UserError: Like `connect`, or there is no such job.
    """
    client = connect(address)
    _details(client, address, job_id)
    text: str = _answer(address, lambda: client.get_job_logs(job_id))
    return text


def follow(address: str, job_id: str, output: TextIO) -> int:
    """Copy a job's log to ``output``, each line once, until the job ends; return its exit status.

    A broken connection is opened again, and lines already copied are skipped. A head that vanished without closing its
    connections is noticed too, since another thread asks for the job's state meanwhile.

    Raises:
        UserError: The job server has not answered for most of a minute, and the job may still run; or there is no such
            job.
    """
    from ray.job_submission import JobStatus  # Ray is slow to import

    client = connect(address)
    _details(client, address, job_id)
    log = _Log(client, job_id, output)
    ended: float | None = None
    with _watched(client, job_id) as state:
        while True:
            broken = asyncio.run(log.copy(lambda: state.silent_seconds() > _LOST_SECONDS))
            details = state.details
            if details is not None and details.status.is_terminal():
                ended = ended or time.monotonic()
                # The log of a node that was lost cannot be read to its end.
                if not broken or time.monotonic() - ended > _LOST_SECONDS:
                    break
            if state.silent_seconds() > _LOST_SECONDS:
                raise UserError(
                    f"the Ray job server at {address} stopped answering ({state.reason}): job {job_id} may still run;"
                    f" when the server answers again, {how_to_follow(address, job_id)}; if the head is lost, submit the"
                    " same run again, and it resumes from its newest checkpoint"
                )
            time.sleep(_POLL_SECONDS)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        logger.error("job %s was stopped", job_id)
        return STOPPED_STATUS
    # A driver that never started has no status of its own; the reason is only in the message.
    if details.driver_exit_code is None:
        logger.error("job %s failed: %s", job_id, details.message)
    else:
        logger.error("job %s failed with status %d", job_id, details.driver_exit_code)
    return details.driver_exit_code or 1


def how_to_follow(address: str, job_id: str) -> str:
    """Return the commands that follow and stop a job which continues to run."""
    return (
        f"follow it with `satfusion logs --address {address} --follow {job_id}`, stop it with"
        f" `satfusion stop --address {address} {job_id}`"
    )


class _State:
    """Newest answer about a job."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._client = client
        self._job_id = job_id
        self._answered = time.monotonic()
        self.details: JobDetails | None = None
        self.reason = "no answer"
        self.done = threading.Event()

    def ask_until_done(self) -> None:
        from ray.exceptions import AuthenticationError  # Ray is slow to import

        while not self.done.is_set():
            try:
                self.details = self._client.get_job_info(self._job_id)
                self._answered = time.monotonic()
            # The client raises RuntimeError for refusals; errors of requests are OSErrors.
            except (RuntimeError, OSError, AuthenticationError) as error:
                self.reason = first_line(error)
            self.done.wait(_POLL_SECONDS)

    def silent_seconds(self) -> float:
        """Return the time since the last answer, seconds."""
        return time.monotonic() - self._answered


@contextlib.contextmanager
def _watched(client: JobSubmissionClient, job_id: str) -> Iterator[_State]:
    """Ask for a job's state in a thread, because a request to a host that vanished may never return."""
    state = _State(client, job_id)
    threading.Thread(target=state.ask_until_done, name="job-state", daemon=True).start()
    try:
        yield state
    finally:
        state.done.set()


class _Log:
    """A job's log; each line is copied once, even if the stream breaks."""

    def __init__(self, client: JobSubmissionClient, job_id: str, output: TextIO) -> None:
        self._client = client
        self._job_id = job_id
        self._output = output
        self._copied = 0

    async def copy(self, gives_up: Callable[[], bool]) -> bool:
        """Copy the lines that were not copied before, until the stream ends; return whether it broke.

        A stream that says nothing is left when ``gives_up`` returns True.
        """
        task = asyncio.ensure_future(self._copy())
        while not task.done() and not gives_up():
            await asyncio.wait({task}, timeout=_POLL_SECONDS)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_POLL_SECONDS)
            return True
        # The client raises RuntimeError for broken streams; errors of aiohttp are OSErrors.
        try:
            task.result()
        except (RuntimeError, OSError):
            return True
        return False

    async def _copy(self) -> None:
        position = 0  # Each stream begins at the log's first character.
        async for text in self._client.tail_job_logs(self._job_id):
            new = text[max(0, self._copied - position) :]
            position += len(text)
            self._copied = max(self._copied, position)
            self._output.write(new)
            self._output.flush()


def _details(client: JobSubmissionClient, address: str, job_id: str) -> JobDetails:
    try:
        details: JobDetails = client.get_job_info(job_id)
    except RuntimeError as error:
        # The client tells a server's every error by this type, with the HTTP status in its text.
        if "404" not in str(error) and "does not exist" not in str(error):
            raise _unanswered(address, error) from error
        raise UserError(
            f"there is no job {job_id!r} at {address} ({first_line(error)}): `satfusion jobs --address {address}` lists"
            " the jobs"
        ) from error
    except OSError as error:
        raise _unanswered(address, error) from error
    return details


def _answer(address: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except (RuntimeError, OSError) as error:
        raise _unanswered(address, error) from error


def _unanswered(address: str, error: Exception) -> UserError:
    return UserError(
        f"the Ray job server at {address} did not answer ({first_line(error)}): check that the cluster is up, and try"
        " again"
    )


def _is_http(address: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(address)
        # The port is parsed when it is read: a word or too large a number raises ValueError then.
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
