"""A user's own keys of DeepSpeed: merged with ours, saved and read back, and refused where they conflict."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ModelConfig
from models.registry import build_model
from pipeline.config import RunConfig, TrainConfig, load_config
from pipeline.deepspeed_keys import OURS
from pipeline.engines.deepspeed_config import BUCKET, deepspeed_config
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan
from pipeline.quality.losses import LossConfig
from pipeline.world import World
from sharding.errors import UserError
from tests.pipeline.engines.test_engine import random_batch, take_step

FILE = """
[deepspeed]
prescale_gradients = true
[deepspeed.zero_optimization]
reduce_bucket_size = 1000
"""
KEYS = {"prescale_gradients": True, "zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 500}}


def names(values: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        found += names(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


def test_keys_of_the_file_and_overrides_join_ours_and_are_saved(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(FILE)
    override = "deepspeed.zero_optimization.allgather_bucket_size=500"
    config = load_config(str(tmp_path / "run.toml"), ["train.zero_stage=2", override])
    assert config.deepspeed == KEYS
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict(tomllib.loads(config.to_toml())) == config
    plan = BatchPlan.create(8, 2, 2)
    resolved = deepspeed_config(config.train, plan, config.deepspeed)
    ours = deepspeed_config(config.train, plan, {})
    assert resolved["zero_optimization"] == {**ours["zero_optimization"], **KEYS["zero_optimization"]}  # type: ignore[dict-item]
    assert resolved["prescale_gradients"] is True
    assert resolved["train_batch_size"] == 8


def test_every_key_that_is_set_here_is_known_as_ours() -> None:
    default = "zero_optimization.reduce_bucket_size"  # a user's key takes its place
    assert set(names(deepspeed_config(TrainConfig(), BatchPlan.create(8, 0, 1), {}))) <= {*OURS, default}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("zero_optimization.stage", "2", "conflicts with a key that is set by train.zero_stage"),
        ("optimizer.type", "Adam", "conflicts with a key that is set by train.learning_rate"),
        ("timers", "true", "conflicts with a key that is set by this program"),
        ("train_batch_size", "8", "conflicts with a key that is set by train.global_batch"),
        ("zero_optimization.reduce_bucket_siz", "2", "did you mean 'reduce_bucket_size'"),
        ("zero_optimisation.sub_group_size", "2", "did you mean 'zero_optimization'"),
        ("zero_optimization.reduce_bucket_size.deep", "2", "unknown key"),
        ("prescale_gradient", "true", "did you mean 'prescale_gradients'"),
        ("zero_optimization.reduce_bucket_size", "many", "reduce_bucket_size"),
        ("zero_optimization.reduce_bucket_size", "0", "reduce_bucket_size"),
        ("zero_optimization", "3", "zero_optimization"),
        ("prescale_gradients", "1", "prescale_gradients"),
    ],
)
def test_keys_that_conflict_or_do_not_exist_are_refused(key: str, value: str, said: str) -> None:
    with pytest.raises(UserError, match="deepspeed") as error:
        load_config("srcnn_pnn", [f"deepspeed.{key}={value}"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_without_deepspeed_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.engine = 'torch' does not use DeepSpeed"):
        load_config("srcnn_pnn", ["train.engine=torch", "deepspeed.prescale_gradients=true"])
    with pytest.raises(UserError, match="is a section"):
        RunConfig.from_dict({"deepspeed": 3})


def test_the_engine_uses_them(world: World) -> None:
    keys = {"zero_optimization": {"reduce_bucket_size": 1000}}
    config = TrainConfig(zero_stage=2, global_batch=4)
    losses, buckets = [], []
    for given in ({}, keys):
        torch.manual_seed(0)
        network = build_model(ModelConfig("highresnet", "pannet", hidden=8))
        engine: Any = make_engine(network, config, BatchPlan.create(4, 2, 1), world, None, given)
        losses.append([take_step(engine, random_batch(step), 2, 1e-3, LossConfig()) for step in range(2)])
        buckets.append(engine._engine.optimizer.reduce_bucket_size)
    assert buckets == [BUCKET, 1000]
    assert losses[0] == losses[1]
