"""The engine's state over two ranks, whose partitions cut through parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.registry import build_model
from pipeline.config import TrainConfig
from pipeline.engines.engine import Engine, TrainState
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan
from pipeline.quality.losses import LossConfig
from pipeline.world import World
from tests.distributed import Rank, run_ranks
from tests.pipeline.engines.test_engine import KINDS, Kind, options, random_batch, take_step


def resume_from(place: Rank, kind: Kind) -> list[dict[str, Tensor]]:
    """Take three steps; resume from step two's state on a fresh engine; return both ends and the moments' ends."""
    world = World(place.rank, place.world_size, torch.device("cpu"))
    config, plan = TrainConfig(**options(kind), global_batch=2), BatchPlan.create(2, 1, 2)

    def engine(seed: int, state: TrainState | None = None) -> Engine:
        torch.manual_seed(seed)
        # Widths of 8 and 3 give parameters of odd sizes, which do not divide by two.
        return make_engine(build_model(ModelConfig("highresnet", "pnn", hidden=8)), config, plan, world, state)

    def step(engine: Engine, number: int) -> None:
        take_step(engine, random_batch(10 * number + place.rank, size=1), 1, 1e-3, LossConfig())

    first = engine(0)
    step(first, 0)
    step(first, 1)
    second = engine(1, first.state(2))
    for going_on in (first, second):
        step(going_on, 2)
    ends = [going_on.state(3) for going_on in (first, second)]
    flat = [{f"{n}:{m}": v for n, moments in end.moments.items() for m, v in moments.items()} for end in ends]
    return [ends[0].weights | flat[0], ends[1].weights | flat[1]]


@pytest.mark.distributed
# ZeRO 1 partitions what ZeRO 2 does, by the same code.
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind == 1 else ()) for kind in KINDS])
def test_two_ranks_resume_bit_for_bit(kind: Kind, tmp_path: Path) -> None:
    (undisturbed, going_on), (undisturbed_1, _) = run_ranks(resume_from, 2, tmp_path, kind)
    assert undisturbed.keys() == going_on.keys()
    for name, value in undisturbed.items():
        assert torch.equal(value, going_on[name]), name
        assert torch.equal(value, undisturbed_1[name]), name
