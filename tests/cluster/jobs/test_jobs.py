"""Listing, following and stopping jobs, and sending a run once; the job server's answers are simulated."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from cluster.cli import main
from cluster.jobs import server, submit
from cluster.jobs.cli import table
from cluster.jobs.placement import Placement
from cluster.jobs.server import follow, stop
from cluster.jobs.submit import already_sent, build_request, differences, follow_or_leave
from cluster.output import OutputError, ReaderGoneError
from pipeline.config import load_config
from pipeline.signals import STOPPED_STATUS
from sharding.errors import UserError

ADDRESS = "http://head:8265"


def job(number: int, status: JobStatus = JobStatus.RUNNING, **metadata: str) -> SimpleNamespace:
    return SimpleNamespace(
        submission_id=f"raysubmit_{number}",
        status=status,
        metadata=metadata or None,
        start_time=1_790_000_000_000 + number * 1000,
        end_time=1_790_000_000_000 + 3_725_000 if status.is_terminal() else None,
        entrypoint="python -c 'print(1)'",
        message="",
        driver_exit_code=None,
    )


class Server:
    """A job server of some jobs; a stopped one ends after it was asked for twice."""

    def __init__(self, *jobs: SimpleNamespace) -> None:
        self.jobs = {one.submission_id: one for one in jobs}
        self.stopped: list[str] = []
        self.asked = 0

    def list_jobs(self) -> list[SimpleNamespace]:
        return list(self.jobs.values())

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        if job_id in self.stopped:
            self.asked += 1
            if self.asked == 2:
                self.jobs[job_id].status = JobStatus.STOPPED
        return self.jobs[job_id]

    def get_job_logs(self, job_id: str) -> str:
        return f"log of {job_id}\n"

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield self.get_job_logs(job_id)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    def serve(answers: Any) -> Any:
        monkeypatch.setattr(server, "connect", lambda address: answers)
        monkeypatch.setattr(server, "_POLL_SECONDS", 0.01)
        return answers

    return serve


def test_jobs_are_listed_in_the_order_in_which_they_were_sent(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    serve(Server(job(2, run="s3://b/run", workers="2..4"), job(1, JobStatus.FAILED), job(3, shard="out\x1b[2J")))
    assert main(["jobs", "--address", ADDRESS]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "job          status   sent                 lasted   ranks  run",
        "raysubmit_1  failed   2026-09-21 14:13:21  1:02:04  -      python -c 'print(1)'",
        "raysubmit_2  running  2026-09-21 14:13:22  -        2..4   s3://b/run",
        "raysubmit_3  running  2026-09-21 14:13:23  -        -      out[2J",
    ]


def test_a_log_is_shown_and_followed(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    serve(Server(job(1), job(2, JobStatus.STOPPED)))
    assert main(["logs", "--address", ADDRESS, "raysubmit_1"]) == 0
    assert capsys.readouterr().out == "log of raysubmit_1\n"
    assert main(["logs", "--address", ADDRESS, "--follow", "raysubmit_2"]) == STOPPED_STATUS
    assert capsys.readouterr().out == "log of raysubmit_2\n"


def test_stop_waits_for_the_end_and_leaves_what_has_ended(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answers = serve(Server(job(1), job(2, JobStatus.SUCCEEDED)))
    for _ in range(2):
        assert main(["stop", "--address", ADDRESS, "raysubmit_1"]) == 0
        assert capsys.readouterr().out == "job raysubmit_1: stopped\n"
    assert main(["stop", "--address", ADDRESS, "raysubmit_2"]) == 0
    assert capsys.readouterr().out == "job raysubmit_2: succeeded\n"
    assert answers.stopped == ["raysubmit_1"]


@pytest.mark.parametrize("verb", [["logs"], ["logs", "--follow"], ["stop"]])
def test_an_unknown_job_is_refused_in_a_sentence(
    serve: Any, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(Server(job(1)))
    assert main([*verb, "--address", ADDRESS, "raysubmit_9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"satfusion: error: there is no job 'raysubmit_9' at {ADDRESS}")
    assert error.count("\n") == 1


def test_no_server_is_refused_on_the_real_command_line() -> None:
    command = [sys.executable, "-m", "cluster.cli", "jobs", "--address", "http://127.0.0.1:9"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("satfusion: error: no Ray job server answers at http://127.0.0.1:9")
    assert ended.stderr.count("\n") == 1


class VanishedServer(Server):
    """A job server that answers twice and then, without closing a connection, never again."""

    def __init__(self) -> None:
        super().__init__(job(1))
        self.gone = threading.Event()
        self.end_of_test = threading.Event()

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        self.asked += 1
        if self.asked > 2:
            self.gone.set()
            self.end_of_test.wait()
        return super().get_job_info(job_id)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "step 1\n"
        await asyncio.Event().wait()


@pytest.fixture
def vanished() -> Iterator[VanishedServer]:
    found = VanishedServer()
    yield found
    found.end_of_test.set()


def test_a_head_that_vanished_is_noticed_and_the_way_back_is_said(
    serve: Any, vanished: VanishedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(vanished)
    assert server._LOST_SECONDS < 60
    monkeypatch.setattr(server, "_LOST_SECONDS", 0.2)
    output = io.StringIO()
    with pytest.raises(UserError, match=r"stopped answering .* `satfusion logs --address http://head:8265 --follow"):
        follow(ADDRESS, "raysubmit_1", output)
    assert output.getvalue() == "step 1\n"
    assert vanished.gone.is_set()


def request(*overrides: str, workers: int | str = 2) -> submit.JobRequest:
    config = load_config("srcnn_pnn", ["output.uri=s3://b/run", *overrides])
    return build_request(config, Placement(workers), {}, Path("/home/me"))


def sent(status: JobStatus = JobStatus.RUNNING, number: int = 1) -> SimpleNamespace:
    return job(number, status, run="s3://b/run", job=request().job.to_json())


def test_a_run_that_trains_already_is_followed_and_not_sent_again(
    serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(Server(sent(JobStatus.FAILED, 1), sent(number=2), job(3, run="s3://b/other")))
    assert already_sent(request(), ADDRESS) == "raysubmit_2"
    arguments = ["submit", "srcnn_pnn", "--address", ADDRESS, "--workers", "2", "output.uri=s3://b/run", "--no-wait"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == "raysubmit_2"


def test_a_run_that_has_ended_is_sent_again(serve: Any) -> None:
    serve(Server(sent(JobStatus.STOPPED), job(2), job(3, run="s3://b/other", job="{}")))
    assert already_sent(request(), ADDRESS) is None


def test_other_settings_for_a_run_that_trains_are_refused_by_name(serve: Any) -> None:
    serve(Server(sent()))
    with pytest.raises(UserError) as caught:
        already_sent(request("train.learning_rate=0.5", workers="2..4"), ADDRESS)
    assert str(caught.value) == (
        "job raysubmit_1 at http://head:8265 trains into s3://b/run with another train.learning_rate (0.0001, now 0.5);"
        " placement.workers (2, now 2..4): name another output.uri, or end it with"
        " `satfusion stop --address http://head:8265 raysubmit_1`"
    )
    serve(Server(job(1, run="s3://b/run", job="no JSON")))
    with pytest.raises(UserError, match="another description, which this program did not write"):
        already_sent(request(), ADDRESS)


def test_differences_have_dotted_names() -> None:
    before, now = (
        {"config": {"a": {"b": 1, "c": 2}}, "d": None},
        {"config": {"a": {"b": 1, "c": [3]}}, "d": None, "e": 4},
    )
    assert differences(json.dumps(before), json.dumps(now)) == ["a.c (2, now [3])", "e (None, now 4)"]


def test_a_job_that_does_not_end_is_named(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = serve(Server(job(1)))
    monkeypatch.setattr(answers, "stop_job", lambda job_id: True)
    monkeypatch.setattr(server, "GRACE_SECONDS", -server._LOST_SECONDS)
    with pytest.raises(UserError, match="job raysubmit_1 at http://head:8265 has not ended"):
        stop(ADDRESS, "raysubmit_1")


def test_a_server_in_trouble_is_not_taken_for_one_without_the_job(
    serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Server, job_id: str) -> SimpleNamespace:
        raise RuntimeError("Request failed with status code 500: the head restarts")

    monkeypatch.setattr(Server, "get_job_info", fail)
    serve(Server(job(1)))
    assert main(["stop", "--address", ADDRESS, "raysubmit_1"]) == 2
    assert "did not answer (Request failed with status code 500" in capsys.readouterr().err


def test_only_a_training_is_described_in_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of many AOIs would not fit into the one environment variable that holds them."""
    sent: list[dict[str, Any]] = []

    def submit_job(**options: Any) -> str:
        sent.append(options["metadata"])
        return "raysubmit_1"

    monkeypatch.setattr(submit, "connect", lambda address: SimpleNamespace(submit_job=submit_job))
    training = request()
    submit.send(training, ADDRESS)
    submit.send(replace(training, metadata={}), ADDRESS)
    assert json.loads(sent[0]["job"])["config"]["output"]["uri"] == sent[0]["run"]
    assert sent[1] == {}


class OneLine:
    """A job server's client whose job has logged a line."""

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "a line\n"


class Unread(io.StringIO):
    """An output whose reader is gone, or whose device is full."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [ReaderGoneError(), OutputError("full")])
def test_an_output_that_takes_no_line_is_no_broken_connection(error: Exception) -> None:
    """It would be opened again for as long as the job runs."""
    log = server._Log(OneLine(), "job", Unread(error))  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        asyncio.run(log.copy(lambda: False))


@pytest.mark.parametrize("kind", ["run", "shard", "predict", "evaluate", "sweep"])
def test_each_kind_of_job_is_listed_with_the_place_of_its_results(kind: str) -> None:
    job = SimpleNamespace(
        metadata={kind: "s3://b/place"},
        entrypoint="python -m driver",
        start_time=0,
        end_time=0,
        submission_id="j",
        status=JobStatus.RUNNING,
    )
    assert table([job]).split()[-1] == "s3://b/place"  # type: ignore[list-item]


@pytest.mark.parametrize("error", [ReaderGoneError(), OutputError("full")])
def test_a_job_whose_news_cannot_be_said_is_told_of_all_the_same(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was sent, and runs on."""

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    with pytest.raises(type(error)):
        follow_or_leave(ADDRESS, "raysubmit_1", Output(), "job raysubmit_1 sent")
    assert capsys.readouterr().err.startswith("satfusion: job raysubmit_1 runs on: follow it with")
