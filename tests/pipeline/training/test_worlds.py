"""Another number of ranks in mid-epoch, at every ZeRO stage: the same global batches, and the same losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ModelConfig
from models.registry import build_model
from models.satfusion import SatFusion
from pipeline.config import RunConfig
from pipeline.data import TrainLoader
from pipeline.data.batches import Batch
from pipeline.engines.engine import ForwardPass
from pipeline.training import checkpoint, loop
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


def in_float64(patch: pytest.MonkeyPatch) -> None:
    """Make this process train in float64: network, batches, moments and checkpoints."""
    fuse, batches = ForwardPass._fuse, TrainLoader.__iter__

    def double(config: ModelConfig) -> SatFusion:
        return build_model(config).double()

    def fuse_double(self: ForwardPass, *images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return fuse(self, *(image.double() if image.is_floating_point() else image for image in images))

    def widened(self: TrainLoader) -> Iterator[Batch]:
        for batch in batches(self):
            values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
            narrow = {name: v for name, v in values.items() if isinstance(v, torch.Tensor) and v.dtype == torch.float32}
            yield replace(batch, **{name: value.double() for name, value in narrow.items()})

    for module in (loop, checkpoint):
        patch.setattr(module, "build_model", double)
    patch.setattr(ForwardPass, "_fuse", fuse_double)
    patch.setattr(TrainLoader, "__iter__", widened)


def train_in_float64(place: Rank, config: RunConfig) -> int:
    with pytest.MonkeyPatch.context() as patch:
        in_float64(patch)
        return train(place, config)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_world_changes_rounding_alone(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """In float64 the losses differ by its rounding, so no chip is weighted otherwise in another world."""
    fixed, moved = tmp_path / "fixed", tmp_path / "moved"
    plain = ("train.engine=torch", "train.learning_rate=1e-3", "train.log_every=1")
    for run, worlds in ((fixed, ((1, 4),)), (moved, ((1, 1), (2, 2), (4, 3), (3, 4)))):
        for ranks, end in worlds:
            config = make_config(run, *OPTIONS, *plain, f"train.max_steps={end}")
            place = tmp_path / f"{run.name}-{end}"
            assert run_ranks(train_in_float64, ranks, place, config, seconds=300) == [end] * ranks
    losses = [[float(loss) for loss in column(run, "train/loss")] for run in (moved, fixed)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
