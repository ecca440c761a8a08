"""A training whose dataset is replaced while it reads: its losses are those of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.format.index import Index
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions
from sharding.run.plan import PlanOptions
from sharding.run.verify import verify
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage
from tests.command import column

KILLS = 10
OPTIONS = ShardOptions(SampleOptions(revisits=2), PlanOptions(shard_bytes=2_500_000))
"""A shard a sample."""


def overwrite(source: Path, output: Path, seed: int) -> subprocess.Popen[bytes]:
    """Start the command that replaces the dataset by one of another seed and of one revisit."""
    command = [sys.executable, "-m", "cluster.cli", "shard", "--input", str(source), "--output", str(output)]
    options = ["--overwrite", "--revisits", "1", "--seed", str(seed), "--shard-size", "2.5", "--workers", "1"]
    return subprocess.Popen(
        [*command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_in_its_work(process: subprocess.Popen[bytes], folder: Path, moment: float) -> None:
    """Kill the command some time after its next file has appeared."""
    before, deadline = set(folder.glob("plan-*/*")), time.monotonic() + 300
    try:
        while process.poll() is None and set(folder.glob("plan-*/*")) <= before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(moment)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_training_does_not_notice_kills_of_overwrite_nor_that_it_ends(
    world: World, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    source, data = tmp_path / "source", tmp_path / "data"
    write_worldstrat(source, 12, seed=6, revisits=2, hr_side=80)
    storage = open_storage(data)
    first = shard_folder(source, storage, OPTIONS).index
    # Without a cache, every epoch reads every sample again; all its batches come after the kill.
    settings = (f"data.uri={data}", "data.cache_mib=0", "data.prefetch_batches=1", f"train.epochs={KILLS + 3}")
    run_training(make_config(tmp_path / "undisturbed", *settings))
    draw, seen = random.Random(17), list[str]()

    def disturb(metrics: Mapping[str, float]) -> None:
        number = len(seen)
        process = overwrite(source, data, number)
        if number < KILLS:
            kill_in_its_work(process, data, draw.uniform(0, 0.6))
        else:
            assert process.wait(timeout=300) == 0
        seen.append(Index.load(storage).digest)
        assert verify(storage, deep=True).problems == ()

    run_training(make_config(tmp_path / "disturbed", *settings), report=disturb)
    assert len(seen) == KILLS + 3
    assert seen[-1] != first.digest, "at the end it is another dataset"
    for name in ("train/loss", "val/loss"):
        disturbed = column(tmp_path / "disturbed", name)
        assert len(disturbed) > KILLS
        assert disturbed == column(tmp_path / "undisturbed", name)
    chips = [column(tmp_path / run, "chips", "batches.csv") for run in ("disturbed", "undisturbed")]
    assert chips[0] == chips[1]
