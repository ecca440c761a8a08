"""TensorBoard on real runs, through the real command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.train import run_training
from pipeline.world import World
from tests.conftest import S3
from tests.listening import is_loopback, listening

MakeConfig = Callable[..., RunConfig]


@contextmanager
def monitoring(*uris: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cluster.cli", "monitor", *uris, "--port", str(port), "--refresh", "0.5"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def ask(url: str, until: Callable[[object], bool], patience: float = 90) -> object:
    """Ask until the answer is the one waited for; return it."""
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
