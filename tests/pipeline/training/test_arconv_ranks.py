"""ARConv over ranks: one decision, one set of statistics, and kernels that stay unused, at every ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import ModelConfig
from models.heads.arconv import head as arconv
from models.heads.arconv.adaptive import KERNELS, AdaptiveConv
from models.heads.arconv.ranks import RankBatchNorm2d, mean_over_ranks
from models.registry import build_model
from models.satfusion import SatFusion
from pipeline.config import TrainConfig
from pipeline.data.batches import Batch
from pipeline.engines.engine import TrainState
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan
from pipeline.world import World
from tests.distributed import Rank, run_ranks
from tests.pipeline.engines.test_engine import KINDS, Kind, options

MOVED = "head.rb1.conv1"
"""The convolution whose heights are set by the test."""

TARGETS = [(-3.0, 1.5), (0.2, 0.2), (-1.0, 3.0), (-3.0, -3.0), (3.0, 3.0)]
"""Heights before the sigmoid, for both samples of each step. The first sample alone would have 3 3 3 3 7 rows of taps,
the second 7 5 7 3 7."""

ROWS = [3, 5, 5, 3, 3]
"""Rows of both samples together, frozen from step 4 on."""

FREEZE = 4


@dataclass(frozen=True)
class Ended:
    """Result of a training of five steps."""

    losses: list[float]
    norms: list[float]
    """Norms of the gradients."""
    kernels: list[list[int]]
    """Rows of the set convolution, after each step."""
    middle: TrainState
    """State after three steps."""
    end: TrainState


def random_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)

    def image(*shape: int) -> Tensor:
        return torch.rand(2, *shape, generator=generator)

    return Batch(
        image(1, 3, 4, 4), image(1, 12, 12), image(3, 12, 12), torch.zeros(2, dtype=torch.long), torch.ones(2), (0, 1)
    )


class Run:
    """A training in steps of two samples, each rank's part in micro-batches."""

    def __init__(
        self, world: World, kind: Kind, width: int, state: TrainState | None = None, micro: int | None = None
    ) -> None:
        config = TrainConfig(**options(kind), global_batch=2)
        self.world, self.micro = world, micro or 2 // world.size
        self.step = state.step if state is not None else 0
        torch.manual_seed(0 if state is None else 1)
        with mock.patch.object(arconv, "WIDTH", width):
            network = build_model(ModelConfig("none", "arconv", kernel_freeze_step=FREEZE))
        self.moved = moved(network)
        self.moved.height.register_forward_hook(lambda module, inputs, output: 0.1 * output + self.target)
        self.engine = make_engine(network, config, BatchPlan.create(2, self.micro, world.size), world, state)

    def take_step(self) -> float:
        targets = torch.tensor(TARGETS[self.step]).view(2, 1, 1, 1).split(self.micro)
        losses = []
        self.engine.begin_step(self.step)
        for number, batch in enumerate(random_batch(self.step).split(self.micro)):
            if number % self.world.size == self.world.rank:
                self.target = targets[number]
                loss = (self.engine.forward(batch).fused - batch.hr).square().mean()
                self.engine.backward(loss)
                self.engine.update(1e-3)
                losses.append(loss.item())
        self.step += 1
        return float(self.world.gather(losses).mean())


def moved(network: SatFusion) -> AdaptiveConv:
    module = network.get_submodule(MOVED)
    assert isinstance(module, AdaptiveConv)
    return module


def train(world: World, kind: Kind, width: int) -> Ended:
    run = Run(world, kind, width)
    losses, norms, kernels = [], [], []
    for step in range(len(TARGETS)):
        losses.append(run.take_step())
        norms.append(run.engine.grad_norm.item())
        kernels.append(run.moved.reserved_NXY.tolist())
        if step == 2:
            middle = run.engine.state(3, moments=False)
    return Ended(losses, norms, kernels, middle, run.engine.state(len(TARGETS)))


def train_at_stages(place: Rank, kinds: tuple[Kind, ...], width: int) -> list[Ended]:
    world = World(place.rank, place.world_size, torch.device("cpu"))
    return [train(world, kind, width) for kind in kinds]


def check(ranks: list[list[Ended]], alone: Ended) -> None:
    """Both ranks must end with equal results at each stage, and all stages like one process with both samples."""
    for first, second in zip(*ranks, strict=True):
        assert [rows for rows, _ in first.kernels] == ROWS
        assert first.kernels == second.kernels == alone.kernels
        assert first.losses == pytest.approx(alone.losses, rel=1e-5)
        assert first.norms == pytest.approx(alone.norms, rel=1e-4)
        for name, value in first.end.weights.items():
            assert torch.equal(value, second.end.weights[name]), name
            # A running variance reaches 115 at full width, where neighbouring float32 are 8e-6 apart.
            torch.testing.assert_close(value, alone.end.weights[name], rtol=1e-6, atol=2e-5, msg=name)
        check_idle(first, alone)


def check_idle(ended: Ended, alone: Ended) -> None:
    """Unused parameters must stay: kernels never used, and from step 4 on those of five rows."""
    for number, (rows, columns) in enumerate(KERNELS):
        name = f"{MOVED}.convs.{number}.weight"
        was_used = [rows, columns] in ended.kernels
        assert any(moment.any() for moment in ended.end.moments[name].values()) == was_used
        stays = not was_used or [rows, columns] not in ended.kernels[3:]
        assert torch.equal(ended.middle.weights[name], ended.end.weights[name]) == stays, name
        if not was_used:
            assert torch.equal(ended.end.weights[name], alone.middle.weights[name])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("width", "kinds"), [(4, (3, "torch")), pytest.param(arconv.WIDTH, tuple(KINDS), marks=pytest.mark.slow)]
)
def test_two_ranks_train_as_one_at_every_stage(
    width: int, kinds: tuple[Kind, ...], tmp_path: Path, world: World
) -> None:
    ranks = run_ranks(train_at_stages, 2, tmp_path, kinds, width)
    check(ranks, train(world, 0, width))


@pytest.mark.parametrize("kind", [0, 2, "torch"])
def test_training_resumes_bit_for_bit(kind: Kind, world: World) -> None:
    undisturbed = Run(world, kind, width=4)
    for _ in range(3):
        undisturbed.take_step()
    going_on = Run(world, kind, 4, undisturbed.engine.state(3))
    for _ in range(2):
        assert undisturbed.take_step() == going_on.take_step()
    end, again = undisturbed.engine.state(5), going_on.engine.state(5)
    assert all(torch.equal(value, again.weights[name]) for name, value in end.weights.items())
    for name, moments in end.moments.items():
        assert all(torch.equal(value, again.moments[name][moment]) for moment, value in moments.items()), name


def test_kernels_may_change_within_a_step(world: World) -> None:
    ends = []
    for kind in (0, 3):
        run = Run(world, kind, width=4, micro=1)
        norms = [(run.take_step(), run.engine.grad_norm.item())[1] for _ in range(3)]
        assert run.moved.reserved_NXY[0] == 7
        ends.append((norms, run.engine.state(3, moments=False).weights))
    (norms, weights), (norms_3, weights_3) = ends
    # ZeRO 3 adds to its gradient of a kernel that waited for the second micro-batch.
    assert norms == pytest.approx(norms_3, rel=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(value, weights_3[name], rtol=0, atol=2e-5, msg=name)


def norm_on_ranks(place: Rank) -> dict[str, float]:
    """Return the difference of a batch norm on two ranks from PyTorch's over both batches."""
    generator = torch.Generator().manual_seed(3)
    x, weight = (100 + torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    ours, whole = RankBatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    for norm in (ours, whole):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(4))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(5))
    own = slice(2 * place.rank, 2 * place.rank + 2)
    mine, all_of_it = x[own].clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        result, expected = ours(mine), whole(all_of_it)
    (result * weight[own]).square().mean().backward()
    (expected * weight).square().mean().backward()
    assert all_of_it.grad is not None
    pairs = {"output": (result, expected[own]), "input": (mine.grad, 2 * all_of_it.grad[own])}
    for name, parameter in ours.named_parameters():
        pairs[name] = (mean_over_ranks(parameter.grad), whole.get_parameter(name).grad)
    for name, buffer in ours.named_buffers():
        pairs[name] = (buffer.clone(), whole.get_buffer(name))
    pairs["evaluation"] = (ours.eval()(mine), whole.eval()(all_of_it)[own])
    assert ours.train()(mine.bfloat16()).dtype == torch.bfloat16
    dist.barrier()
    return {name: float((a - b).detach().abs().max() / b.detach().abs().max()) for name, (a, b) in pairs.items()}


@pytest.mark.distributed
def test_a_batch_norm_of_two_ranks_is_one_of_both_batches(tmp_path: Path) -> None:
    for distances in run_ranks(norm_on_ranks, 2, tmp_path):
        assert len(distances) == 8
        assert all(distance <= 1e-10 for distance in distances.values()), distances
