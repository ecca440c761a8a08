"""Another number of ranks in mid-epoch, at every ZeRO stage: the same global batches, and the same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.training.loop import run_training
from pipeline.world import World
from tests.command import column
from tests.distributed import Rank, run_ranks

WORLDS = ((1, 1), (2, 2), (4, 4), (3, 5), (1, 7))
"""Ranks, and the step that they end at; epochs have three steps."""
OPTIONS = ("train.global_batch=12", "train.micro_batch=3", "train.schedule=warm_restarts", "output.panels=0")


def train(place: Rank, config: RunConfig) -> int:
    return run_training(config).step


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_world_may_change_in_mid_epoch(
    world: World, stage: int, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    fixed, moved = tmp_path / "fixed", tmp_path / "moved"
    run_training(make_config(fixed, *OPTIONS, "train.max_steps=7", "train.engine=torch"))
    for ranks, end in WORLDS:
        config = make_config(moved, *OPTIONS, f"train.max_steps={end}", f"train.zero_stage={stage}")
        assert run_ranks(train, ranks, tmp_path / f"ranks-{end}", config, seconds=300) == [end] * ranks
    losses = [[float(loss) for loss in column(run, "train/loss")] for run in (moved, fixed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    chips = [column(run, "chips", "batches.csv") for run in (moved, fixed)]
    assert chips[0] == chips[1]
    for epoch in (chips[0][:3], chips[0][3:6]):
        names = [name for batch in epoch for name in batch.split(";")]
        assert len(set(names)) == len(names) == 36
