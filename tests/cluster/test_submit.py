from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import submit
from cluster.cli import main
from cluster.submit import JobRequest, build_request, follow, send, staged
from cluster.worker import Job, Placement, _raise_user_error
from pipeline.config import RunConfig, load_config
from sharding.errors import UserError

ENVIRONMENT = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:8333",
    "AWS_REGION": "eu-west-1",
    "AWS_ACCESS_KEY_ID": "travelling-key",
    "AWS_SECRET_ACCESS_KEY": "travelling-secret",
    "AWS_SESSION_TOKEN": "travelling-token",
}


def request(*overrides: str, workers: int = 2) -> JobRequest:
    return build_request(load_config("srcnn_pnn", overrides), Placement(workers), ENVIRONMENT, Path("/home/me"))


def test_endpoint_and_region_travel_and_keys_do_not(tmp_path: Path) -> None:
    built = request("data.uri=s3://bucket/shards")
    assert built.environment["AWS_ENDPOINT_URL"] == "http://127.0.0.1:8333"
    assert built.environment["AWS_REGION"] == "eu-west-1"
    with staged(built) as folder:
        everything = repr(built) + "".join(path.read_text() for path in folder.rglob("*.json"))
    assert "travelling" not in everything


def test_an_endpoint_with_a_password_is_refused() -> None:
    environment = {"AWS_ENDPOINT_URL": "http://me:hidden@127.0.0.1:8333"}
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL") as caught:
        build_request(load_config("srcnn_pnn"), Placement(2), environment, Path("/"))
    assert "hidden" not in str(caught.value)


def test_the_resolved_configuration_travels() -> None:
    job = Job.from_json(request("train.epochs=7", "data.uri=shards", "output.uri=s3://bucket/run").job.to_json())
    config = RunConfig.from_dict(job.config)
    assert config.train.epochs == 7
    assert config.data.uri == "/home/me/shards", "a relative path means the submitter's folder"
    assert config.output.uri == "s3://bucket/run"
    assert job.placement == Placement(2)


def test_exactly_the_packages_are_shipped() -> None:
    with staged(request()) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [
            "cluster",
            "job.json",
            "models",
            "pipeline",
            "sharding",
        ]
        assert (folder / "pipeline/recipes/srcnn_pnn.toml").exists()
        assert not list(folder.rglob("__pycache__"))
    assert not folder.exists()


@pytest.mark.parametrize("workers", [3, 16])
def test_a_batch_that_does_not_divide_is_refused_before_anything_is_sent(workers: int) -> None:
    with pytest.raises(UserError, match="8"):
        request("train.global_batch=8", workers=workers)


@pytest.mark.parametrize(
    "option", [{"workers": 0}, {"cpus_per_worker": 0.0}, {"gpus_per_worker": -1.0}, {"max_failures": -1}]
)
def test_a_placement_that_cannot_be_is_refused(option: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(option)).replace('_', '-')} is"):
        Placement(**{"workers": 2, **option})  # type: ignore[arg-type]


def test_gpus_choose_the_backend() -> None:
    assert (Placement(2).backend, Placement(2, gpus_per_worker=1).backend) == ("gloo", "nccl")


def test_a_users_mistake_is_found_among_its_consequences() -> None:
    failures = {0: ConnectionError("broken by rank 1"), 1: UserError("the mistake")}
    with pytest.raises(UserError, match="the mistake"):
        _raise_user_error(SimpleNamespace(worker_failures=failures))  # type: ignore[arg-type]
    _raise_user_error(RuntimeError("no rank's"))


def test_an_address_without_an_answer_is_refused_soon() -> None:
    began = time.monotonic()
    for address in ("http://127.0.0.1:9", "127.0.0.1:9", "ray://127.0.0.1:10001", "nonsense"):
        with pytest.raises(UserError, match=address):
            send(request(), address)
    assert time.monotonic() - began < 60, "it must not hang"


def test_a_bad_configuration_is_refused_before_the_address_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["submit", "srcnn_pnn", "--address", "http://127.0.0.1:9", "--workers", "2", "train.epoch=5"])
    error = capsys.readouterr().err
    assert status == 2
    assert "train.epoch" in error
    assert "train.epochs" in error or "epochs" in error
    assert "127.0.0.1:9" not in error


class StutteringClient:
    """A job server whose log stream breaks at every chunk but grows from one connection to the next."""

    chunks = ("first\nsec", "ond\n", "third\n")

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.connections += 1
        for chunk in self.chunks[: self.connections]:
            yield chunk
        if self.connections < len(self.chunks):
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        from ray.job_submission import JobStatus

        return SimpleNamespace(status=JobStatus.FAILED, driver_exit_code=7, message="")


def test_a_broken_stream_repeats_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    client = StutteringClient()
    monkeypatch.setattr(submit, "_connect", lambda address: client)
    output = io.StringIO()
    assert follow("http://head:8265", "job", output) == 7
    assert output.getvalue() == "first\nsecond\nthird\n"
    assert client.connections == 3
