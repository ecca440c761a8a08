"""Verbs for the jobs of a Ray cluster: ``jobs`` lists them, ``logs`` shows or follows one, ``stop`` ends one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

_COLUMNS = ("job", "status", "sent", "lasted", "ranks", "run")
_LONGEST = 200
_PLACES = ("run", "shard", "predict", "evaluate", "sweep")
"""Keys of a job's metadata under which `cluster.jobs.submit` puts the place of its results, by kind of job."""


def add_job_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``jobs``, ``logs`` and ``stop`` to the command."""
    jobs = verbs.add_parser(
        "jobs",
        help="list the jobs of a Ray cluster",
        description="List the jobs that a Ray cluster knows, in the order in which they were sent.",
    )
    jobs.set_defaults(run=_jobs)
    logs = verbs.add_parser(
        "logs",
        help="show or follow the log of a job",
        description="Print what a job has logged; with --follow, go on until it ends, and exit with its exit status.",
    )
    logs.add_argument("--follow", action="store_true", help="until the job ends; Ctrl-C leaves it running")
    logs.set_defaults(run=_logs)
    stop = verbs.add_parser(
        "stop",
        help="end a job of a Ray cluster at a checkpoint",
        description="End a job and wait until it has ended. A training writes a checkpoint first, and so do the runs "
        "that a sweep trains: sent again, they resume from it. A job that has ended already is left as it is.",
    )
    stop.set_defaults(run=_stop)
    for verb in (jobs, logs, stop):
        verb.add_argument("--address", required=True, metavar="URL", help="Ray's job server, http://HOST:8265")
    for verb in (logs, stop):
        verb.add_argument("job", metavar="JOB", help="id of the job, as `submit` and `jobs` print it")


def _jobs(args: argparse.Namespace) -> int:
    from cluster.jobs.server import jobs_of  # other verbs ask no job server

    print(table(jobs_of(args.address)), end="")
    return 0


def _logs(args: argparse.Namespace) -> int:
    # Other verbs ask no job server.
    from cluster.jobs.server import log_of
    from cluster.jobs.submit import follow_or_leave

    if args.follow:
        return follow_or_leave(args.address, args.job, sys.stdout)
    sys.stdout.write(log_of(args.address, args.job))
    return 0


def _stop(args: argparse.Namespace) -> int:
    from cluster.jobs.server import stop  # other verbs ask no job server

    details = stop(args.address, args.job)
    print(f"job {args.job}: {details.status.value.lower()}")
    return 0


def table(jobs: Sequence[JobDetails]) -> str:
    """Return one line for each job, below the names of the columns."""
    rows = [_COLUMNS, *map(_row, jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def _row(job: JobDetails) -> tuple[str, ...]:
    metadata = job.metadata or {}
    begun, ended = job.start_time, job.end_time
    sent = f"{datetime.fromtimestamp(begun / 1000, UTC):%Y-%m-%d %H:%M:%S}" if begun else "-"
    lasted = _duration((ended - begun) / 1000) if begun and ended else "-"
    what = next(filter(None, map(metadata.get, _PLACES)), None) or job.entrypoint or ""
    cells = (str(job.submission_id), job.status.value.lower(), sent, lasted, metadata.get("workers", "-"), what)
    # What others wrote must not move the cursor.
    return tuple("".join(letter for letter in cell if letter.isprintable())[:_LONGEST] for cell in cells)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
