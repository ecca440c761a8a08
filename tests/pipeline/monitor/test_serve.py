"""TensorBoard on real runs, through the real command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.monitor import serve
from pipeline.monitor.serve import _follow, watching
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.storage.retries import GIVE_UP, Attempts
from tests.conftest import S3
from tests.listening import is_loopback, listening
from tests.pipeline.monitor.runs import ask, monitoring

MakeConfig = Callable[..., RunConfig]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_runs_are_shown_live(world: World, make_config: MakeConfig, tmp_path: Path, s3: S3) -> None:
    remote, local = s3.prefix(), tmp_path / "local"
    run_training(make_config(local, "train.max_steps=1"))
    with monitoring(remote, str(local)) as (url, process):
        tags_url = f"{url}/data/plugin/scalars/tags"
        ask(tags_url, lambda answer: isinstance(answer, dict) and "local" in answer)
        # A run that begins while the page is open, below a prefix that held nothing.
        run_training(make_config(f"{remote}/late", "train.max_steps=2"))
        name = f"{remote.rpartition('/')[2]}/late"
        tags = ask(tags_url, lambda answer: isinstance(answer, dict) and name in answer)
        assert isinstance(tags, dict)
        assert {tag.split("/")[0] for tag in tags[name]} == {
            "loss",
            "quality",
            "quality-adjusted",
            "speed",
            "training",
        }
        images = ask(f"{url}/data/plugin/images/tags", lambda answer: isinstance(answer, dict) and name in answer)
        assert isinstance(images, dict)
        assert set(images[name]) == {"validation/chip 0"}
        hparams = f"{url}/data/plugin/hparams/experiment"
        ask(hparams, lambda answer: isinstance(answer, dict) and len(answer["hparamInfos"]) > 5, body=b"{}")
        ask(
            f"{url}/data/plugin/custom_scalars/layout", lambda answer: isinstance(answer, dict) and "category" in answer
        )
        servers = children(process.pid)
        assert all(is_loopback(address) for address, _ in listening([process.pid, *servers]))

        run_training(make_config(f"{remote}/late", "train.max_steps=3"))
        series = f"{url}/data/plugin/scalars/scalars?run={name}&tag=loss/train"
        ask(series, lambda rows: isinstance(rows, list) and [step for _, step, _ in rows] == [1, 2, 3])
    for server in servers:
        assert not os.path.exists(f"/proc/{server}")


def test_a_store_that_does_not_answer_is_one_sentence() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound, but not listening: connections are refused
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        command = [sys.executable, "-m", "cluster.cli", "monitor", "s3://bucket/runs", "--port", "0"]
        ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr
    assert "satfusion: error: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_board_that_cannot_be_refreshed_is_tried_again_and_can_be_stopped(caplog: pytest.LogCaptureFixture) -> None:
    looks: list[str] = []
    enough, stop = threading.Event(), threading.Event()

    class Broken:
        def update(self, pool: Executor) -> None:
            looks.append("update")
            raise OSError("No space left on device")

        def look(self, pool: Executor) -> None:
            looks.append("look")
            if len(looks) > 3:
                enough.set()
            raise ValueError("not expected")

    follower = threading.Thread(target=_follow, args=(Broken(), None, 0.01, stop), daemon=True)
    follower.start()
    assert enough.wait(60)
    stop.set()
    follower.join(60)
    assert not follower.is_alive()
    assert looks[:4] == ["update", "look"] * 2
    assert "not refreshed, will retry: No space left on device" in caplog.text


def test_a_store_that_is_away_does_not_delay_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard may end by itself, for example because its port is taken."""
    waits = threading.Event()

    class Away:
        runs: tuple[str, ...] = ()
        places = "s3://bucket/runs"

        def __init__(self, uris: object, root: object) -> None:
            pass

        def look(self, pool: Executor) -> None:
            pass

        def update(self, pool: Executor) -> None:
            attempts = Attempts("list")
            while True:
                waits.set()
                attempts.pause(ConnectionError("away"), "away", 10.0**9)

    def show() -> None:
        with watching(["s3://bucket/runs"], 0.01):
            assert waits.wait(60)

    monkeypatch.setattr(serve, "Watch", Away)
    shown = threading.Thread(target=show, daemon=True)
    shown.start()
    shown.join(120)
    assert not shown.is_alive()
    assert not GIVE_UP.is_set()


def test_it_starts_without_torch() -> None:
    """The page would wait for it, and its memory is more than that of hundreds of runs."""
    script = "import sys; import pipeline.monitor.serve, pipeline.monitor.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
