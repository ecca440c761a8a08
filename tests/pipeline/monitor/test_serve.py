"""TensorBoard on real runs, through the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.local.processes import free_ports
from pipeline.config import RunConfig
from pipeline.reporting.monitor import EventMirror
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.storage import LocalStorage, StoredObject
from tests.conftest import S3
from tests.listening import is_loopback, listening

MakeConfig = Callable[..., RunConfig]


@contextmanager
def monitoring(*uris: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "cluster.cli", "monitor", *uris, "--port", str(port), "--refresh", "0.5"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0


def ask(url: str, until: Callable[[object], bool], patience: float = 400) -> object:
    """Ask until the expected answer arrives; return it."""
    deadline = time.monotonic() + patience
    answer: object = None
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                answer = json.load(response)
            if until(answer):
                return answer
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"{url} did not come to it: {answer}")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_runs_are_shown_live(world: World, make_config: MakeConfig, tmp_path: Path, s3: S3) -> None:
    remote, local = s3.prefix() + "/remote", tmp_path / "local"
    run_training(make_config(local, "train.max_steps=1"))
    run_training(make_config(remote, "train.max_steps=2"))
    with monitoring(remote, str(local)) as (url, process):
        tags = ask(f"{url}/data/plugin/scalars/tags", lambda answer: isinstance(answer, dict) and len(answer) == 4)
        assert isinstance(tags, dict)
        assert set(tags) == {"remote/rank-0", "remote/aggregate", "local/rank-0", "local/aggregate"}
        assert "train/loss_max" in tags["remote/aggregate"]
        images = ask(f"{url}/data/plugin/images/tags", lambda answer: bool(answer))
        assert isinstance(images, dict)
        assert set(images["remote/aggregate"]) == {"val/0"}
        servers = children(process.pid)
        assert all(is_loopback(address) for address, _ in listening([process.pid, *servers]))

        run_training(make_config(remote, "train.max_steps=3"))
        series = f"{url}/data/plugin/scalars/scalars?run=remote/aggregate&tag=train/loss"
        ask(series, lambda rows: isinstance(rows, list) and [step for _, step, _ in rows] == [1, 2, 3])
    for server in servers:
        assert not os.path.exists(f"/proc/{server}")


class Store(LocalStorage):
    """Store that lists the given keys, whatever they are."""

    keys: tuple[str, ...] = ()

    def list(self, prefix: str = "") -> list[StoredObject]:
        return [StoredObject(key, 4) for key in self.keys]

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        return b"harm"[offset : offset + length]

    def child(self, name: str) -> Store:
        return self


def test_a_key_that_climbs_later_is_skipped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path / "store")
    mirror = EventMirror(store, tmp_path / "mirror" / "run")
    climbing = ("../out", str(tmp_path / "out"), "a/../../../out", "a\x1b[2J", "x" * 300, "rank-0/good/below")
    store.keys = ("rank-0/good", *climbing, "rank-1/good")
    assert [mirror.update(), mirror.update()] == [2, 0]
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"mirror/run/rank-0/good", "mirror/run/rank-1/good"}
    assert [sum(repr(key) in line for line in caplog.messages) for key in climbing] == [1] * len(climbing)
    assert all(line.isprintable() for line in caplog.messages)


@contextmanager
def listing(*keys: str) -> Iterator[str]:
    """Serve a bucket whose listing holds these keys, as S3 does; yield the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            rows = "".join(f"<Contents><Key>{key}</Key><Size>4</Size></Contents>" for key in keys)
            body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_store_that_climbs_out_is_refused(tmp_path: Path) -> None:
    climbing = "../" * 12 + str(tmp_path / "harm").lstrip("/")
    with listing("run/events/rank-0/events.1", f"run/events/{climbing}") as endpoint:
        environment = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        command = [sys.executable, "-m", "cluster.cli", "monitor", "s3://bucket/run", "--port", "0"]
        ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 2, ended.stderr
    assert f"satfusion: error: {climbing!r} is no key of s3://bucket/run/events" in ended.stderr
    assert list(tmp_path.iterdir()) == []
