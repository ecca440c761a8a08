from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.cli import main
from cluster.jobs import server
from cluster.jobs.placement import Placement, room_on
from cluster.jobs.server import follow
from cluster.jobs.submit import JobRequest, build_request, send, staged
from cluster.jobs.train_job import Job
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
    "option",
    [
        {"workers": 0},
        {"cpus_per_worker": 0.0},
        {"cpus_per_worker": float("nan")},
        {"gpus_per_worker": -1.0},
        {"gpus_per_worker": 0.5},
        {"max_failures": -1},
        {"wait_for_resources": -1.0},
    ],
)
def test_a_placement_that_cannot_be_is_refused(option: dict[str, float]) -> None:
    with pytest.raises(
        UserError, match=f"--{next(iter(option)).replace('_', '-')} .* (is out of range|is no whole number)"
    ):
        Placement(**{"workers": 2, **option})  # type: ignore[arg-type]


def test_gpus_choose_the_backend() -> None:
    assert (Placement(2).backend, Placement(2, gpus_per_worker=1).backend) == ("gloo", "nccl")


def test_no_gpu_is_visible_to_a_rank_that_is_given_none() -> None:
    config = load_config("srcnn_pnn")
    assert build_request(config, Placement(2), {}, Path("/")).environment["CUDA_VISIBLE_DEVICES"] == ""
    on_gpus = build_request(config, Placement(2, gpus_per_worker=1), {}, Path("/")).environment
    assert "CUDA_VISIBLE_DEVICES" not in on_gpus


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, object]:
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("placement", "nodes", "room"),
    [
        (Placement(2), [node(1), node(1)], 2),
        (Placement(2), [node(1), node(1, alive=False)], 1),
        (Placement(1, cpus_per_worker=2), [node(1), node(1)], 0),  # Two halves of a rank do not make room for one.
        (Placement(9, cpus_per_worker=0.1), [node(0.3)], 3),
        (Placement(4, gpus_per_worker=2), [node(8, 5), node(8), node(1, 8)], 3),
    ],
)
def test_room_is_counted_node_by_node(placement: Placement, nodes: list[dict[str, object]], room: int) -> None:
    assert room_on(nodes, placement) == room


def test_an_address_without_an_answer_is_refused_soon() -> None:
    began = time.monotonic()
    for address in ("http://127.0.0.1:9", "127.0.0.1:9", "ray://127.0.0.1:10001", "nonsense"):
        with pytest.raises(UserError, match=address):
            send(request(), address)
    assert time.monotonic() - began < 240, "it must not hang"


@pytest.mark.parametrize(
    "address", ["http://head:port", "http://head:70000", "http://:8265", "http://[::1", "http://a b"]
)
def test_what_is_no_url_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"--address|no Ray job server"):
        send(request(), address)


@pytest.mark.parametrize("answer", [b"", b"\x00\x00\x12\x04\x00", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n\r\n\xff"])
def test_a_port_that_is_no_job_server_is_refused(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UserError, match="no Ray job server answers at"):
            send(request(), f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


class Recorder(BaseHTTPRequestHandler):
    """A server that records the requests that reach it, with their token, and answers what it is told to."""

    def do_GET(self) -> None:
        asked: list[tuple[str, str | None]] = self.server.asked  # type: ignore[attr-defined]
        asked.append((self.path, self.headers["Authorization"]))
        status, location, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_CONNECT = do_GET

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def recording(status: int, body: bytes = b"", location: str = "") -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Yield a server's URL and the requests that it gets."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.asked, server.answer = [], (status, location, body)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the token of every address."""
    (tmp_path / "token").write_text("secret")
    monkeypatch.setattr(server, "token_file", lambda address: tmp_path / "token")
    return "Bearer secret"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_with_the_token(token: str, status: int) -> None:
    with recording(200, b"{}") as (other, elsewhere), recording(status, location=f"{other}/x") as (address, asked):
        with pytest.raises(UserError, match=f"{address} redirects to another address, which is not followed"):
            send(request(), address)
        assert asked == [("/api/version", token)]
        assert elsewhere == []


def test_no_proxy_gets_the_token(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "elsewhere.example")
    versions = b'{"version": "4", "ray_version": "99.0", "ray_commit": "x"}'
    with recording(502) as (proxy, by_proxy), recording(200, versions) as (address, asked):
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        server.connect(address)
        assert by_proxy == []
    assert len(asked) >= 2, "the check, and Ray's client"
    assert set(asked) == {("/api/version", token)}
    assert os.environ["no_proxy"] == "elsewhere.example,127.0.0.1"


@pytest.mark.parametrize("answer", [b"[" * 100_000, b'{"ray_version": 5}', b"[]", b" " * (1 << 27)])
def test_an_answer_that_is_no_version_is_refused(answer: bytes) -> None:
    with recording(200, answer) as (address, _), pytest.raises(UserError, match="no Ray job server answers at"):
        send(request(), address)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--address", "http://127.0.0.1:9", "--workers", "2"], "no Ray job server answers at http://127.0.0.1:9"),
        (["--address", "http://127.0.0.1:9", "--workers", "2", "train.epoch=5"], "train.epoch"),
        (["--address", "http://127.0.0.1:9", "--workers", "3", "train.global_batch=8"], "global_batch"),
        (
            ["--address", "http://127.0.0.1:9", "--workers", "2", "--gpus-per-worker", "0.5"],
            "--gpus-per-worker 0.5 is no whole number",
        ),
    ],
)
def test_bad_input_on_the_real_command_line(arguments: list[str], sentence: str) -> None:
    command = [sys.executable, "-m", "cluster.cli", "submit", "srcnn_pnn", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("satfusion: error: ")
    assert sentence in line


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
    monkeypatch.setattr(server, "connect", lambda address: client)
    output = io.StringIO()
    assert follow("http://head:8265", "job", output) == 7
    assert output.getvalue() == "first\nsecond\nthird\n"
    assert client.connections == 3
