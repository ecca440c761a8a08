"""A training whose dataset is replaced while it reads: its losses are those of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.format.index import Index
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions
from sharding.run.plan import PlanOptions
from sharding.run.verify import verify
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import Storage, open_storage
from tests.command import column
from tests.conftest import SMALL

KILLS = 10
AOIS = 5
OPTIONS = ShardOptions(SMALL, PlanOptions(shard_bytes=700_000))
"""A shard a sample."""
FILES = 2 * AOIS + 2
"""Files of a generation and one more: shards, their sidecars, copies of both indexes."""


def overwrite(source: Path, output: str, seed: int) -> subprocess.Popen[str]:
    """Start the command that replaces the dataset by one of another seed and of one revisit."""
    command = [sys.executable, "-m", "cluster.cli", "shard", "--input", str(source), "--output", output]
    options = ["--lr-size", str(SMALL.lr_size), "--hr-size", str(SMALL.hr_size), "--overwrite", "--revisits", "1"]
    options = [*options, "--seed", str(seed), "--shard-size", "0.7", "--workers", "1"]
    return subprocess.Popen(
        [*command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_in_its_work(process: subprocess.Popen[str], folder: Path, files: int, moment: float) -> None:
    """Kill the command some time after so many new files have appeared, or let it end if it does."""
    before, deadline = set(folder.glob("plan-*/*")), time.monotonic() + 500
    try:
        while process.poll() is None and len(set(folder.glob("plan-*/*")) - before) < files:
            assert time.monotonic() < deadline, "it makes no more files"
            time.sleep(0.002)
        time.sleep(moment)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def disturb(source: Path, storage: Storage, killed: threading.Semaphore) -> list[int]:
    """Replace the dataset again and again, killed at random moments and in the end not; return the statuses."""
    draw, statuses = random.Random(17), list[int]()
    for number in range(KILLS + 1):
        before = Index.load(storage)
        process = overwrite(source, storage.uri, number)
        if number < KILLS:
            kill_in_its_work(process, Path(storage.uri), draw.randint(1, FILES), draw.uniform(0, 0.1))
        else:
            output, _ = process.communicate(timeout=500)
            assert process.returncode == 0, output
        statuses.append(process.returncode)
        published = Index.load(storage)
        assert published.digest == before.digest or (published.split_seed, len(published.skipped)) == (number, 0)
        assert verify(storage, deep=True).problems == ()
        killed.release()
    return statuses


@pytest.mark.slow
def test_a_training_does_not_notice_kills_of_overwrite_nor_that_it_ends(
    world: World, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    source, data = tmp_path / "source", tmp_path / "data"
    write_worldstrat(source, AOIS, seed=6, revisits=2, hr_side=80)
    storage = open_storage(data)
    first = shard_folder(source, storage, OPTIONS).index
    # Without a cache, every epoch reads every sample again, the last one after the dataset has been replaced.
    settings = (f"data.uri={data}", "data.cache_mib=0", "data.prefetch_batches=1", "train.global_batch=9")
    settings = (*settings, f"train.epochs={KILLS + 2}", "output.panels=0", "train.hang_seconds=0")
    run_training(make_config(tmp_path / "undisturbed", *settings))
    assert Index.load(storage).digest == first.digest
    killed, epochs = threading.Semaphore(0), list[int]()

    def wait_for_a_kill(metrics: Mapping[str, float], done: Future[list[int]]) -> None:
        """Let each epoch be read while the next command works."""
        epochs.append(len(epochs))
        deadline = time.monotonic() + 1000
        while not (done.done() or killed.acquire(timeout=0.1)):
            assert time.monotonic() < deadline
        if done.done():
            done.result()  # its error, if it has one

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(disturb, source, storage, killed)
        config = make_config(tmp_path / "disturbed", *settings)
        run_training(config, report=lambda metrics: wait_for_a_kill(metrics, done))
    statuses = done.result()
    print(f"killed before they ended: {statuses.count(-signal.SIGKILL)} of {KILLS}")
    assert -signal.SIGKILL in statuses
    assert len(epochs) == KILLS + 2
    assert Index.load(storage).split_seed == KILLS, "at the end it is another dataset"
    for name in ("train/loss", "val/loss"):
        disturbed = column(tmp_path / "disturbed", name)
        assert len(disturbed) > KILLS
        assert disturbed == column(tmp_path / "undisturbed", name)
    chips = [column(tmp_path / run, "chips", "batches.csv") for run in ("disturbed", "undisturbed")]
    assert chips[0] == chips[1]
