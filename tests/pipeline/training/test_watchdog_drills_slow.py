"""A rank of the real command that is stopped: the other one finds it, names it, and ends; the same command resumes."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.signals import HUNG_STATUS
from pipeline.training.checkpoint import complete_checkpoints
from sharding.storage import open_storage
from tests.command import column, run_command, start_command


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])  # rank 0 serves the store of the process group too
def test_a_stopped_rank_is_found_and_named(victim: int, make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config, run = tmp_path / "config.toml", tmp_path / "run"
    limits = ("train.hang_seconds=10", "train.checkpoint_every=3", "train.max_steps=30", "train.engine=torch")
    config.write_text(make_config(run, *limits).to_toml())
    ranks = start_command(2, ["train", str(config)])
    other = ranks.processes[1 - victim]
    try:
        deadline = time.monotonic() + 500
        while len(complete_checkpoints(open_storage(run), "step")) < 2:
            assert time.monotonic() < deadline, ranks.output()
            time.sleep(0.02)
        ranks.processes[victim].send_signal(signal.SIGSTOP)
        assert other.wait(300) == HUNG_STATUS, ranks.output()
    finally:
        ranks.kill()
    said = ranks.output()
    assert re.search(rf"so rank {1 - victim} ends with status {HUNG_STATUS}: rank {victim} \(.+ at step \d+ in", said)
    assert "most recent call first" in said
    run_command(2, ["train", str(config)])
    assert column(run, "step") == [str(step) for step in range(1, 31)]
