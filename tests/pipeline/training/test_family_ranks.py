"""Two ranks train every encoder and every head, and stay equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from models.registry import ABSENT, ENCODERS, HEADS, build_model
from pipeline.config import TrainConfig
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan
from pipeline.quality.losses import LossConfig
from pipeline.world import World
from tests.distributed import Rank, run_ranks
from tests.pipeline.engines.test_engine import random_batch, take_step

# Each encoder and each head once; the encoders with the fewest parameters before the heads that need one.
PAIRS = [*((encoder, ABSENT) for encoder in ENCODERS), *((ABSENT, head) for head in HEADS)]


def three_steps(place: Rank, stage: int, encoder: str, head: str) -> dict[str, torch.Tensor]:
    """Train on chips that differ between ranks, and return this rank's state and its losses."""
    torch.manual_seed(0)
    world = World(place.rank, place.world_size, torch.device("cpu"))
    network = build_model(ModelConfig(encoder, head, hidden=8))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    engine = make_engine(network, TrainConfig(zero_stage=stage, global_batch=2), BatchPlan.create(2, 1, 2), world)
    losses = []
    for step in range(3):
        engine.begin_step(step)
        chip = random_batch(10 * step + place.rank, size=1)
        losses.append(take_step(engine, chip, 1, 1e-3, LossConfig()))
    weights = engine.state(3).weights
    assert weights.keys() == before.keys()
    moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    # Three steps use few of ARConv's nine kernel sizes.
    still = {name for name, _ in network.named_parameters() if name not in moved and ".convs." not in name}
    assert not still, still
    # In addition to gathered values, which are equal on all ranks by nature, the weights that this rank computes with.
    own = {f"own {name}": value.clone() for name, value in network.state_dict().items()}
    return weights | own | {"losses": torch.tensor(losses)}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(("encoder", "head"), PAIRS)
def test_two_ranks_stay_equal(encoder: str, head: str, stage: int, tmp_path: Path) -> None:
    first, second = run_ranks(three_steps, 2, tmp_path, stage, encoder, head)
    assert not torch.equal(first.pop("losses"), second.pop("losses"))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
