"""Ends of the commands by signals: nothing is left, and the last events are uploaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.local.processes import free_ports, running_with, stop
from pipeline.config import RunConfig
from pipeline.signals import STOPPED_STATUS
from pipeline.training.checkpoint import complete_checkpoints
from sharding.storage import open_storage
from tests.command import start_command
from tests.conftest import S3

pytestmark = pytest.mark.distributed
TOKEN = "SATFUSION_TEST_ENDS"


def scratch(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("satfusion-*")]


def wait_for(condition: Callable[[], bool], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_of_one_rank_ends_all_at_a_checkpoint_and_leaves_nothing(
    s3: S3, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    uri, size = s3.prefix(), 2
    overrides = ("train.epochs=100000", "output.sync_seconds=3600", "train.log_every=1", "train.engine=torch")
    config = tmp_path / "config.toml"
    config.write_text(make_config(uri, *overrides).to_toml())
    ranks = start_command(size, ["train", str(config)], {"TMPDIR": str(tmp_path)})
    try:
        wait_for(lambda: "step 9: validation" in ranks.output() or any(p.poll() for p in ranks.processes))
        assert len(scratch(tmp_path)) == size
        ranks.processes[1].send_signal(signal.SIGTERM)
        for process in ranks.processes:
            process.wait(120)
    finally:
        ranks.kill()
    assert [process.returncode for process in ranks.processes] == [STOPPED_STATUS] * size, ranks.output()
    checkpoints = complete_checkpoints(open_storage(uri), "step")
    assert f"stopped at step {checkpoints[-1]}, as SIGTERM asked" in ranks.output()
    assert scratch(tmp_path) == []
    written = {item.key.rpartition("/")[0] for item in open_storage(uri).list("events/")}
    assert written == {"events/aggregate", *(f"events/rank-{rank}" for rank in range(size))}
    rows = open_storage(uri).read("metrics.csv").decode().splitlines()
    assert int(rows[-1].split(",")[0]) == len(rows) - 1 == checkpoints[-1] >= 9


def test_a_killed_monitor_leaves_no_server_and_no_folder_after_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "run/events").mkdir(parents=True)
    (tmp_path / "run/events/events.out.tfevents.1.x").write_bytes(b"")
    (tmp_path / "tmp").mkdir()
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "cluster.cli", "monitor", str(tmp_path / "run"), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), TOKEN: str(port)}

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5):
                return True
        except OSError:
            return False

    try:
        for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
            with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as monitor:
                wait_for(answers)
                assert len(scratch(tmp_path / "tmp")) == 1
                monitor.send_signal(number)
                assert monitor.wait(120) == status
            wait_for(lambda: not running_with(TOKEN, str(port)))
            assert not answers()
        assert list((tmp_path / "tmp").iterdir()) == []
    finally:
        stop(running_with(TOKEN, str(port)))


def test_a_home_that_cannot_be_written_is_one_sentence(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(make_config(tmp_path / "run", "train.max_steps=1").to_toml())
    ranks = start_command(1, ["train", str(config)], {"HOME": "/proc/nowhere", "TORCH_EXTENSIONS_DIR": "/proc/nowhere"})
    finished = ranks.wait()
    assert finished.statuses == [2], finished.output
    assert "satfusion: error: DeepSpeed's op cannot be compiled: /proc/" in finished.output
    assert "set TORCH_EXTENSIONS_DIR to a folder of yours, or train.engine=torch" in finished.output
    assert "Traceback" not in finished.output
