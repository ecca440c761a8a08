"""Two real ranks on few shards: none waits for the other, and a killed run resumes in any world with equal chips."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.data import ChipDataset, TrainLoader
from pipeline.order import BatchPlan
from tests.command import column, run_command, start_command

EPOCHS = 3
STEPS = EPOCHS * (45 // 4)
"""Steps of an epoch: five AOIs in global batches of four."""


def write_config(make_config: Callable[..., RunConfig], uri: str, run: Path) -> list[str]:
    options = (f"train.epochs={EPOCHS}", "train.checkpoint_every=3", "data.loader_threads=2")
    config = make_config(run, f"data.uri={uri}", *options)
    path = run.parent / f"{run.name}.toml"
    path.write_text(config.to_toml())
    return ["train", str(path)]


def kill_at(step: int, command: list[str], run: Path) -> int:
    """Train on two ranks, SIGKILL both once ``step`` was taken, before the last one; return the last logged step."""
    ranks = start_command(2, command, held_at=STEPS - 1)
    try:
        deadline = time.monotonic() + 400
        while not ((run / "metrics.csv").exists() and len(column(run, "step")) >= step):
            assert time.monotonic() < deadline, ranks.output()
            time.sleep(0.002)
    finally:
        ranks.kill()
    return int(column(run, "step")[-1])


def kill_anywhere(make_config: Callable[..., RunConfig], uri: str, folder: Path) -> Path:
    """Return the folder of a run of two ranks that were killed at a random step."""
    killed = folder / "killed"
    wanted = random.randrange(1, STEPS - 8)
    last = kill_at(wanted, write_config(make_config, uri, killed), killed)
    print(f"to be killed at step {wanted}, killed after step {last}")
    assert wanted <= last < STEPS
    return killed


@pytest.mark.distributed
def test_two_ranks_on_one_shard_are_killed_and_one_goes_on(
    make_config: Callable[..., RunConfig], shards: dict[int, str], tmp_path: Path
) -> None:
    run = kill_anywhere(make_config, shards[1], tmp_path)
    run_command(1, write_config(make_config, shards[1], run))
    config = make_config(run)
    loader = TrainLoader(
        ChipDataset(shards[1], "train", config.data), BatchPlan.create(4, 0, 1), 0, seed=config.train.seed
    )
    order = [";".join(loader.global_batch(*divmod(step, loader.steps_per_epoch))) for step in range(STEPS)]
    assert column(run, "chips", "batches.csv") == order


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_killed_run_takes_the_undisturbed_ones_chips_in_any_world(
    make_config: Callable[..., RunConfig], shards: dict[int, str], tmp_path: Path, count: int
) -> None:
    undisturbed = tmp_path / "undisturbed"
    run_command(2, write_config(make_config, shards[count], undisturbed))
    chips = column(undisturbed, "chips", "batches.csv")
    assert len(chips) == STEPS
    for first in range(0, STEPS, STEPS // EPOCHS):
        names = ";".join(chips[first : first + STEPS // EPOCHS]).split(";")
        assert len(set(names)) == len(names) == 44

    killed = kill_anywhere(make_config, shards[count], tmp_path)
    for world in (1, 2, 4):
        run = tmp_path / f"on-{world}"
        shutil.copytree(killed, run)
        run_command(world, write_config(make_config, shards[count], run))
        assert column(run, "chips", "batches.csv") == chips
        for tag in ("train/loss", "val/psnr"):
            ours, theirs = ([float(value or 0) for value in column(folder, tag)] for folder in (run, undisturbed))
            assert ours == pytest.approx(theirs, rel=1e-4)
