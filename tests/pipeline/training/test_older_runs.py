"""A run on a dataset of format 2, as an earlier version left both, is resumed in mid-epoch with the same chips."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.training.checkpoint import complete_checkpoints
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError
from sharding.run.verify import verify
from sharding.storage import open_storage
from tests.command import column
from tests.format2 import to_format_2, to_run_of_that_time

STEPS, STOPPED = 14, 11
"""Epochs have nine steps, so the run was stopped in its second one."""


def test_it_is_resumed_in_mid_epoch_with_the_same_chips(
    world: World, make_config: Callable[..., RunConfig], small_uri: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_uri, data)
    to_format_2(data)
    # Its rates do not depend on max_steps.
    settings = (f"data.uri={data}", "train.schedule=warm_restarts")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_training(make_config(whole, *settings, f"train.max_steps={STEPS}"))
    run_training(make_config(resumed, *settings, f"train.max_steps={STOPPED}"))
    assert complete_checkpoints(open_storage(resumed), "step") == [STOPPED]
    to_run_of_that_time(resumed)
    assert verify(open_storage(data), deep=True).problems == ()
    with pytest.raises(UserError, match=r"another dataset \(digest of its index\)"):
        run_training(make_config(resumed, "train.schedule=warm_restarts", f"train.max_steps={STEPS}"))
    assert run_training(make_config(resumed, *settings, f"train.max_steps={STEPS}")).step == STEPS
    assert len(set(column(resumed, "epoch"))) == 2
    assert column(resumed, "chips", "batches.csv") == column(whole, "chips", "batches.csv")
    assert column(resumed, "train/loss") == column(whole, "train/loss")
