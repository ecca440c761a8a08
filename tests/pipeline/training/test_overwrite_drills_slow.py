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
from concurrent.futures import ThreadPoolExecutor
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
FILES = 2 * AOIS + 1
"""Files of a generation: shards, their sidecars, a copy of the index."""
EPOCHS = 6
"""Of the training: five read while the commands are killed, the last one reads after all of them."""


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


def disturb(source: Path, storage: Storage, ended: threading.Semaphore) -> int:
    """Replace the dataset until the command was killed ten times in its work, then once more; return its last seed."""
    draw, kills = random.Random(17), 0
    for seed in range(4 * KILLS):
        before, last = Index.load(storage), kills == KILLS
        process = overwrite(source, storage.uri, seed)
        if not last:
            kill_in_its_work(process, Path(storage.uri), draw.randint(1, FILES), draw.uniform(0, 0.1))
            kills += process.returncode == -signal.SIGKILL  # else it had come to its end
        else:
            output, _ = process.communicate(timeout=500)
            assert process.returncode == 0, output
        published = Index.load(storage)
        assert published.digest == before.digest or (published.split_seed, len(published.skipped)) == (seed, 0)
        assert verify(storage, deep=True).problems == ()
        ended.release()
        if last:
            return seed
    pytest.fail(f"it was killed only {kills} times before it ended")


@pytest.mark.slow
def test_a_training_does_not_notice_kills_of_overwrite_nor_that_it_ends(
    world: World, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    source, data = tmp_path / "source", tmp_path / "data"
    write_worldstrat(source, AOIS, seed=6, revisits=2, hr_side=80)
    storage = open_storage(data)
    first = shard_folder(source, storage, OPTIONS).index
    # Without a cache, every epoch reads every sample again. The wait for kills is no hang.
    settings = (f"data.uri={data}", "data.cache_mib=0", "data.prefetch_batches=1", "train.global_batch=9")
    settings = (*settings, f"train.epochs={EPOCHS}", "output.panels=0", "train.hang_seconds=0")
    run_training(make_config(tmp_path / "undisturbed", *settings))
    assert Index.load(storage).digest == first.digest
    ended, epochs = threading.Semaphore(0), list[Mapping[str, float]]()

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(disturb, source, storage, ended)

        def wait_for_kills(metrics: Mapping[str, float]) -> None:
            """Let two more commands end in each epoch, and all of them before the last one."""
            epochs.append(metrics)
            if len(epochs) >= EPOCHS - 1:
                done.result(timeout=3000)
            for _ in range(2):
                while not (done.done() or ended.acquire(timeout=0.1)):
                    pass

        run_training(make_config(tmp_path / "disturbed", *settings), report=wait_for_kills)
    assert len(epochs) == EPOCHS
    assert Index.load(storage).split_seed == done.result(), "at the end it is another dataset"
    for name in ("train/loss", "val/loss"):
        disturbed = column(tmp_path / "disturbed", name)
        assert len(disturbed) == 3 * EPOCHS
        assert disturbed == column(tmp_path / "undisturbed", name)
    chips = [column(tmp_path / run, "chips", "batches.csv") for run in ("disturbed", "undisturbed")]
    assert chips[0] == chips[1]
