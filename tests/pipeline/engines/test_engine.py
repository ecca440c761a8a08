"""DeepSpeed takes the published steps, and its state survives every ZeRO stage."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import _get_build_directory

from models.config import ModelConfig
from models.registry import build_model
from pipeline.config import TrainConfig
from pipeline.data.batches import Batch
from pipeline.engines.deepspeed_engine import import_deepspeed
from pipeline.engines.engine import Engine, TrainState
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan
from pipeline.quality.losses import LossConfig, fusion_loss
from pipeline.world import World
from tests.golden import cases

Kind = int | str
"""A ZeRO stage of DeepSpeed's engine, or "torch"."""
KINDS: list[Kind] = [0, 1, 2, 3, "torch"]


def options(kind: Kind) -> dict[str, Any]:
    """Return the engine's keys of a `TrainConfig`."""
    return {"engine": "torch"} if kind == "torch" else {"zero_stage": kind}


def take_step(engine: Engine, batch: Batch, micro: int, rate: float, loss: LossConfig) -> float:
    total = 0.0
    for part in batch.split(micro):
        value = fusion_loss(engine.forward(part), part.hr, loss).total
        engine.backward(value.mean())
        engine.update(rate)
        total += value.detach().sum().item()
    return total / len(batch.chips)


def random_batch(step: int, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(step)

    def image(*shape: int) -> Tensor:
        return torch.rand(size, *shape, generator=generator)

    lr, pan, hr = image(8, 3, 8, 8), image(1, 25, 25), image(3, 25, 25)
    return Batch(lr, pan, hr, torch.zeros(size, dtype=torch.long), torch.ones(size), tuple(range(size)))


# A test of the loop shows that both engines take the same steps.
@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", ["SRCNN+PNN", pytest.param("HighResNet+PANNet", marks=pytest.mark.slow)])
def test_ten_published_steps_through_an_engine(pair: str, engine: str, world: World) -> None:
    golden = cases.load("training")[f"{pair}/32/loss"]
    rates = {"learning_rate": cases.LEARNING_RATE, "weight_decay": cases.WEIGHT_DECAY}
    config = TrainConfig(global_batch=2, engine=engine, **rates)
    trained = make_engine(cases.golden_model(pair), config, BatchPlan.create(2, 1, 1), world)
    losses = []
    for step in range(cases.TRAINING_STEPS):
        lr, pan, hr = cases.training_batch(step)
        batch = Batch(lr, pan, hr, torch.zeros(2, dtype=torch.long), torch.ones(2), (0, 1))
        losses.append(take_step(trained, batch, 1, cases.LEARNING_RATE, cases.TRAINING_LOSS))
    assert losses == pytest.approx(golden.tolist(), abs=1e-4, rel=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_gathered_and_put_back_resumes_bit_for_bit(kind: Kind, precision: str, world: World) -> None:
    config = TrainConfig(**options(kind), precision=precision, global_batch=4, clip_norm=0.5)
    plan = BatchPlan.create(4, 2, 1)
    model = ModelConfig("highresnet", "pannet", hidden=8)

    def engine(seed: int, state: TrainState | None = None) -> Engine:
        torch.manual_seed(seed)
        return make_engine(build_model(model), config, plan, world, state)

    undisturbed = engine(0)
    for step in range(3):
        take_step(undisturbed, random_batch(step), 2, 1e-3, LossConfig())
    middle = undisturbed.state(3)
    going_on = engine(1, middle)
    for step in range(3, 5):
        first = take_step(undisturbed, random_batch(step), 2, 1e-3, LossConfig())
        second = take_step(going_on, random_batch(step), 2, 1e-3, LossConfig())
        assert first == second
        assert undisturbed.grad_norm == going_on.grad_norm > 0
    end, again = undisturbed.state(5), going_on.state(5)
    assert all(torch.equal(end.weights[name], again.weights[name]) for name in end.weights)
    assert any(not torch.equal(end.weights[name], middle.weights[name]) for name in end.weights)


def test_a_state_moves_between_engines_and_stages(world: World) -> None:
    plan = BatchPlan.create(4, 4, 1)
    states = {}
    state = None
    for kind in (3, 0, "torch", 2, 1):
        torch.manual_seed(0)
        config = TrainConfig(**options(kind), global_batch=4)
        engine = make_engine(build_model(ModelConfig("srcnn", "pnn", hidden=8)), config, plan, world, state)
        take_step(engine, random_batch(len(states)), 4, 1e-3, LossConfig())
        states[kind] = state = engine.state(len(states) + 1)
    torch.manual_seed(0)
    alone = make_engine(
        build_model(ModelConfig("srcnn", "pnn", hidden=8)), TrainConfig(zero_stage=0, global_batch=4), plan, world
    )
    for step in range(5):
        take_step(alone, random_batch(step), 4, 1e-3, LossConfig())
    end = alone.state(5)
    for name, value in end.weights.items():
        assert torch.allclose(state.weights[name], value, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("kind", [0, 2, "torch"])
def test_clipping_bounds_the_step(kind: Kind, world: World) -> None:
    plan = BatchPlan.create(4, 4, 1)
    moved = []
    for clip in (0.0, 1e-12):
        torch.manual_seed(0)
        network = build_model(ModelConfig("srcnn", "pnn", hidden=8))
        before = {name: value.clone() for name, value in network.state_dict().items()}
        config = TrainConfig(**options(kind), global_batch=4, clip_norm=clip, weight_decay=0.0)
        engine = make_engine(network, config, plan, world)
        take_step(engine, random_batch(0), 4, 1e-3, LossConfig())
        after = engine.state(1).weights
        moved.append(max((after[name] - before[name]).abs().max().item() for name in before))
    # Adam divides by the gradient's size plus 1e-8; clipped far below that, the step nearly vanishes.
    assert moved[0] == pytest.approx(1e-3, rel=0.05)
    assert moved[1] < 1e-6


def test_the_lock_of_a_killed_process_is_not_waited_for() -> None:
    """Torch's lock file is left in the folder of DeepSpeed's op by a process that was killed while loading it."""
    import_deepspeed()
    folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    with (folder / "satfusion.lock").open("w") as ours:  # no other process uses it, as after the kill
        fcntl.flock(ours, fcntl.LOCK_EX)
        (folder / "lock").touch()
    program = "from pipeline.engines.deepspeed_engine import import_deepspeed; import_deepspeed()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=500)
    with (folder / "satfusion.lock").open("w") as ours:  # else a process that is loading it may have torch's
        fcntl.flock(ours, fcntl.LOCK_EX)
        assert not (folder / "lock").exists()
